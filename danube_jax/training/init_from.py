"""Starts a run from a model that exists: which weights, and which rows of its vocabulary.

Where the tokenizer changes (Danube2 took Mistral's for Llama 2's, arXiv 2401.16818, section 7),
the rows of embedding and head whose token string stands in both vocabularies are carried over and
the others are initialised.

Shape suffixes: V vocabulary of the run, U vocabulary of the source, D model.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.table import Table

from danube_jax.config import InitFromConfig, ModelConfig, RunConfig, parse_config, to_dict
from danube_jax.console import console, info, warn
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.interop.hf_weights import set_leaf
from danube_jax.interop.model_source import LeafReader, ModelSource, open_model
from danube_jax.models.decoder import Params, abstract_params, init_params
from danube_jax.training.checkpoint import read_part
from danube_jax.training.step import TrainState
from danube_jax.training.workdir import CHECKPOINTS, CONFIG_FILE, read_config

PyTree = Any

# What must be the same for a source's arrays to fit, in the order of an error message.
SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "tie_word_embeddings",
)
# What may differ on purpose (Danube2 dropped Danube's window), but not unseen.
BEHAVIOUR_FIELDS = ("sliding_window", "rope_theta", "rms_norm_eps")
RUN_FIELDS = (
    "attention_backend",
    "remat",
    "scan_layers",
)  # how this run computes, not what the model is

OPTIMIZER = "opt_state"  # field of TrainState

_NEW = -1


def resolve_model(run: RunConfig, workdir: Path | None = None) -> RunConfig:
    """`run` with the source's architecture where `init_from.model_from_source` asks for it.

    A workdir that holds the run already says what that architecture was.

    Raises:
      UserError: the source cannot be opened, or its architecture does not fit the run's phases.
    """
    if not run.init_from.model_from_source:
        return run
    if workdir is not None and (workdir / CONFIG_FILE).exists():
        model = parse_config(read_config(workdir)).model
    else:
        model = open_model(run.init_from.path).config
        if run.init_from.change_tokenizer:
            model = dataclasses.replace(model, vocab_size=run.model.vocab_size)
    kept = {field: getattr(run.model, field) for field in RUN_FIELDS}
    model = dataclasses.replace(model, **kept)
    return parse_config(to_dict(dataclasses.replace(run, model=model)))


def check_architecture(run: ModelConfig, source: ModelConfig, path: str) -> None:
    """Makes sure that the source's arrays fit; warns where the model would compute differently.

    Raises:
      UserError: the first field that differs.
    """
    for field in SHAPE_FIELDS:
        ours, theirs = getattr(run, field), getattr(source, field)
        if ours != theirs:
            name = "head_dim" if field == "head_size" else field
            raise UserError(
                f"config.model.{name}: {ours} is not what {path} has ({theirs}); expected the "
                "same, or --config.init_from.model_from_source=True to take its architecture"
            )
    for field in BEHAVIOUR_FIELDS:
        ours, theirs = getattr(run, field), getattr(source, field)
        if ours != theirs:
            warn(f"config.model.{field} is {ours}; the weights of {path} are used to {theirs}")


@dataclasses.dataclass(frozen=True)
class RowMap:
    """Where each row of the run's vocabulary comes from.

    Attributes:
      source_V: int32, the source's row, or -1 for a row that is new.
      tokens: tokens of the run's tokenizer; rows beyond them are padding.
      carried: tokens whose row is the source's.
      dropped: tokens of the source's tokenizer that the run's does not have.
    """

    source_V: np.ndarray
    tokens: int
    carried: int
    dropped: int


def map_rows(
    tokenizer: Tokenizer,
    vocab_size: int,
    source_tokenizer: Tokenizer | None,
    source_vocab_size: int,
) -> RowMap:
    """Maps rows by token string; with no `source_tokenizer`, and for padding rows, by id."""
    tokens = tokenizer.vocab_size
    source_V = np.arange(vocab_size, dtype=np.int32)
    dropped = 0
    if source_tokenizer is not None:
        source_ids = _ids_by_piece(source_tokenizer)
        ids = _ids_by_piece(tokenizer)
        source_V[:tokens] = _NEW
        for piece, i in ids.items():
            source_V[i] = source_ids.get(piece, _NEW)
        dropped = len(source_ids.keys() - ids.keys())
    source_V[source_V >= source_vocab_size] = _NEW
    return RowMap(source_V, tokens, int(np.sum(source_V[:tokens] != _NEW)), dropped)


def _ids_by_piece(tokenizer: Tokenizer) -> dict[str, int]:
    return {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}


def remap_rows(tree: PyTree, rows: RowMap, new: PyTree, mode: str = "init") -> PyTree:
    """`tree` with the vocabulary's rows of embedding and head moved to where `rows` says.

    Args:
      tree: NumPy parameters, or moments that mirror them; embedding [U, D], head [D, U].
      rows: where each row comes from.
      new: a tree of the same structure; embedding [V, D] and head [D, V] hold the rows of new
        tokens, other leaves are not looked at.
      mode: 'init' takes new rows as they are; 'old_statistics' scales them, from a standard
        deviation of one, to that of the source's rows, a feature, and moves them to their mean.

    Returns:
      The tree with V in place of U; other leaves are the same arrays.
    """

    def remap(path: tuple, old: np.ndarray, fresh: Any) -> np.ndarray:
        axis = _vocabulary_axis(path)
        if axis is None:
            return old
        out = np.take(old, np.maximum(rows.source_V, 0), axis=axis)
        is_new = (slice(None),) * axis + (rows.source_V == _NEW,)
        drawn = np.asarray(fresh)[is_new]
        if mode == "old_statistics":
            wide = old.astype(np.float32)
            drawn = drawn * wide.std(axis, keepdims=True) + wide.mean(axis, keepdims=True)
        out[is_new] = drawn.astype(old.dtype)
        return out

    return jax.tree_util.tree_map_with_path(remap, tree, new)


def _vocabulary_axis(path: tuple) -> int | None:
    """The axis over the vocabulary of the leaf at a tree path, or None where it has none."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if names[-2:] == ["embed_tokens", "embedding"]:
        return 0
    return 1 if names[-2:] == ["lm_head", "kernel"] else None


