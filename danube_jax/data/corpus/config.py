"""Configuration of the corpus pipeline: sources, steps, tokenizer, stages, executor.

A file in `configs/data/` defines ``get_config()``; it starts from `corpus_config()`, a ConfigDict
with every default, and adds `text_source(...)` rows. Every step has `enabled` and its thresholds;
zero switches a single rule off. What is not named here is not done to the text.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import ml_collections

from danube_jax.config import (
    BUILTIN_SOURCES,
    TokenizerConfig,
    build_dataclass,
    config_dict_of,
)
from danube_jax.errors import UserError

FORMATS = ("auto", "jsonl", "parquet", "text")
ON_BAD_RECORD = ("stop", "skip")
NORMAL_FORMS = ("", "NFC", "NFKC")
UNITS = ("line", "paragraph")
DECONTAMINATION_ACTIONS = ("drop", "cut")
EXECUTORS = ("local", "slurm", "ray")


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Documents of one kind; the order of the sources is their rank in deduplication."""

    path: str = ""  # file, folder or glob; local or any fsspec address
    builtin: str = ""  # instead of a path: text that every installation carries
    format: str = "auto"  # by the file's name, or 'jsonl', 'parquet', 'text'
    text_column: str = "text"
    id_column: str = ""  # '': file and line
    url_column: str = ""  # '': no address, and no check of addresses
    separator: str = ""  # plain text: what stands between documents; '': a file is a document


@dataclasses.dataclass(frozen=True)
class UnicodeStep:
    """Repair of mis-decoded text (ftfy), normal form, line ends, control characters."""

    enabled: bool = True
    fix_encoding: bool = True
    unescape_html: bool = False
    normal_form: str = "NFC"


@dataclasses.dataclass(frozen=True)
class ListStep:
    """Word and address lists of the user's: files with an entry a line, '#' for comments."""

    enabled: bool = False
    blocked_words: str = ""  # a document with one of them goes
    blocked_domains: str = ""  # a host or any host below it
    blocked_url_words: str = ""


@dataclasses.dataclass(frozen=True)
class LanguageStep:
    """Language identification; documents in no wanted language go."""

    enabled: bool = True
    languages: tuple[str, ...] = ("en",)
    min_score: float = 0.65
    model: str = ""  # a fastText file; '': the model inside py3langid
    sample_characters: int = 2_000  # from the beginning and the middle of a document


@dataclasses.dataclass(frozen=True)
class C4Step:
    """Line and page rules of C4 (Raffel et al. 2020, section 2.2)."""

    enabled: bool = False
    terminal_punctuation: bool = True
    min_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1_000
    drop_citations: bool = True
    drop_javascript: bool = True
    drop_policy: bool = True
    refuse_lorem_ipsum: bool = True
    refuse_curly_bracket: bool = True


@dataclasses.dataclass(frozen=True)
class GopherRepetitionStep:
    """Repetition rules of Gopher (Rae et al. 2021, table A1): largest shares that may repeat."""

    enabled: bool = True
    duplicate_lines: float = 0.30
    duplicate_paragraphs: float = 0.30
    duplicate_line_characters: float = 0.20
    duplicate_paragraph_characters: float = 0.20
    top_2_gram: float = 0.20
    top_3_gram: float = 0.18
    top_4_gram: float = 0.16
    duplicate_5_gram: float = 0.15
    duplicate_6_gram: float = 0.14
    duplicate_7_gram: float = 0.13
    duplicate_8_gram: float = 0.12
    duplicate_9_gram: float = 0.11
    duplicate_10_gram: float = 0.10


@dataclasses.dataclass(frozen=True)
class GopherQualityStep:
    """Quality rules of Gopher (Rae et al. 2021, appendix A)."""

    enabled: bool = True
    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2


@dataclasses.dataclass(frozen=True)
class FineWebStep:
    """Line rules of FineWeb (Penedo et al. 2024, section 3.5)."""

    enabled: bool = True
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line_characters: int = 30
    max_duplicate_characters: float = 0.01
    max_newlines_per_word: float = 0.3


