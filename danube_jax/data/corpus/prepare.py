"""Built-in text through the corpus pipeline, for a run that names it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from danube_jax.config import BUILTIN_SOURCES, RunConfig, to_dict
from danube_jax.console import info, warn
from danube_jax.data.corpus.config import corpus_config, parse_corpus_config, text_source
from danube_jax.data.tokenizer import load_tokenizer
from danube_jax.errors import UserError

BUCKETS = ("high", "low")
PARTS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Where a run's data is.

    Attributes:
      train: source name → folder of its training store.
      heldout: source name → folder of its held-out store, for sources that have one.
      tokenizer: the tokenizer's file or folder.
    """

    train: Mapping[str, str]
    heldout: Mapping[str, str]
    tokenizer: str


def builtin_corpus_config(sources: Mapping[str, str]) -> ml_collections.ConfigDict:
    """The steps for built-in text: documents of a few sentences that are mostly clean.

    Where the language reference is among the sources, a quality model is trained on it against
    the others, and the tenth that is least like it goes into stores of its own (`SOURCE_low`).

    Args:
      sources: name → one of `danube_jax.config.BUILTIN_SOURCES`.
    """
    config = corpus_config()
    # The better source keeps a text that two have.
    ranked = sorted(sources, key=lambda name: BUILTIN_SOURCES.index(sources[name]))
    config.sources = {name: text_source(builtin=sources[name]) for name in ranked}
    steps = config.steps
    steps.language.min_score = 0.5  # names of functions are no English
    steps.language.sample_characters = 400
    # In one or two sentences, the commonest run of words is a large part although it stands once.
    for n in (2, 3, 4):
        steps.gopher_repetition[f"top_{n}_gram"] = 0.0
    for n in range(5, 11):
        steps.gopher_repetition[f"duplicate_{n}_gram"] = 0.25
    steps.gopher_quality.min_words = 12
    steps.gopher_quality.min_alphabetic_words = 0.65
    steps.gopher_quality.min_stop_words = 1
    steps.fineweb.max_duplicate_characters = 0.1
    steps.repeated_text.enabled = True
    steps.repeated_text.min_document_characters = 80
    # Packages copy documentation from each other and change it: half as alike is alike enough.
    steps.minhash.ngram_words = 4
    steps.minhash.buckets = 16
    steps.minhash.hashes_per_bucket = 4
    good = tuple(name for name in ranked if sources[name] == "language_reference")
    bad = tuple(name for name in ranked if name not in good)
    if good and bad:
        steps.quality.enabled = True
        steps.quality.good_sources, steps.quality.bad_sources = good, bad
        steps.quality.buckets, steps.quality.shares = BUCKETS, (0.9,)
    return config


def prepare_builtin(run: RunConfig, directory: str | Path) -> PreparedData:
    """Makes token stores of the run's built-in sources; sources with paths are passed through.

    A second call finds everything done; after a killed one it goes on where that stopped.

    Args:
      run: the config.
      directory: folder of the prepared data, as `pipeline.prepare` leaves it.

    Raises:
      UserError: the directory holds data of other settings, or there is nothing to train a
        tokenizer on.
    """
    directory = Path(directory)
    chosen = {name: source.builtin for name, source in run.data.sources.items() if source.builtin}
    repeated = [kind for kind in set(chosen.values()) if [*chosen.values()].count(kind) > 1]
    if repeated:
        raise UserError(
            f"config.data.sources: built-in text {repeated[0]!r} is used by more than one source; "
            "expected one, or its held-out part would be trained on"
        )
    vocab_size = run.data.tokenizer.train_vocab_size
    if vocab_size and not chosen:
        raise UserError(
            "config.data.tokenizer.train_vocab_size: there is no built-in source to train on; "
            "expected tokenizer.path or tokenizer.builtin"
        )
    tokenizer = None if vocab_size else load_tokenizer(run.data.tokenizer)
    given = run.data.sources
    train = {name: row.path for name, row in given.items() if not row.builtin}
    heldout = {name: row.heldout_path for name, row in given.items() if row.heldout_path}
    if chosen:
        if tokenizer is not None:
            tokenizer.framing()  # refuses a tokenizer that cannot tell documents apart
        stores = _prepare(run, directory, chosen)
        train |= {name: parts["train"] for name, parts in stores.items()}
        heldout |= {name: p["heldout"] for name, p in stores.items() if "heldout" in p}
    model = directory / "tokenizer.model" if tokenizer is None else tokenizer.path
    order = list(given)
    return PreparedData(
        {name: train[name] for name in order},
        {name: heldout[name] for name in order if name in heldout},
        str(model),
    )


def _prepare(
    run: RunConfig, directory: Path, chosen: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Source → part → folder of its store, after the pipeline."""
    # datatrove and what comes with it are only loaded where they are needed.
    from danube_jax.data.corpus import pipeline
    from danube_jax.data.corpus.html import write_page

    config = builtin_corpus_config(chosen)
    config.name, config.output = run.name, str(directory)
    config.tokenizer.update(to_dict(run.data.tokenizer))
    config.heldout_fraction = run.data.heldout_fraction
    config.executor.workers = 1  # in this process: others would load all that a run has loaded
    quality = config.steps.quality
    if quality.enabled and not _scored(directory):
        quality.enabled = False
        quality.good_sources = quality.bad_sources = quality.buckets = quality.shares = ()
    try:
        statistics = pipeline.prepare(parse_corpus_config(config))
    except UserError as error:  # of a run, it is another key that names the folder
        raise UserError(str(error).replace("config.output", "config.data.directory")) from None
    page = directory / "report.html"
    if not page.exists():
        write_page(statistics, page)
        rows = statistics.values["stores"]
        for name, parts in rows.items():
            for part, row in parts.items():
                info(
                    f"  {name}/{part}: {row['documents']:,} documents, {row['bytes'] / 1e6:.2f} "
                    f"MB, {row['tokens']:,} tokens, {row['bytes'] / row['tokens']:.2f} bytes a "
                    "token"
                )
        info(f"data: prepared in {directory}; {page} shows what each step did")
    found = {}
    for name in chosen:
        folder = builtin_store(directory, name)
        if not (folder / "train").is_dir():
            raise UserError(
                f"config.data.sources.{name}: no text is left of {chosen[name]!r} after the steps; "
                f"{page} shows why"
            )
        found[name] = {part: str(folder / part) for part in PARTS if (folder / part).is_dir()}
    return found


def builtin_store(directory: Path, name: str) -> Path:
    """The folder that holds the stores of a source in prepared built-in text."""
    divided = directory / "stores" / f"{name}_{BUCKETS[0]}"
    return divided if divided.is_dir() else directory / "stores" / name


def _scored(directory: Path) -> bool:
    """Whether there are to be scores: as in what was begun, else where LightGBM can be loaded."""
    try:
        plan = json.loads((directory / "preparation.json").read_text(encoding="utf-8"))
        return bool(plan["config"]["steps"]["quality"]["enabled"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        import lightgbm  # noqa: F401
    except (ImportError, OSError) as error:  # its library needs the system's OpenMP
        reason = " ".join(str(error).split())
        warn(f"built-in text gets no quality scores, since LightGBM cannot be loaded ({reason})")
        return False
    return True
