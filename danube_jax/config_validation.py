"""What a config may hold: the choices of its fields, and the checks of `parse_config`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from danube_jax.errors import UserError

if TYPE_CHECKING:
    from danube_jax.config import InitFromConfig, ModelConfig, PhaseConfig, RoundConfig, RunConfig

OBJECTIVES = ("pretrain", "sft", "dpo")
LINEAR_PRECISIONS = ("fp8", "bfloat16", "float32")
FP8_SCALINGS = ("delayed", "current")
COMPUTE_DTYPES = ("bfloat16", "float32")
ATTENTION_BACKENDS = ("auto", "xla", "blocked", "cudnn")
REMAT_POLICIES = ("none", "full", "dots", "attention")
VERIFY_MODES = ("auto", "always", "never")
# Far beyond any model; what is larger is a mistake, or meant to fill the memory.
MOST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), 2**20),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), 2**20),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "sliding_window"), 2**27),
    "num_hidden_layers": 2**12,
}
MODEL_TYPES = ("mistral", "llama")
INIT_TAKES = ("weights", "weights_and_optimizer")
NEW_ROWS = ("init", "old_statistics")
BUILTIN_SOURCES = ("language_reference", "docstrings", "package_descriptions")
TUNING_SOURCES = {"sft": ("chat",), "dpo": ("preferences",)}
CHAT_CHOICES = {
    "system_text": ("keep", "drop", "merge"),
    "tokenization": ("joint", "separate"),
    "truncation": ("drop", "left", "right"),
    "packing": ("best_fit", "none"),
    "on_bad_row": ("stop", "skip"),
}
DPO_LOSSES = ("sigmoid", "ipo")
DPO_REFERENCES = ("model", "cache")


def whole_steps(tokens: float, batch_tokens: int) -> int:
    """The number of tokens nearest to `tokens` that is a whole number of steps (at least one)."""
    return max(1, round(tokens / batch_tokens)) * batch_tokens


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{name}: {value!r} is not possible; expected {expected}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, f"one of {', '.join(choices)}")


def validate(run: RunConfig) -> None:
    """Refuses a run that cannot be.

    Raises:
      UserError: names the key in full, its value, and what would be valid.
    """
    _require_choice("config.objective", run.objective, OBJECTIVES)
    validate_model(run.model)
    _require_choice("config.precision.linear", run.precision.linear, LINEAR_PRECISIONS)
    _require_choice("config.precision.compute", run.precision.compute, COMPUTE_DTYPES)
    _require(
        run.precision.compute == "float32" or run.precision.linear != "float32",
        "config.precision.linear",
        run.precision.linear,
        f"no wider dtype than precision.compute ({run.precision.compute})",
    )
    _validate_fp8(run)
    _validate_init_from(run.init_from)
    _validate_training(run)
    _validate_data(run)
    if run.objective == "pretrain":
        _validate_phases(run)
    else:
        _validate_tuning(run)


def _positive(section: str, node: Any, *keys: str, zero: bool = False) -> None:
    """Every named field of `node` is None or positive (or zero where `zero`)."""
    for key in keys:
        value = getattr(node, key)
        fine = value is None or 0 < value < math.inf or (zero and value == 0)
        expected = "zero or a positive number" if zero else "a positive number"
        _require(fine, f"config.{section}.{key}", value, expected)


def validate_model(model: ModelConfig) -> None:
    """Refuses a model that cannot be.

    Raises:
      UserError: names the key in full, its value, and what would be valid.
    """
    _require_choice("config.model.model_type", model.model_type, MODEL_TYPES)
    _require_choice("config.model.attention_backend", model.attention_backend, ATTENTION_BACKENDS)
    _require_choice("config.model.remat", model.remat, REMAT_POLICIES)
    _positive("model", model, "vocab_size", "hidden_size", "intermediate_size")
    _positive("model", model, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    _positive("model", model, "max_position_embeddings", "sliding_window", "rope_theta")
    _positive("model", model, "rms_norm_eps", "initializer_range", "head_dim")
    for key, most in MOST.items():
        value = getattr(model, key)
        _require(value is None or value <= most, f"config.model.{key}", value, f"at most {most:,}")
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


def _validate_fp8(run: RunConfig) -> None:
    config = run.precision.fp8
    _require_choice("config.precision.fp8.scaling", config.scaling, FP8_SCALINGS)
    _positive("precision.fp8", config, "amax_history")
    _require(config.margin >= 1, "config.precision.fp8.margin", config.margin, "at least 1")
    _require(
        len(config.fast_accumulation) == 3,
        "config.precision.fp8.fast_accumulation",
        config.fast_accumulation,
        "three values: for output, input gradient and weight gradient",
    )
    if run.precision.linear != "fp8":
        return
    _require(
        run.objective != "dpo" and not run.lora.rank,
        "config.precision.linear",
        "fp8",
        "bfloat16 or float32 for DPO and for adapters",
    )
    for key in ("hidden_size", "intermediate_size"):
        value = getattr(run.model, key)
        expected = "a multiple of 16, as FP8 matmuls need (precision.linear='fp8')"
        _require(value % 16 == 0, f"config.model.{key}", value, expected)


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
    _positive("training", training, "spike_guard", zero=True)
    window = training.spike_guard_window
    _require(window >= 16, "config.training.spike_guard_window", window, "16 steps at least")
    _positive("optimizer", optimizer, "learning_rate", "eps")
    _positive("optimizer", optimizer, "warmup_tokens", "weight_decay", "clip_norm", zero=True)
    _positive("optimizer", optimizer, "final_learning_rate", zero=True)
    _require(
        0 <= optimizer.warmup_fraction < 1,
        "config.optimizer.warmup_fraction",
        optimizer.warmup_fraction,
        "a number in [0, 1)",
    )
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
    _positive("evals", run.evals, "limit")
    _positive("evals", run.evals, "every_steps", "num_fewshot", zero=True)
    _positive("checkpoint", run.checkpoint, "every_steps", "keep_last")
    _positive("checkpoint", run.checkpoint, "keep_every_steps", zero=True)
    _positive("samples", run.samples, "max_tokens")
    _positive("samples", run.samples, "temperature", "top_k", zero=True)


def _validate_data(run: RunConfig) -> None:
    data, tuning = run.data, run.objective != "pretrain"
    _require_choice("config.data.verify", data.verify, VERIFY_MODES)
    _positive("data", data, "num_workers", zero=True)
    _positive("data", data, "prefetch")
    _require(
        (0 < data.heldout_fraction < 1) or (tuning and data.heldout_fraction == 0),
        "config.data.heldout_fraction",
        data.heldout_fraction,
        "a number between 0 and 1",
    )
    builtins = TUNING_SOURCES[run.objective] if tuning else BUILTIN_SOURCES
    _require(bool(data.sources), "config.data.sources", {}, "at least one source")
    for name, source in data.sources.items():
        key = f"config.data.sources.{name}"
        if source.builtin:
            _require_choice(f"{key}.builtin", source.builtin, builtins)
            _require(
                not source.path and not source.heldout_path,
                f"{key}.path",
                source.path or source.heldout_path,
                "no path beside builtin",
            )
        else:
            kind = "a file or folder of rows" if tuning else "the folder of a TokenStore"
            _require(bool(source.path), f"{key}.path", "", kind)
        _positive(f"data.sources.{name}", source, "max_epochs", "max_examples")
    chosen = [
        key for key in ("path", "builtin", "train_vocab_size") if getattr(data.tokenizer, key)
    ]
    _require(
        len(chosen) == 1 or (tuning and not chosen),
        "config.data.tokenizer",
        ", ".join(chosen) or "nothing set",
        "exactly one of path, builtin and train_vocab_size",
    )
    if data.tokenizer.builtin:
        _require_choice("config.data.tokenizer.builtin", data.tokenizer.builtin, ("mistral",))


def _validate_phases(run: RunConfig) -> None:
    _require(not run.rounds, "config.rounds", len(run.rounds), "none: they belong to sft and dpo")
    _require(run.lora.rank == 0, "config.lora.rank", run.lora.rank, "0: LoRA is for sft and dpo")
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


def _validate_tuning(run: RunConfig) -> None:
    _require(not run.phases, "config.phases", len(run.phases), "none: tuning has rounds")
    _require(bool(run.rounds), "config.rounds", (), "at least one round")
    names = [row.name for row in run.rounds]
    _require(len(set(names)) == len(names), "config.rounds", names, "a different name a round")
    for i, row in enumerate(run.rounds):
        _validate_round(run, row, f"config.rounds[{i}]")
    chat, dpo, lora = run.chat, run.dpo, run.lora
    for key, choices in CHAT_CHOICES.items():
        _require_choice(f"config.chat.{key}", getattr(chat, key), choices)
    _positive("chat", chat, "max_length")
    _positive("lora", lora, "rank", zero=True)
    _positive("lora", lora, "alpha")
    _require(0 <= lora.dropout < 1, "config.lora.dropout", lora.dropout, "a number in [0, 1)")
    _require_choice("config.dpo.loss", dpo.loss, DPO_LOSSES)
    _require_choice("config.dpo.reference", dpo.reference, DPO_REFERENCES)
    _positive("dpo", dpo, "beta")
    _require(
        0 <= dpo.label_smoothing < 0.5 and (dpo.loss == "sigmoid" or not dpo.label_smoothing),
        "config.dpo.label_smoothing",
        dpo.label_smoothing,
        "a number in [0, 0.5), and 0 for ipo",
    )
    init_from = run.init_from
    if run.objective == "dpo" or lora.rank:
        what = "a model: DPO's reference" if run.objective == "dpo" else "the model of the adapters"
        _require(bool(init_from.path), "config.init_from.path", "", what)
    _require(
        bool(init_from.path) or bool(run.data.tokenizer.path or run.data.tokenizer.builtin),
        "config.data.tokenizer",
        "nothing set",
        "a path or builtin, or config.init_from.path, whose tokenizer is taken",
    )
    for key, value in (("change_tokenizer", False), ("take", "weights")):
        found = getattr(init_from, key)
        _require(found == value, f"config.init_from.{key}", found, f"{value!r} when tuning")


def _validate_round(run: RunConfig, row: RoundConfig, key: str) -> None:
    fine = bool(row.name) and row.name.replace("-", "").replace("_", "").isalnum()
    _require(fine, f"{key}.name", row.name, "letters, digits, - and _: it names a folder")
    _require(bool(row.sources), f"{key}.sources", (), "names of config.data.sources")
    for source in row.sources:
        known = ", ".join(run.data.sources)
        expected = f"names of config.data.sources ({known})"
        _require(source in run.data.sources, f"{key}.sources", source, expected)
    for field in ("epochs", "context_length", "batch_size", "learning_rate"):
        value = getattr(row, field)
        _require(value is None or value > 0, f"{key}.{field}", value, "a positive number")
