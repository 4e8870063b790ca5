"""The whole preparation: stages of datatrove blocks, from raw files to token stores.

    clean     read → rules → (signatures) → documents
    repeats   drop repeated lines or paragraphs, where wanted, and take the MinHash signatures then
    select    drop duplicates → score → documents, which stay for the user
    tokenise  divide by source, score and hash; tokenise
    stores    shuffle, write

A task of a stage is done or not; a killed preparation repeats the tasks that were not.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from datatrove.pipeline.dedup import MinhashDedupBuckets

from danube_jax import files
from danube_jax.config import TokenizerConfig, to_dict
from danube_jax.console import info
from danube_jax.data.corpus import (
    builtin,
    decontaminate,
    dedup,
    heuristics,
    minhash,
    quality,
    quality_training,
    text_rules,
)
from danube_jax.data.corpus.config import CorpusConfig, QualityStep
from danube_jax.data.corpus.executors import Runner
from danube_jax.data.corpus.inputs import divide, list_inputs, listing
from danube_jax.data.corpus.records import RecordReader, write_bad_records
from danube_jax.data.corpus.stages import FILE, SaveTally, StageReader, document_writer
from danube_jax.data.corpus.statistics import Statistics, collect
from danube_jax.data.corpus.tally import Tally, load_all, merge
from danube_jax.data.corpus.tokenise import (
    NotePlaces,
    Placement,
    Tokenise,
    WriteStores,
    finished_stores,
    store_names,
)
from danube_jax.data.corpus.tokenizer_sample import train_on_documents
from danube_jax.data.tokenizer import load_tokenizer
from danube_jax.errors import UserError

PLAN = "preparation.json"
STATISTICS = "statistics.json"
BAD_RECORDS = "bad_records.jsonl"
TOKENIZER = "tokenizer.model"
QUALITY_MODEL = "quality.json"
DOCUMENTS = "documents"
PLAN_VERSION = 2
LOCK_SECONDS = 3.0  # the workers of a preparation that was killed take a moment to end
STAGES = ("clean", "repeats", "select", "tokenise")  # those that count


def prepare(corpus: CorpusConfig) -> Statistics:
    """Prepares a corpus, goes on with one that was stopped, or finds it done.

    Writes into `corpus.output`: `stores/SOURCE[_BUCKET]/{train,heldout}`, `documents/`,
    `statistics.json`, `bad_records.jsonl`, and `tokenizer.model` and `quality.json` where they are
    trained.

    Raises:
      UserError: bad input or config; the folder holds a preparation of another config or of other
        files, or is being prepared.
      RunError: tasks failed.
    """
    output = Path(corpus.output)
    if (output / STATISTICS).is_file():  # several processes may ask at once
        done = _Preparation(corpus, output).finished()
        if done is not None:
            return done
    output.mkdir(parents=True, exist_ok=True)
    with files.named(output), open(output / ".lock", "w") as lock:
        if not _locked(lock):
            raise UserError(
                f"{output}: another process is preparing this corpus; wait for it, or stop it and "
                "run the same command again"
            )
        return _Preparation(corpus, output, lock.fileno()).run()


def _locked(file: TextIO) -> bool:
    """Takes the lock that a preparation and its workers hold; they may be about to end."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        else:
            return True