@dataclasses.dataclass(frozen=True)
class MaskingStep:
    """E-mail and IP addresses are replaced by addresses reserved for documentation."""

    enabled: bool = True
    emails: bool = True
    ip_addresses: bool = True
    only_public_ip_addresses: bool = True
    email_replacement: str = "email@example.com"
    ipv4_replacement: str = "192.0.2.1"
    ipv6_replacement: str = "2001:db8::1"


@dataclasses.dataclass(frozen=True)
class DecontaminationStep:
    """Removal of text that evaluation sets hold, by runs of words (Brown et al. 2020, app. C)."""

    enabled: bool = False
    path: str = ""  # folder of the evaluation sets: JSONL, parquet or text
    columns: tuple[str, ...] = ()  # (): every string of a row
    ngram_words: int = 13
    min_words: int = 8  # a shorter text of a set is looked for whole, down to this many words
    action: str = "drop"  # the document, or 'cut' the passage out of it
    cut_characters: int = 200  # around the passage
    min_document_characters: int = 200  # what cutting leaves must be longer


@dataclasses.dataclass(frozen=True)
class ExactStep:
    """Exact deduplication: the first of equal documents stays, letter case and spaces apart."""

    enabled: bool = True


@dataclasses.dataclass(frozen=True)
class RepeatedTextStep:
    """Deduplication of lines or paragraphs over the whole corpus: the first occurrence stays."""

    enabled: bool = False
    unit: str = "paragraph"
    min_characters: int = 60  # shorter ones, such as headings, may repeat
    min_document_characters: int = 200  # a document left shorter goes


@dataclasses.dataclass(frozen=True)
class MinHashStep:
    """Near-deduplication by MinHash (Broder 1997) with locality-sensitive hashing.

    Two documents of Jaccard similarity s share a bucket with probability 1 - (1 - s^h)^b; the
    default turns from 'hardly' to 'nearly always' at s = 0.72.
    """

    enabled: bool = True
    ngram_words: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8
    seed: int = 1
    across_sources: bool = True


@dataclasses.dataclass(frozen=True)
class QualityStep:
    """A quality model's score for every document, and what follows from it."""

    enabled: bool = False
    model: str = ""  # a file of tools/train_quality_model.py, or a folder of a classifier
    good_sources: tuple[str, ...] = ()  # or train one here: on documents of these sources ...
    bad_sources: tuple[str, ...] = ()  # ... against those of these (Brown et al. 2020, app. A)
    train_documents: int = 2_000  # of each kind, at most
    label: int = -1  # a classifier's class whose probability counts; -1: the last
    batch_size: int = 32
    max_tokens: int = 512  # a classifier reads a document's beginning
    min_score: float = 0.0  # documents below go
    buckets: tuple[str, ...] = ()  # names, best first; (): sources are not divided
    thresholds: tuple[float, ...] = ()  # falling lower bounds of all buckets but the last
    shares: tuple[float, ...] = ()  # or the documents' shares of all buckets but the last