@dataclasses.dataclass(frozen=True)
class Initialization:
    """A source that fits the run, and how its rows are taken; nothing is loaded yet."""

    run: RunConfig
    source: ModelSource
    rows: RowMap

    @classmethod
    def plan(cls, run: RunConfig, tokenizer: Tokenizer) -> "Initialization":
        """Opens what `run.init_from` names, and checks it against the run.

        Args:
          run: the config, with `resolve_model` applied.
          tokenizer: the run's.

        Raises:
          UserError: it cannot be read, or does not fit the run's model or tokenizer.
        """
        config, source = run.init_from, open_model(run.init_from.path)
        check_architecture(run.model, source.config, config.path)
        if source.lora is not None:
            source.adapters()  # refuses what does not fit its base
        if config.take == "weights_and_optimizer" and not _has_optimizer(source):
            raise UserError(
                "config.init_from.take: 'weights_and_optimizer' is not possible, since "
                f"{config.path} holds weights alone; expected 'weights'"
            )
        return cls(run, source, _plan_rows(run, tokenizer, source))

    def describe(self) -> dict[str, Any]:
        """What the run starts from, for the metadata of its checkpoints."""
        config = self.run.init_from
        return {"path": config.path, "step": self.source.step, "take": config.take}

    def announce(self) -> None:
        """Says where the weights come from and, where the tokenizer changes, what becomes of it."""
        config, rows = self.run.init_from, self.rows
        what = "weights" if config.take == "weights" else "weights and optimizer"
        step = "" if self.source.step is None else f", step {self.source.step}"
        info(f"{what} from {config.path}{step}")
        if not config.change_tokenizer:
            return
        fresh = {"init": "the model's init", "old_statistics": "mean and spread of the old rows"}
        table = Table(title="tokens of the new tokenizer", title_justify="left")
        table.add_column("rows of embedding and head")
        table.add_column("tokens", justify="right")
        table.add_row("in both vocabularies: carried over", f"{rows.carried:,}")
        table.add_row(f"new: {fresh[config.new_rows]}", f"{rows.tokens - rows.carried:,}")
        table.add_row("only in the old one: dropped", f"{rows.dropped:,}")
        console.print(table)

    def state(
        self,
        optimizer: optax.GradientTransformation,
        fresh: Callable[[], TrainState],
        shardings: TrainState,
    ) -> TrainState:
        """The state of step 0.

        Args:
          optimizer: the run's.
          fresh: makes a random state of the run's model.
          shardings: of every leaf of the state.

        Raises:
          UserError: the source's files are damaged.
        """
        config, source = self.run.init_from, self.source
        state = jax.jit(fresh, out_shardings=shardings)()
        params, step = source.with_reader(_read_params)
        new = _new_rows(self.run.model, config, self.run.training.seed)
        params = remap_rows(params, self.rows, new, config.new_rows)
        state = state.replace(params=_place(params, state.params))
        if config.take == "weights_and_optimizer":
            old = jax.eval_shape(optimizer.init, abstract_params(source.config))
            opt_state = read_part(source.path / CHECKPOINTS / str(step), OPTIMIZER, old)
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.opt_state)
            opt_state = remap_rows(opt_state, self.rows, zeros)
            state = state.replace(opt_state=_place(opt_state, state.opt_state))
        return state


