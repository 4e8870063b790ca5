"""Held-out loss of each source, in nats a token and in bits a byte."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.data.token_store import TokenStore
from danube_jax.training.mesh import DATA_AXIS, put_batch
from danube_jax.training.objectives import Objective
from danube_jax.training.step import TrainState, prepare_weights

EvalStep = Callable[..., dict[str, jax.Array]]


def make_eval_step(
    objective: Objective,
    *,
    mesh: Mesh,
    specs: TrainState,
    compute_dtype: jnp.dtype,
    has_frozen: bool = False,
) -> EvalStep:
    """A jitted ``(params, batch, bytes_V[, frozen]) -> sums``, replicated.

    The sums are `nll`, `tokens` and `bytes`, or, of a batch of preference pairs, `loss`, `pairs`
    and the objective's own. `batch` holds global arrays [1, B, T]; `bytes_V` float32 [V] the UTF-8
    bytes a token stands for; `frozen` is as for the training step.
    """

    def sums(
        params: Any, batch: Mapping[str, jax.Array], bytes_V: jax.Array, *frozen: Any
    ) -> dict[str, jax.Array]:
        weights = prepare_weights(params, specs.params, compute_dtype)
        rows = jax.tree.map(lambda x: x[0], dict(batch))
        loss, aux = objective(weights, rows, *frozen)
        if "pairs" in rows:
            return lax.psum(aux | {"loss": loss, "pairs": jnp.sum(rows["pairs"])}, DATA_AXIS)
        local = {
            "nll": loss,
            "tokens": jnp.sum(rows["weights"]),
            "bytes": jnp.sum(bytes_V[rows["targets"]] * rows["weights"]),
        }
        return lax.psum(local, DATA_AXIS)

    return jax.jit(
        jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(specs.params, P(None, DATA_AXIS), P(), *([P()] if has_frozen else [])),
            out_specs=P(),
            check_vma=False,
        ),
        out_shardings=NamedSharding(mesh, P()),
    )


def evaluate_source(
    eval_step: EvalStep,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    bytes_V: np.ndarray,
    frozen: Any = None,
) -> dict[str, float]:
    """`loss` (nats a token), `bits_per_byte` and `tokens` over all of a source's batches.

    Of preference pairs: means over pairs of `loss` and the objective's metrics, and `pairs`.

    Sums are added in float64 on the host, in order, so that the figure does not depend on timing.
    """
    totals: dict[str, float] = {}
    more = () if frozen is None else (frozen,)
    pending: list[dict[str, jax.Array]] = []
    for batch in batches:
        local = {key: np.asarray(value)[None] for key, value in batch.items()}
        pending.append(eval_step(params, put_batch(mesh, local), bytes_V, *more))
        if len(pending) > 1:  # one batch ahead of the host, and no more memory than that
            _add(totals, pending.pop(0))
    for sums in pending:
        _add(totals, sums)
    if "pairs" in totals:
        pairs = totals.pop("pairs")
        return {key: total / max(pairs, 1.0) for key, total in totals.items()} | {"pairs": pairs}
    return {
        "loss": totals["nll"] / max(totals["tokens"], 1.0),
        "bits_per_byte": totals["nll"] / np.log(2) / max(totals["bytes"], 1.0),
        "tokens": totals["tokens"],
    }


def _add(totals: dict[str, float], sums: Mapping[str, jax.Array]) -> None:
    for key, value in sums.items():
        totals[key] = totals.get(key, 0.0) + float(value)


def unigram_loss(train: TokenStore, heldout: TokenStore, vocab_size: int) -> float:
    """Nats a held-out token under token frequencies of the training store, each count plus one.

    What a model that knows frequencies alone would reach: the yardstick for a small run. At most
    20M tokens from the beginning of each store are counted.
    """
    counts_V, heldout_V = (
        np.bincount(
            store.read(np.zeros(1, np.int64), min(store.tokens, 20_000_000))[0],
            minlength=vocab_size,
        ).astype(np.float64)
        for store in (train, heldout)
    )
    log_probabilities_V = np.log((counts_V + 1) / (counts_V + 1).sum())
    return float(-(heldout_V @ log_probabilities_V) / heldout_V.sum())