class _Preparation:
    def __init__(self, corpus: CorpusConfig, output: Path, lock: int | None = None):
        self.corpus, self.output, self.work = corpus, output, output / "work"
        self.steps = corpus.steps
        parts = list_inputs(corpus)
        self.tasks = divide(parts, corpus.task_bytes)
        self.plan = {
            "version": PLAN_VERSION,
            "config": _essential(corpus),
            "files": _file_sums(corpus),
            "inputs": listing(parts),
            "installed": {
                name: builtin.installed(source.builtin)
                for name, source in corpus.sources.items()
                if source.builtin
            },
        }
        self.runner = Runner(corpus.executor, self.work, lock)

    def run(self) -> Statistics:
        done = self.finished()
        if done is not None:
            return done
        files.clear_temporaries(self.output)
        self._check_plan()
        if not self.corpus.tokenizer.train_vocab_size:
            load_tokenizer(self.corpus.tokenizer).framing()  # refused before the work, not after
        if self.steps.quality.enabled and self.steps.quality.model:
            quality.load_scorer(self.steps.quality)
        self._clean()
        documents, signed = self._repeats()
        self._select(documents, signed)
        placement = Placement.of(self.corpus, self._folder("select", "places"))
        tokenizer = self._tokenizer(placement)
        self._stores(placement, tokenizer)
        return self._finish(placement, tokenizer)

    def _folder(self, stage: str, name: str) -> Path:
        return self.work / stage / name

    def finished(self) -> Statistics | None:
        """The statistics of a finished preparation, or None.

        Raises:
          UserError: it was made from something else.
        """
        statistics = self.output / STATISTICS
        if not statistics.is_file():
            return None
        # Packages may have come or gone since: their text is in the stores.
        self._refuse(_changes(self._plan_before(), self.plan | {"installed": {}}))
        # Where a kill came before their removal.
        shutil.rmtree(self.work, ignore_errors=True)
        files.clear_temporaries(self.output)
        info(f"data: already prepared in {self.output}")
        return Statistics.load(statistics)

    def _plan_before(self) -> dict[str, Any]:
        path = self.output / PLAN
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            _changes(before, self.plan)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read ({error!r}); delete {self.output}") from None
        return before

    def _refuse(self, changed: str) -> None:
        if changed:
            raise UserError(
                f"{self.output}: was prepared with another {changed}; delete it, or set "
                "config.output to another folder"
            )

    def _check_plan(self) -> None:
        """Notes the plan of a new preparation, or compares it with that of a stopped one."""
        path = self.output / PLAN
        if path.exists():
            changed = _changes(self._plan_before(), self.plan)
            if any(self.work.glob("*/completions/*")):
                self._refuse(changed)
            if not changed:
                return
            # Nothing was done yet: a first try, stopped by a mistake that is mended.
            shutil.rmtree(self.work, ignore_errors=True)
        files.write_json(path, self.plan)

    def _removed(self, stage: str) -> Any:
        """Where removed documents go, if they are wanted."""
        return (
            document_writer(self.output / "removed" / stage) if self.corpus.keep_removed else None
        )

    def _clean(self) -> None:
        steps, tally, removed = self.steps, Tally(self.corpus.samples), self._removed("clean")
        index = self._folder("clean", "decontamination.npz")
        if steps.decontamination.enabled and not index.exists():
            index.parent.mkdir(parents=True, exist_ok=True)
            decontaminate.build_index(steps.decontamination, index)
        rules = (
            (text_rules.Unicode, steps.unicode),
            (text_rules.Lists, steps.lists),
            (text_rules.Language, steps.language),
            (heuristics.C4, steps.c4),
            (heuristics.GopherRepetition, steps.gopher_repetition),
            (heuristics.GopherQuality, steps.gopher_quality),
            (heuristics.FineWeb, steps.fineweb),
            (text_rules.Masking, steps.masking),
        )
        pipeline: list = [
            RecordReader(self.corpus, self.tasks, tally, self._folder("clean", "progress")),
            *(rule(step, tally, exclusion_writer=removed) for rule, step in rules if step.enabled),
        ]
        if steps.decontamination.enabled:
            pipeline.append(
                decontaminate.Decontaminate(
                    steps.decontamination, index, tally, exclusion_writer=removed
                )
            )
        if steps.exact.enabled or steps.repeated_text.enabled:
            pipeline.append(
                dedup.ExactSignatures(
                    self._folder("clean", "exact"), steps.exact.enabled, steps.repeated_text
                )
            )
        if steps.minhash.enabled and not steps.repeated_text.enabled:
            pipeline.append(self._signatures("clean", tally))
        self._run_documents("clean", pipeline, tally, removed=removed)

    def _signatures(self, stage: str, tally: Tally) -> minhash.MinHashSignatures:
        return minhash.MinHashSignatures(
            self._folder(stage, "signatures"), self.steps.minhash, tally
        )

    def _run_documents(
        self, stage: str, pipeline: list, tally: Tally, *, final: bool = False, removed: Any = None
    ) -> None:
        """Runs a stage that ends in documents."""
        size = sum(part.size for task in self.tasks for part in task)
        if stage != "clean":
            size = self._sizes(pipeline[0].folder)
        pipeline += [
            document_writer(self._folder(stage, "documents")),
            SaveTally(tally, self._folder(stage, "tally"), final, removed),
        ]
        self.runner.run(stage, pipeline, len(self.tasks), size)

    def _sizes(self, folder: Path) -> int:
        paths = (folder / FILE.format(rank) for rank in range(len(self.tasks)))
        return sum(path.stat().st_size for path in paths if path.exists())

    def _repeats(self) -> tuple[Path, str]:
        """(folder of the documents, stage that took the MinHash signatures)."""
        steps, documents = self.steps, self._folder("clean", "documents")
        if not (steps.exact.enabled or steps.repeated_text.enabled):
            return documents, "clean"
        tasks = len(self.tasks)
        find = dedup.FindRepeats(
            self._folder("clean", "exact"), self._folder("find_repeats", "places"), tasks
        )
        self.runner.run("find_repeats", [find], 1)
        if not steps.repeated_text.enabled:
            return documents, "clean"
        tally = Tally(self.corpus.samples)
        removed = self._removed("repeats")
        pipeline = [
            StageReader(documents, self._folder("repeats", "progress")),
            self._remove_repeats(tally, removed),
        ]
        if steps.minhash.enabled:
            pipeline.append(self._signatures("repeats", tally))
        self._run_documents("repeats", pipeline, tally, removed=removed)
        return self._folder("repeats", "documents"), "repeats"

    def _remove_repeats(self, tally: Tally, removed: Any) -> dedup.RemoveRepeats:
        places = self._folder("find_repeats", "places")
        return dedup.RemoveRepeats(
            places, self.steps.repeated_text, tally, exclusion_writer=removed
        )

    def _select(self, documents: Path, signed: str) -> None:
        steps, tally, removed = self.steps, Tally(self.corpus.samples), self._removed("select")
        pipeline: list = [StageReader(documents, self._folder("select", "progress"))]
        if steps.exact.enabled and signed == "clean":
            pipeline.append(self._remove_repeats(tally, removed))
        if steps.minhash.enabled:
            near = self._near_duplicates(signed)
            pipeline.append(minhash.RemoveNearDuplicates(near, tally, exclusion_writer=removed))
        if steps.quality.enabled:
            step = self._quality_model(documents)
            pipeline.append(quality.Score(step, tally, removed))
        pipeline.append(NotePlaces(self.corpus, self._folder("select", "places")))
        self._run_documents("select", pipeline, tally, final=True, removed=removed)
        if not self._sizes(self._selected()):
            rows = [row for stage in STAGES for row in load_all(self._folder(stage, "tally"))]
            reasons = Counter()
            for steps_of in merge(rows, 0).steps.values():
                for step, counts in steps_of.items():
                    for reason, (number, _) in counts["removed"].items():
                        reasons[f"{step}: {reason}"] += number
            most = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common(3))
            raise UserError(
                f"{self.output}: no document is left after the steps ({most}); loosen their "
                "thresholds in config.steps"
            )

    def _selected(self) -> Path:
        """The documents that stay; their last place, once they are there."""
        final = self.output / DOCUMENTS
        return final if final.exists() else self._folder("select", "documents")

    def _quality_model(self, documents: Path) -> QualityStep:
        """The settings with a model's path, trained now where the config asks for it."""
        step = self.steps.quality
        if step.model:
            return step
        path = self.output / QUALITY_MODEL
        if not path.exists():
            quality_training.train_on_sources(step, documents, path)
        return dataclasses.replace(step, model=str(path))

    def _near_duplicates(self, signed: str) -> Path:
        """Finds near duplicates; returns the folder that says which documents go."""
        step = self.steps.minhash
        pairs, removal = self._folder("minhash_buckets", "pairs"), self._folder("cluster", "remove")
        signatures = self._folder(signed, "signatures")
        for leftover in signatures.rglob(".*.tmp"):  # of a killed task; datatrove reads every file
            leftover.unlink(missing_ok=True)
        buckets = MinhashDedupBuckets(
            str(signatures),
            str(pairs),
            config=minhash.datatrove_config(step),
            only_dedup_in_index=False,
            lines_to_buffer=4_096,
        )
        self.runner.run("minhash_buckets", [buckets], step.buckets)
        sources = tuple(task[0].source for task in self.tasks)
        cluster = minhash.Cluster(pairs, removal, sources, step.across_sources)
        self.runner.run("cluster", [cluster], 1)
        return removal

    def _tokenizer(self, placement: Placement) -> TokenizerConfig:
        """The tokenizer, trained now where the config asks for it."""
        size = self.corpus.tokenizer.train_vocab_size
        if not size:
            return self.corpus.tokenizer
        path = self.output / TOKENIZER
        if not path.exists():
            train_on_documents(placement, self._selected(), path, size)
        return TokenizerConfig(path=str(path))

    def _stores(self, placement: Placement, tokenizer: TokenizerConfig) -> None:
        documents, tally = self._selected(), Tally()
        folder = self._folder("tokenise", "pieces")
        pipeline = [
            StageReader(documents, self._folder("tokenise", "progress")),
            Tokenise(placement, tokenizer, folder, tally),
            SaveTally(tally, self._folder("tokenise", "tally")),
        ]
        self.runner.run("tokenise", pipeline, len(self.tasks), self._sizes(documents))
        provenance = {
            "sources": {name: s.path or s.builtin for name, s in self.corpus.sources.items()},
            "steps": to_dict(self.steps),
            "seed": self.corpus.seed,
            "heldout_fraction": self.corpus.heldout_fraction,
            "framing": load_tokenizer(tokenizer).framing(),
            "datatrove": importlib.metadata.version("datatrove"),
        }
        write = WriteStores(self.corpus, tokenizer, folder, self.output / "stores", provenance)
        self.runner.run("stores", [write], len(write.targets))

    def _finish(self, placement: Placement, tokenizer: TokenizerConfig) -> Statistics:
        rows = [row for stage in STAGES for row in load_all(self._folder(stage, "tally"))]
        tally = merge(rows, self.corpus.samples)
        stores = finished_stores(self.corpus, self.output / "stores")
        statistics = collect(self.corpus, tally, stores, tokenizer, placement.bucket_bounds)
        write_bad_records(self.output / BAD_RECORDS, tally.bad_records)
        if self._selected() != self.output / DOCUMENTS:
            self._selected().rename(self.output / DOCUMENTS)
        statistics.save(self.output / STATISTICS)
        shutil.rmtree(self.work)
        missing = [name for name in store_names(self.corpus) if name not in stores]
        for name in missing:
            info(f"data: nothing is left for {name}")
        return statistics