@dataclasses.dataclass(frozen=True)
class StepsConfig:
    """The steps, in the order in which they are done."""

    unicode: UnicodeStep = UnicodeStep()
    lists: ListStep = ListStep()
    language: LanguageStep = LanguageStep()
    c4: C4Step = C4Step()
    gopher_repetition: GopherRepetitionStep = GopherRepetitionStep()
    gopher_quality: GopherQualityStep = GopherQualityStep()
    fineweb: FineWebStep = FineWebStep()
    masking: MaskingStep = MaskingStep()
    decontamination: DecontaminationStep = DecontaminationStep()
    exact: ExactStep = ExactStep()
    repeated_text: RepeatedTextStep = RepeatedTextStep()
    minhash: MinHashStep = MinHashStep()
    quality: QualityStep = QualityStep()


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
    """Who does the work; what comes out depends on none of this."""

    kind: str = "local"
    workers: int = 0  # processes or jobs at a time; 0: one a core
    time: str = "12:00:00"  # Slurm: limit of a job
    partition: str = ""  # Slurm
    memory_gb: int = 4  # Slurm, Ray: a task
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)  # Slurm: sbatch options


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A wished stage of training, which tools/plan_stages.py turns into a phase."""

    name: str = ""
    tokens: int = 0
    context_length: int = 0
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What tools/plan_stages.py needs beside the stores."""

    batch_tokens: int = 1_179_648
    max_epochs: float = 4.0  # repetition beyond which more text is worth more (Muennighoff 2023)
    source_max_epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """A whole preparation, from raw files to token stores."""

    name: str = "corpus"
    output: str = ""  # folder, on a file system that all workers share
    sources: Mapping[str, TextSource] = dataclasses.field(default_factory=dict)
    on_bad_record: str = "stop"
    max_document_bytes: int = 20_000_000  # a longer one is a bad record
    task_bytes: int = 64_000_000  # of input a task; files of a task are read by one worker
    steps: StepsConfig = StepsConfig()
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    heldout_fraction: float = 0.01  # of the documents, by hash
    min_heldout_documents: int = 16  # of a store, where that is no more than a tenth of it
    seed: int = 0  # of the documents' order
    shard_tokens: int = 2**27
    keep_removed: bool = False  # write removed documents too
    samples: int = 5  # documents shown a reason
    executor: ExecutorConfig = ExecutorConfig()
    stages: tuple[StageConfig, ...] = ()
    plan: PlanConfig = PlanConfig()


def corpus_config() -> ml_collections.ConfigDict:
    """Every default of `CorpusConfig` as a locked, type-safe ConfigDict."""
    return config_dict_of(CorpusConfig())


def text_source(**values: Any) -> ml_collections.ConfigDict:
    """A row of `sources`, with every default."""
    return config_dict_of(TextSource(), **values)


def stage(**values: Any) -> ml_collections.ConfigDict:
    """A row of `stages`, with every default."""
    return config_dict_of(StageConfig(), **values)


def parse_corpus_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> CorpusConfig:
    """Builds and validates a `CorpusConfig`.

    Raises:
      UserError: unknown key, wrong type or impossible value; names the key in full.
    """
    corpus = build_dataclass(CorpusConfig, config, "config")
    _validate(corpus)
    return corpus


