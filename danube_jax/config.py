"""Configuration: frozen dataclasses, the only place that knows defaults.

A file in `configs/` defines ``get_config()``; it starts from `base_config()`, an
`ml_collections.ConfigDict` that holds every default, changes what its run needs, and returns it.
`parse_config` turns that ConfigDict into a `RunConfig` and refuses an unknown key, a wrong type
or an impossible value with the key's full name, the value, and what would be valid.

Model fields carry Hugging Face's names, so that one vocabulary runs from config to export.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from danube_jax.errors import UserError

LINEAR_PRECISIONS = ("bfloat16", "float32")
COMPUTE_DTYPES = ("bfloat16", "float32")
ATTENTION_BACKENDS = ("auto", "xla", "blocked", "cudnn")
REMAT_POLICIES = ("none", "full", "dots", "attention")
VERIFY_MODES = ("auto", "always", "never")
MODEL_TYPES = ("mistral", "llama")
INIT_TAKES = ("weights", "weights_and_optimizer")
NEW_ROWS = ("init", "old_statistics")
BUILTIN_SOURCES = ("language_reference", "docstrings", "package_descriptions")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder, in the names of Hugging Face's `MistralConfig` and `LlamaConfig`."""

    model_type: str = "mistral"
    vocab_size: int = 32_000
    hidden_size: int = 2_560
    intermediate_size: int = 6_912
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 8_192
    sliding_window: int | None = None  # keys a query sees, itself included
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attention_backend: str = "auto"
    remat: str = "none"

    @property
    def head_size(self) -> int:
        """Size H of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes of the forward and backward pass; master parameters are always float32."""

    linear: str = "bfloat16"  # matmuls of the blocks
    compute: str = "bfloat16"  # activations, embeddings and head


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer: found, carried by a package, or trained on the sources.

    `path` is a SentencePiece `.model` file, a folder with tokenizer files (`tokenizer.model`, or
    what Hugging Face's AutoTokenizer reads), or a `tokenizer.json`.
    """

    path: str = ""
    builtin: str = ""  # 'mistral': the file inside mistral-common (extra 'mistral')
    train_vocab_size: int = 0  # > 0: train a BPE tokenizer of this size on the built-in sources


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text: a TokenStore on disk, or built-in text that is prepared at start."""

    path: str = ""  # folder of the training TokenStore
    heldout_path: str = ""  # folder of the held-out TokenStore; '' means none
    builtin: str = ""  # one of BUILTIN_SOURCES instead of paths
    max_epochs: float = 4.0  # more repetition than this is refused at start


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are read."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    directory: str = ""  # where built-in text is prepared; '' means WORKDIR/data
    heldout_fraction: float = 0.02  # of built-in documents, by hash
    mask_documents: bool = False
    verify: str = "auto"  # sha256 of the shards at start; auto: up to 8 GiB in all
    num_workers: int = 0  # Grain worker processes; 0 reads with threads
    prefetch: int = 4  # batches held ready


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One row of the run's table: a token budget, a context length and a mix."""

    name: str = ""
    tokens: int = 0
    context_length: int = 0
    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    batch_tokens: int | None = None  # None: training.batch_tokens


@dataclasses.dataclass(frozen=True)
class InitFromConfig:
    """Where a new run's weights come from; a run that resumes goes on from its own checkpoint."""

    path: str = ""  # a Hugging Face folder, a workdir (newest step) or one step; '': random
    take: str = "weights"  # or 'weights_and_optimizer' (AdamW's moments, from a workdir)
    model_from_source: bool = False  # the source's architecture goes before config.model
    change_tokenizer: bool = False  # rows of tokens in both vocabularies are kept, others are new
    new_rows: str = "init"  # as the model's init, or normal with 'old_statistics' a feature


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and one cosine over the run's tokens (Danube, section 4)."""

    learning_rate: float = 2e-4
    final_learning_rate: float = 1e-5
    warmup_tokens: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; norm scales are not decayed
    clip_norm: float = 1.0  # global norm; 0 switches clipping off


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Batch, loop and mesh."""

    batch_tokens: int = 1_179_648
    microbatch_tokens: int | None = None  # a device and micro-batch; None: no accumulation
    seed: int = 0
    zero1: bool = True  # shard master parameters and optimizer state over devices
    z_loss: float = 0.0
    loss_chunk_tokens: int = 8_192  # tokens whose logits are held at once; 0: all
    max_steps: int | None = None  # stop early; the schedule still spans the whole run
    log_every: int = 10
    max_skipped_steps: int = 20  # non-finite updates in a row before the run stops


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss per source, in nats a token and bits a byte."""

    every_steps: int = 0  # 0: only at the end of the run
    tokens_per_source: int = 1_000_000
    at_start: bool = False


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Text generated from fixed prompts after an evaluation."""

    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 40


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every_steps: int = 1_000
    keep_last: int = 2
    keep_every_steps: int = 0  # 0: none beyond the last
    asynchronous: bool = True
    allow_data_change: bool = False  # resume although the data fingerprint differs


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str = "run"
    model: ModelConfig = ModelConfig()
    init_from: InitFromConfig = InitFromConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    phases: tuple[PhaseConfig, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def base_config() -> ml_collections.ConfigDict:
    """Every default of `RunConfig` as a locked, type-safe ConfigDict for config files to change."""
    return _to_config_dict(RunConfig())


def source(**values: Any) -> ml_collections.ConfigDict:
    """A row of `data.sources`, with every default, so that each of its keys can be overridden."""
    return _row(SourceConfig(), values)


def phase(**values: Any) -> ml_collections.ConfigDict:
    """A row of `phases`, with every default, so that each of its keys can be overridden."""
    return _row(PhaseConfig(), values)


def _row(default: Any, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    row = _to_config_dict(default)
    for key, value in values.items():
        row[key] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    return row


def _to_config_dict(node: Any) -> ml_collections.ConfigDict:
    hints = typing.get_type_hints(type(node))
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        optional = _optional_type(hints[field.name])
        if dataclasses.is_dataclass(value):
            value = _to_config_dict(value)
        elif isinstance(value, Mapping):
            value = ml_collections.ConfigDict(value)
        elif optional is not None and value is None:
            value = ml_collections.config_dict.placeholder(optional)
        out[field.name] = value
    return out.lock()


def whole_steps(tokens: float, batch_tokens: int) -> int:
    """The number of tokens nearest to `tokens` that is a whole number of steps (at least one)."""
    return max(1, round(tokens / batch_tokens)) * batch_tokens


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree as plain dicts and lists, ready for JSON."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def parse_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """Builds and validates a `RunConfig`.

    Args:
      config: what a config file's ``get_config()`` returned, or the dict of a saved config.

    Raises:
      UserError: unknown key, wrong type or impossible value; names the key in full.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    run = _build(RunConfig, config, "config")
    _validate(run)
    return run


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Builds and validates a `ModelConfig` on its own; keys that are absent keep their default.

    Raises:
      UserError: unknown key, wrong type or impossible value; names the key in full.
    """
    model = _build(ModelConfig, values, "config.model")
    _validate_model(model)
    return model


def _optional_type(hint: Any) -> type | None:
    """`int` for ``int | None``, else None."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return None


def _build(hint: Any, value: Any, name: str) -> Any:
    """`value` as an instance of the annotated type `hint`."""
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, name)
    optional = _optional_type(hint)
    if optional is not None:
        return None if value is None else _build(optional, value, name)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _wrong_type(name, "a sequence", value)
        item_hint = typing.get_args(hint)[0]
        return tuple(_build(item_hint, v, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise _wrong_type(name, "a mapping", value)
        item_hint = typing.get_args(hint)[1]
        return {str(k): _build(item_hint, v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong_type(name, f"a value of type {hint.__name__}", value)
    if hint is float and not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value!r}")
    return value


def _build_dataclass(cls: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise _wrong_type(name, f"a mapping with the keys of {cls.__name__}", value)
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(
            f"{name}.{unknown[0]}: unknown key; valid keys here are {', '.join(sorted(hints))}"
        )
    return cls(**{key: _build(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _wrong_type(name: str, expected: str, value: Any) -> UserError:
    return UserError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{name}: {value!r} is not possible; expected {expected}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, f"one of {', '.join(choices)}")


def _validate(run: RunConfig) -> None:
    _validate_model(run.model)
    _require_choice("config.precision.linear", run.precision.linear, LINEAR_PRECISIONS)
    _require_choice("config.precision.compute", run.precision.compute, COMPUTE_DTYPES)
    _require(
        run.precision.compute == "float32" or run.precision.linear != "float32",
        "config.precision.linear",
        run.precision.linear,
        f"no wider dtype than precision.compute ({run.precision.compute})",
    )
    _validate_init_from(run.init_from)
    _validate_training(run)
    _validate_data(run.data)
    _validate_phases(run)


def _positive(section: str, node: Any, *keys: str, zero: bool = False) -> None:
    """Every named field of `node` is None or positive (or zero where `zero`)."""
    for key in keys:
        value = getattr(node, key)
        fine = value is None or value > 0 or (zero and value == 0)
        expected = "zero or a positive number" if zero else "a positive number"
        _require(fine, f"config.{section}.{key}", value, expected)


def _validate_model(model: ModelConfig) -> None:
    _require_choice("config.model.model_type", model.model_type, MODEL_TYPES)
    _require_choice("config.model.attention_backend", model.attention_backend, ATTENTION_BACKENDS)
    _require_choice("config.model.remat", model.remat, REMAT_POLICIES)
    _positive("model", model, "vocab_size", "hidden_size", "intermediate_size")
    _positive("model", model, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    _positive("model", model, "max_position_embeddings", "sliding_window", "rope_theta")
    _positive("model", model, "rms_norm_eps", "initializer_range", "head_dim")
    _require(
        model.num_attention_heads % model.num_key_value_heads == 0,
        "config.model.num_key_value_heads",
        model.num_key_value_heads,
        f"a divisor of num_attention_heads ({model.num_attention_heads})",
    )
    _require(
        model.head_dim is not None or model.hidden_size % model.num_attention_heads == 0,
        "config.model.num_attention_heads",
        model.num_attention_heads,
        f"a divisor of hidden_size ({model.hidden_size}), or an explicit head_dim",
    )
    _require(
        model.head_size % 2 == 0,
        "config.model.head_dim",
        model.head_size,
        "an even head size, since RoPE rotates pairs",
    )


def _validate_init_from(init_from: InitFromConfig) -> None:
    _require_choice("config.init_from.take", init_from.take, INIT_TAKES)
    _require_choice("config.init_from.new_rows", init_from.new_rows, NEW_ROWS)
    for key in ("model_from_source", "change_tokenizer"):
        _require(
            bool(init_from.path) or not getattr(init_from, key),
            f"config.init_from.{key}",
            True,
            "False, or config.init_from.path to say where from",
        )


def _validate_training(run: RunConfig) -> None:
    training, optimizer = run.training, run.optimizer
    _positive("training", training, "batch_tokens", "microbatch_tokens", "max_steps", "log_every")
    _positive("training", training, "max_skipped_steps")
    _positive("training", training, "seed", "z_loss", "loss_chunk_tokens", zero=True)
    _positive("optimizer", optimizer, "learning_rate", "eps")
    _positive("optimizer", optimizer, "warmup_tokens", "weight_decay", "clip_norm", zero=True)
    _positive("optimizer", optimizer, "final_learning_rate", zero=True)
    for key in ("b1", "b2"):
        value = getattr(optimizer, key)
        _require(0 <= value < 1, f"config.optimizer.{key}", value, "a number in [0, 1)")
    _require(
        optimizer.final_learning_rate <= optimizer.learning_rate,
        "config.optimizer.final_learning_rate",
        optimizer.final_learning_rate,
        f"at most learning_rate ({optimizer.learning_rate})",
    )
    _positive("evaluation", run.evaluation, "every_steps", zero=True)
    _positive("evaluation", run.evaluation, "tokens_per_source")
    _positive("checkpoint", run.checkpoint, "every_steps", "keep_last")
    _positive("checkpoint", run.checkpoint, "keep_every_steps", zero=True)
    _positive("samples", run.samples, "max_tokens")
    _positive("samples", run.samples, "temperature", "top_k", zero=True)


def _validate_data(data: DataConfig) -> None:
    _require_choice("config.data.verify", data.verify, VERIFY_MODES)
    _positive("data", data, "num_workers", zero=True)
    _positive("data", data, "prefetch")
    _require(
        0 < data.heldout_fraction < 1,
        "config.data.heldout_fraction",
        data.heldout_fraction,
        "a number between 0 and 1",
    )
    _require(bool(data.sources), "config.data.sources", {}, "at least one source")
    for name, source in data.sources.items():
        key = f"config.data.sources.{name}"
        if source.builtin:
            _require_choice(f"{key}.builtin", source.builtin, BUILTIN_SOURCES)
            _require(
                not source.path and not source.heldout_path,
                f"{key}.path",
                source.path or source.heldout_path,
                "no path beside builtin",
            )
        else:
            _require(bool(source.path), f"{key}.path", "", "the folder of a TokenStore")
        _require(source.max_epochs > 0, f"{key}.max_epochs", source.max_epochs, "a positive number")
    chosen = [
        key for key in ("path", "builtin", "train_vocab_size") if getattr(data.tokenizer, key)
    ]
    _require(
        len(chosen) == 1,
        "config.data.tokenizer",
        ", ".join(chosen) or "nothing set",
        "exactly one of path, builtin and train_vocab_size",
    )
    if data.tokenizer.builtin:
        _require_choice("config.data.tokenizer.builtin", data.tokenizer.builtin, ("mistral",))


def _validate_phases(run: RunConfig) -> None:
    _require(bool(run.phases), "config.phases", (), "at least one phase")
    longest = max(row.context_length for row in run.phases)
    for i, row in enumerate(run.phases):
        _validate_phase(run, row, f"config.phases[{i}]", longest)
    names = [row.name for row in run.phases]
    _require(len(set(names)) == len(names), "config.phases", names, "a different name a phase")


def _validate_phase(run: RunConfig, phase: PhaseConfig, key: str, longest: int) -> None:
    _require(bool(phase.name), f"{key}.name", phase.name, "a name")
    context, batch = phase.context_length, phase.batch_tokens or run.training.batch_tokens
    for field in ("tokens", "context_length", "batch_tokens"):
        value = getattr(phase, field)
        _require(value is None or value > 0, f"{key}.{field}", value, "a positive number")
    _require(
        context <= run.model.max_position_embeddings,
        f"{key}.context_length",
        context,
        f"at most model.max_position_embeddings ({run.model.max_position_embeddings})",
    )
    _require(
        longest % context == 0,
        f"{key}.context_length",
        context,
        f"a divisor of the longest context of the run ({longest})",
    )
    _require(
        batch % context == 0,
        f"{key}.batch_tokens",
        batch,
        f"a multiple of the context length, such as {max(1, round(batch / context)) * context}",
    )
    _require(
        phase.tokens % batch == 0,
        f"{key}.tokens",
        phase.tokens,
        f"a whole number of steps of {batch} tokens, such as {whole_steps(phase.tokens, batch)}",
    )
    _require(bool(phase.mixture), f"{key}.mixture", {}, "source names and weights")
    for source, weight in phase.mixture.items():
        _require(
            source in run.data.sources,
            f"{key}.mixture.{source}",
            weight,
            f"a source of config.data.sources ({', '.join(run.data.sources)})",
        )
        _require(weight >= 0, f"{key}.mixture.{source}", weight, "zero or a positive weight")
    _require(
        sum(phase.mixture.values()) > 0,
        f"{key}.mixture",
        dict(phase.mixture),
        "at least one positive weight",
    )


def build_dataclass(cls: type, value: Any, name: str) -> Any:
    """`value`, a mapping, as an instance of the dataclass `cls`; `name` begins the keys' names.

    Raises:
      UserError: unknown key or wrong type; names the key in full.
    """
    return _build(cls, value.to_dict() if hasattr(value, "to_dict") else value, name)


def config_dict_of(node: Any, **values: Any) -> ml_collections.ConfigDict:
    """A dataclass as a locked ConfigDict with all its defaults, some replaced by `values`."""
    return _row(node, values)