def _has_optimizer(source: ModelSource) -> bool:
    """Whether the source is a checkpoint of a run of ours that trained whole weights."""
    if source.step is None or source.lora is not None:
        return False
    arrays = source.meta(source.step).get("checksums", {})
    return any(name.startswith(f".{OPTIMIZER}") for name in arrays)


def _read_params(reader: LeafReader) -> Params:
    params: Params = {}
    for leaf, array in reader:
        set_leaf(params, leaf.path, array)
    return params


def _plan_rows(run: RunConfig, tokenizer: Tokenizer, source: ModelSource) -> RowMap:
    old = _tokenizer(source)
    new_size, old_size = run.model.vocab_size, source.config.vocab_size
    if run.init_from.change_tokenizer:
        if old is None:
            raise UserError(
                f"config.init_from.change_tokenizer: {run.init_from.path} has no tokenizer that "
                "could be read, so its rows cannot be matched by token; expected one, or False"
            )
        return map_rows(tokenizer, new_size, old, old_size)
    if old is not None and _ids_by_piece(old) != _ids_by_piece(tokenizer):
        raise UserError(
            f"config.data.tokenizer: not the tokenizer of {run.init_from.path}; expected the same, "
            "or --config.init_from.change_tokenizer=True to carry over the rows that both have"
        )
    rows = map_rows(tokenizer, new_size, None, old_size)
    if rows.carried < rows.tokens:
        raise UserError(
            f"config.init_from.path: {run.init_from.path} has {old_size} rows for the tokenizer's "
            f"{rows.tokens} tokens; expected at least as many"
        )
    return rows


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    try:
        return source.tokenizer()
    except UserError as error:
        warn(f"the source's rows can only be taken by id: {error}")
        return None


def _new_rows(model: ModelConfig, config: InitFromConfig, seed: int) -> PyTree:
    """Random rows of the model's init, or of a standard normal distribution, as `mode` needs."""
    if config.new_rows == "old_statistics":
        model = dataclasses.replace(model, initializer_range=1.0)
    return init_params(model, jax.random.key(seed))


def _place(tree: PyTree, target: PyTree) -> PyTree:
    """NumPy arrays in the dtypes and on the devices of `target`, a shard at a time."""

    def place(leaf: np.ndarray, like: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: np.asarray(leaf[index], like.dtype)
        )

    return jax.tree.map(place, tree, target)
