"""Reads a run's folder: what is there, and in words what is not."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from danube_jax.config import RunConfig, parse_config
from danube_jax.data.corpus.prepare import builtin_store
from danube_jax.data.phases import PhaseSchedule
from danube_jax.errors import UserError
from danube_jax.report.metric_rows import Metrics, Series, parse_json, read_metrics
from danube_jax.report.scores import MTBench, Results, read_mt_bench, read_results

CONFIG, METRICS, SAMPLES, CHECKPOINTS, EVALUATION = (
    "config.json",
    "metrics.jsonl",
    "samples",
    "checkpoints",
    "evaluation",
)
SAMPLE_SEPARATOR = "\n\n---\n\n"
MAX_SAMPLE_CHARACTERS = 4_000  # of one text; the rest is left out
FINAL_SHARE = 0.02  # of the logged steps, over whose last ones the final loss is the mean


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated at one step: a text a prompt, or one text where they cannot be told apart.

    `prompts` is as long as `texts`; '' where the prompt is not known.
    """

    step: int
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """What a run has left behind so far.

    Attributes:
      config: as saved, {} where it cannot be read; `run` the same, validated, or None.
      schedule: the run's phases, where `run` is known and has some (a tuning run has none).
      version: of danube_jax that wrote the config; '' where unknown.
      results: scores of lm-eval tasks, oldest step first; mt_bench likewise.
      problems: what is missing or damaged, one sentence each.
    """

    path: Path
    name: str
    version: str
    config: dict[str, Any]
    run: RunConfig | None
    schedule: PhaseSchedule | None
    metrics: Metrics
    samples: tuple[Sample, ...]
    results: tuple[Results, ...]
    mt_bench: tuple[MTBench, ...]
    checkpoints: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def tokens(self) -> float:
        """Tokens read so far, by the last logged step or evaluation."""
        curves = [*self.metrics.train.values(), *self.metrics.evaluation.values()]
        return max((float(series.tokens[-1]) for series in curves if len(series)), default=0.0)

    @property
    def planned_steps(self) -> int | None:
        """Steps of the run, or up to `training.max_steps`: as recorded, else as configured."""
        recorded = self.detail("last_step", int)
        if recorded is not None or self.run is None or self.schedule is None:
            return recorded
        return min(self.run.training.max_steps or 2**62, self.schedule.total_steps)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names, oldest first."""
        return [event for event in self.metrics.events if event.get("event") in names]

    def detail(self, key: str, kind: type) -> Any:
        """The newest value of `key` in any event that has one of this type, or None."""
        for event in reversed(self.metrics.events):
            if isinstance(event.get(key), kind):
                return event[key]
        return None

    def store_tokens(self, source: str) -> int | None:
        """Tokens of a source's training store, or None where it cannot be read from here."""
        row = self.run.data.sources.get(source) if self.run else None
        if row is None:
            return None
        prepared = builtin_store(Path(self.run.data.directory or self.path / "data"), source)
        store = (prepared / "train" if row.builtin else Path(row.path)) / "store.json"
        try:
            tokens = parse_json(store.read_text(encoding="utf-8"))["tokens"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return tokens if isinstance(tokens, int) else None

    @property
    def status(self) -> str:
        """'finished', 'diverged', 'stopped' or 'running' (or killed: the files cannot tell)."""
        names = ("start", "resume", "stopped", "diverged", "finished")
        last = next(iter(reversed(self.events(*names))), None)
        planned = self.planned_steps
        if planned is not None and self.metrics.last_step >= planned:
            return "finished"
        if last is None:
            return "running"
        return {"start": "running", "resume": "running"}.get(last["event"], last["event"])

    @property
    def clock(self) -> Series:
        """Seconds of training up to each logged step, as values.

        From the rates: compiling, evaluating and saving do not count.
        """
        rate = self.metrics.series("tokens_per_second")
        tokens = np.diff(np.r_[0.0, rate.tokens])
        good = np.isfinite(rate.values) & (rate.values > 0)
        seconds = np.cumsum(np.divide(tokens, rate.values, out=np.zeros(len(rate)), where=good))
        return Series(rate.steps, rate.tokens, seconds)

    @property
    def training_seconds(self) -> float | None:
        """Time of the logged steps; see `clock`."""
        clock = self.clock.values
        return float(clock[-1]) if clock.size else None

    @property
    def elapsed_seconds(self) -> float | None:
        """From the first start to the last event, pauses included."""
        times = [e["time"] for e in self.metrics.events if isinstance(e.get("time"), int | float)]
        return max(times) - min(times) if len(times) > 1 else None

    def final(self, key: str = "loss") -> tuple[float, int] | None:
        """Mean of the last finite values of a training curve, and how many they are."""
        return tail_mean(self.metrics.series(key))

    def last_heldout(self, prefix: str = "loss/") -> dict[str, float]:
        """Source → its last held-out value."""
        return {
            key.removeprefix(prefix): float(series.values[-1])
            for key, series in self.metrics.evaluation.items()
            if key.startswith(prefix) and len(series)
        }


def tail_mean(series: Series) -> tuple[float, int] | None:
    """Mean of the last 2 % of a series' finite values (five at least, where there are), and how
    many they are; None where there is none."""
    values = series.finite.values
    if not values.size:
        return None
    used = min(max(5, round(len(values) * FINAL_SHARE)), len(values))
    return float(values[-used:].mean()), used


def collect(workdir: Path) -> RunFolder:
    """Reads what `workdir` holds; what is missing or damaged is named in `problems`.

    Raises:
      UserError: it is not the folder of a run.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder; expected the folder of a run")
    if not any((workdir / name).is_file() for name in (CONFIG, METRICS)):
        raise UserError(
            f"--workdir={workdir}: holds neither {CONFIG} nor {METRICS}, so it is not the folder "
            "of a run; expected what was given to danube_jax.train as --workdir"
        )
    problems: list[str] = []
    saved, run = _read_config(workdir / CONFIG, problems)
    config = saved.get("config") if isinstance(saved.get("config"), dict) else {}
    metrics = read_metrics(workdir / METRICS)
    problems += metrics.problems
    name = config.get("name")
    return RunFolder(
        path=workdir,
        name=name if isinstance(name, str) and name else workdir.resolve().name,
        version=saved["danube_jax"] if isinstance(saved.get("danube_jax"), str) else "",
        config=config,
        run=run,
        schedule=PhaseSchedule.from_config(run) if run and run.phases else None,
        metrics=metrics,
        samples=tuple(_read_samples(workdir / SAMPLES, run, problems)),
        results=tuple(read_results(workdir / EVALUATION, problems)),
        mt_bench=tuple(read_mt_bench(workdir / EVALUATION, problems)),
        checkpoints=_checkpoint_steps(workdir / CHECKPOINTS),
        problems=tuple(problems),
    )


def _read_config(path: Path, problems: list[str]) -> tuple[dict[str, Any], RunConfig | None]:
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
            raise ValueError("not the config of a run")
    except FileNotFoundError:
        problems.append(f"{path.name} is not there, so phases, mix and model are not known")
        return {}, None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"{path.name} cannot be read ({reason}), so phases and mix are not known")
        return {}, None
    try:
        return saved, parse_config(saved["config"])
    except UserError as error:
        problems.append(f"{path.name} is of another version ({error}): phases and mix are left out")
        return saved, None


def _read_samples(folder: Path, run: RunConfig | None, problems: list[str]) -> list[Sample]:
    samples = []
    prompts = run.samples.prompts if run else ()
    for path in sorted(folder.glob("step-*.txt")) if folder.is_dir() else ():
        number = re.fullmatch(r"step-(\d+)\.txt", path.name)
        if number is None:
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
        except OSError as error:
            problems.append(f"samples/{path.name} cannot be read: {error.strerror or error}")
            continue
        texts = text.split(SAMPLE_SEPARATOR)
        known = prompts
        if len(texts) != len(prompts):  # other prompts at the time, or a text with the separator
            texts, known = [text], ("",)
        cut = tuple(
            text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + " […]"
            for text in texts
        )
        known = tuple(
            prompt if text.startswith(prompt) else ""
            for prompt, text in zip(known, cut, strict=True)
        )
        samples.append(Sample(int(number[1]), known, cut))
    if not samples and prompts:
        problems.append("there are no samples yet")
    return sorted(samples, key=lambda sample: sample.step)


def _checkpoint_steps(folder: Path) -> tuple[int, ...]:
    if not folder.is_dir():
        return ()
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return tuple(sorted(int(name) for name in names if name.isdigit()))