def _require(fine: bool, key: str, value: Any, expected: str) -> None:
    if not fine:
        raise UserError(f"config.{key}: {value!r} is not possible; expected {expected}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"one of {', '.join(map(repr, choices))}")


def _validate(corpus: CorpusConfig) -> None:
    _require(bool(corpus.output), "output", "", "a folder")
    _require("://" not in corpus.output, "output", corpus.output, "a folder of a file system")
    _require(bool(corpus.sources), "sources", {}, "at least one source")
    for name, source in corpus.sources.items():
        _validate_source(name, source)
    _choice("on_bad_record", corpus.on_bad_record, ON_BAD_RECORD)
    for key in ("max_document_bytes", "task_bytes", "shard_tokens"):
        _require(getattr(corpus, key) > 0, key, getattr(corpus, key), "a positive number")
    _require(corpus.samples >= 0, "samples", corpus.samples, "zero or a positive number")
    fraction = corpus.heldout_fraction
    _require(0 <= fraction < 1, "heldout_fraction", fraction, "a number from 0 up to 1")
    least = corpus.min_heldout_documents
    _require(least >= 0, "min_heldout_documents", least, "zero or a positive number")
    chosen = [k for k in ("path", "builtin", "train_vocab_size") if getattr(corpus.tokenizer, k)]
    _require(
        len(chosen) == 1,
        "tokenizer",
        ", ".join(chosen) or "nothing set",
        "exactly one of path, builtin and train_vocab_size",
    )
    _choice("executor.kind", corpus.executor.kind, EXECUTORS)
    workers = corpus.executor.workers
    _require(workers >= 0, "executor.workers", workers, "zero or a positive number")
    if corpus.executor.kind == "slurm":
        _require(bool(corpus.executor.partition), "executor.partition", "", "a Slurm partition")
    _validate_steps(corpus.steps)
    quality = corpus.steps.quality
    for field in ("good_sources", "bad_sources"):
        for name in getattr(quality, field):
            known = ", ".join(corpus.sources)
            _require(name in corpus.sources, f"steps.quality.{field}", name, f"some of {known}")
    buckets = quality.buckets or ("",)
    names = [f"{source}_{bucket}" for source in corpus.sources for bucket in buckets]
    _require(
        len(set(names)) == len(names),
        "steps.quality.buckets",
        buckets,
        "names that give every store one of its own",
    )
    for i, row in enumerate(corpus.stages):
        key = f"stages[{i}]"
        _require(bool(row.name), f"{key}.name", row.name, "a name")
        for field in ("tokens", "context_length"):
            value = getattr(row, field)
            _require(value > 0, f"{key}.{field}", value, "a positive number")
        weights = row.mixture
        _require(bool(weights), f"{key}.mixture", {}, "source names and weights")
        fine = all(weight >= 0 for weight in weights.values()) and sum(weights.values()) > 0
        _require(fine, f"{key}.mixture", dict(weights), "weights of zero or more, not all zero")


def _validate_source(name: str, source: TextSource) -> None:
    key = f"sources.{name}"
    _require(
        name.replace("_", "").replace("-", "").isalnum(),
        key,
        name,
        "a name of letters, digits, '-' and '_', since it names folders",
    )
    _require(
        bool(source.path) != bool(source.builtin),
        f"{key}.path",
        source.path,
        "exactly one of path and builtin",
    )
    if source.builtin:
        _choice(f"{key}.builtin", source.builtin, BUILTIN_SOURCES)
    _choice(f"{key}.format", source.format, FORMATS)


def _validate_steps(steps: StepsConfig) -> None:
    _choice("steps.unicode.normal_form", steps.unicode.normal_form, NORMAL_FORMS)
    _choice("steps.repeated_text.unit", steps.repeated_text.unit, UNITS)
    decontamination = steps.decontamination
    _choice("steps.decontamination.action", decontamination.action, DECONTAMINATION_ACTIONS)
    if decontamination.enabled:
        key = "steps.decontamination"
        _require(bool(decontamination.path), f"{key}.path", "", "the evaluation sets' folder")
        n, low = decontamination.ngram_words, decontamination.min_words
        _require(0 < low <= n, f"{key}.min_words", low, f"a number from 1 to ngram_words ({n})")
    minhash = steps.minhash
    for field in ("ngram_words", "buckets", "hashes_per_bucket"):
        value = getattr(minhash, field)
        _require(value > 0, f"steps.minhash.{field}", value, "a positive number")
    _validate_quality(steps.quality)


def _validate_quality(quality: QualityStep) -> None:
    key = "steps.quality"
    if quality.enabled:
        trained = bool(quality.good_sources) and bool(quality.bad_sources)
        none = not quality.good_sources and not quality.bad_sources
        _require(
            bool(quality.model) != trained and (trained or none),
            f"{key}.model",
            quality.model,
            "a model, or good_sources and bad_sources to train one on",
        )
    least = 10
    count = quality.train_documents
    _require(count >= least, f"{key}.train_documents", count, f"at least {least}")
    _require(quality.batch_size > 0, f"{key}.batch_size", quality.batch_size, "a positive number")
    given = [name for name in ("thresholds", "shares") if getattr(quality, name)]
    if not quality.buckets:
        _require(not given, f"{key}.buckets", (), f"names, since {' and '.join(given)} are given")
        return
    _require(len(given) == 1, key, given, "exactly one of thresholds and shares with buckets")
    values = getattr(quality, given[0])
    _require(
        len(values) == len(quality.buckets) - 1,
        f"{key}.{given[0]}",
        values,
        f"{len(quality.buckets) - 1} numbers for {len(quality.buckets)} buckets",
    )
    if given[0] == "thresholds":
        falling = all(a > b for a, b in itertools.pairwise(values))
        _require(falling, f"{key}.thresholds", values, "falling numbers, the best bucket first")
    else:
        fine = all(v > 0 for v in values) and sum(values) < 1
        _require(fine, f"{key}.shares", values, "positive shares that sum to less than 1")