def _essential(corpus: CorpusConfig) -> dict[str, Any]:
    """What of the config decides what comes out."""
    plain = to_dict(corpus)
    for key in ("name", "output", "executor", "stages", "plan"):
        del plain[key]
    return plain


def _file_sums(corpus: CorpusConfig) -> dict[str, str]:
    """Checksums of the files besides the text that decide what comes out."""
    steps, out = corpus.steps, {}
    named = {"language.model": steps.language.model if steps.language.enabled else ""}
    if steps.lists.enabled:
        for key in ("blocked_words", "blocked_domains", "blocked_url_words"):
            named[f"lists.{key}"] = getattr(steps.lists, key)
    if steps.decontamination.enabled:
        named["decontamination.path"] = steps.decontamination.path
    if steps.quality.enabled:
        named["quality.model"] = steps.quality.model
    for key, name in named.items():
        path = Path(name)
        if name and path.is_file():
            out[key] = files.sha256_file(path)
        elif name and path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            out |= {f"{key}/{f.relative_to(path)}": files.sha256_file(f) for f in inside}
    if not corpus.tokenizer.train_vocab_size:
        out["tokenizer"] = load_tokenizer(corpus.tokenizer).fingerprint
    return out


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two plans, in words; '' for nothing."""
    if before["version"] != now["version"]:
        return "version of this program"
    old, new = _flat(before["config"]), _flat(now["config"])
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if keys:
        return f"config.{keys[0]} ({old.get(keys[0])!r}, now {new.get(keys[0])!r})"
    for key in sorted(before["files"].keys() | now["files"].keys()):
        if before["files"].get(key) != now["files"].get(key):
            return f"file of {key}"
    for name, versions in now["installed"].items():
        if before["installed"].get(name) != versions:
            return f"set of installed packages, which source {name!r} is text of"
    was, now_is = ({row[1]: row[2] for row in plan["inputs"]} for plan in (before, now))
    for path in sorted(was.keys() | now_is.keys()):
        if was.get(path) != now_is.get(path):
            return f"set of input files ({path} is new, gone or of another size)"
    return ""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        out = {}
        for key, item in value.items():
            out |= _flat(item, f"{prefix}.{key}" if prefix else key)
        return out
    return {prefix: value}
