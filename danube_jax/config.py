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

from danube_jax.config_validation import ATTENTION_BACKENDS as ATTENTION_BACKENDS
from danube_jax.config_validation import BUILTIN_SOURCES as BUILTIN_SOURCES
from danube_jax.config_validation import REMAT_POLICIES as REMAT_POLICIES
from danube_jax.config_validation import validate, validate_model
from danube_jax.config_validation import whole_steps as whole_steps
from danube_jax.errors import UserError


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
    scan_layers: bool = False  # training: compile one layer for all; slower, and needs more memory

    @property
    def head_size(self) -> int:
        """Size H of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """How the linear layers of the blocks are scaled, where they compute in FP8."""

    scaling: str = "delayed"  # by the steps before; 'current': by the tensor itself, slower
    amax_history: int = 16  # steps
    margin: float = 2.0  # between the largest magnitude seen and the largest number
    # Tensor cores may add up with fewer bits: output, input gradient, weight gradient.
    fast_accumulation: tuple[bool, ...] = (True, True, False)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes of the forward and backward pass; master parameters are always float32."""

    linear: str = "bfloat16"  # matmuls of the blocks
    compute: str = "bfloat16"  # activations, embeddings and head
    fp8: Fp8Config = Fp8Config()

    @property
    def fp8_config(self) -> Fp8Config | None:
        """`fp8` where the linear layers use it."""
        return self.fp8 if self.linear == "fp8" else None


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
    """One source: a TokenStore or, for tuning, a file or folder of rows; or built-in data."""

    path: str = ""  # folder of the training TokenStore; rows to tune on
    heldout_path: str = ""  # the held-out TokenStore or rows; '' means none, or a share of the rows
    builtin: str = ""  # instead of paths: one of BUILTIN_SOURCES, or of those of the objective
    max_epochs: float = 4.0  # of a TokenStore: more repetition than this is refused at start
    format: str = "auto"  # of rows: see data/conversations.py and data/preferences.py
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name → the file's
    language: str = ""  # of message trees: which to keep; '' keeps all
    max_examples: int | None = None  # of rows: how many good ones to take, from the first on


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are read."""

    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    tokenizer: TokenizerConfig = TokenizerConfig()
    directory: str = ""  # where built-in text is prepared; '' means WORKDIR/data
    heldout_fraction: float = 0.02  # of built-in documents or of rows, by hash
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
class RoundConfig:
    """One row of a tuning run's table; each round goes on from the result of the one before."""

    name: str = ""
    sources: tuple[str, ...] = ()  # of data.sources, all of their examples
    epochs: float = 1.0
    context_length: int = 0  # tokens of a row; a preference's two answers share one
    batch_size: int = 0  # rows a step
    learning_rate: float | None = None  # None: optimizer.learning_rate


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations become tokens; tuning only."""

    template: str = ""  # danube, danube2, danube3 or a Jinja file; '': the tokenizer's, else danube
    system_text: str = "keep"  # or 'drop', or 'merge' into the question, for templates without one
    tokenization: str = "joint"  # or 'separate': prompts and answers each on their own
    mask_prompt: bool = True  # train on answers only
    max_length: int | None = None  # tokens of an example; None: what fits a row
    truncation: str = "drop"  # of longer ones: 'drop', or cut at the 'left' or 'right' end
    packing: str = "best_fit"  # several examples in a row; 'none': one
    on_bad_row: str = "stop"  # or 'skip', with a count


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of the weights themselves, in PEFT's terms; tuning only."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    rslora: bool = False


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation (arXiv 2305.18290); see training/preference_loss.py."""

    beta: float = 0.1
    loss: str = "sigmoid"  # or 'ipo'
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round; sigmoid only
    average_log_probs: bool = False  # a token instead of a sum: for IPO, as its authors' results
    reference: str = "model"  # at every step from the weights it began with; 'cache': once


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
    warmup_fraction: float = 0.0  # of the run; the longer of the two counts
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
    max_skipped_steps: int = 20  # skipped updates in a row before the run stops
    spike_guard: float = 0.0  # skip a step so many standard deviations above the last; 0: never
    spike_guard_window: int = 128  # steps that these are taken over


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss per source, in nats a token and bits a byte."""

    every_steps: int = 0  # 0: only at the end of the run
    tokens_per_source: int = 1_000_000
    at_start: bool = False


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """Benchmarks while training (extra 'eval'); `python -m danube_jax.evaluate` has the same."""

    tasks: str = ""  # a preset (leaderboard, danube) or lm-eval's tasks, with commas; '': none
    every_steps: int = 0  # 0: only at the end of the run
    limit: int | None = 100  # documents a task; None: all
    num_fewshot: int | None = None  # None: each task's own
    chat: bool = False  # prompts in the tokenizer's chat format
    local_data: str = ""  # folder of JSONL files in place of downloads
    include_path: str = ""  # folder of further task YAML files


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
    """A whole run: `phases` say what is pretrained on, `rounds` what is tuned on."""

    name: str = "run"
    objective: str = "pretrain"  # 'sft': on conversations, 'dpo': on preferences
    model: ModelConfig = ModelConfig()
    init_from: InitFromConfig = InitFromConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    phases: tuple[PhaseConfig, ...] = ()
    rounds: tuple[RoundConfig, ...] = ()
    chat: ChatConfig = ChatConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    evals: EvalsConfig = EvalsConfig()
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


def tuning_round(**values: Any) -> ml_collections.ConfigDict:
    """A row of `rounds`, with every default, so that each of its keys can be overridden."""
    return _row(RoundConfig(), values)


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
    validate(run)
    return run


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Builds and validates a `ModelConfig` on its own; keys that are absent keep their default.

    Raises:
      UserError: unknown key, wrong type or impossible value; names the key in full.
    """
    model = _build(ModelConfig, values, "config.model")
    validate_model(model)
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


def build_dataclass(cls: type, value: Any, name: str) -> Any:
    """`value`, a mapping, as an instance of the dataclass `cls`; `name` begins the keys' names.

    Raises:
      UserError: unknown key or wrong type; names the key in full.
    """
    return _build(cls, value.to_dict() if hasattr(value, "to_dict") else value, name)


def config_dict_of(node: Any, **values: Any) -> ml_collections.ConfigDict:
    """A dataclass as a locked ConfigDict with all its defaults, some replaced by `values`."""
    return _row(node, values)
