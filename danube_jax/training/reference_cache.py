"""The reference's log-probabilities of all answers, computed once and kept in the workdir."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax import files
from danube_jax.config import RunConfig
from danube_jax.console import info, progress, warn
from danube_jax.data.tuning_data import Item, TuningData, fixed_batches, items_digest
from danube_jax.models.decoder import Decoder, head_kernel
from danube_jax.training.dtypes import DTYPES, linear_dtype
from danube_jax.training.frozen_weights import FrozenWeights
from danube_jax.training.mesh import DATA_AXIS, put_batch
from danube_jax.training.objectives import Policy, answer_log_probs
from danube_jax.training.task import Evaluator

FILE = "reference_log_probs.npz"
_TRAIN, _FINGERPRINT = "train", "fingerprint"


@dataclasses.dataclass(frozen=True)
class ReferenceCache:
    """Log-probabilities float32 [items, 2] (chosen, rejected) under the reference.

    Attributes:
      train: of the training pairs.
      heldout: of each source's held-out pairs.
    """

    train: np.ndarray
    heldout: Mapping[str, np.ndarray]

    @classmethod
    def open(
        cls,
        run: RunConfig,
        workdir: Path,
        data: TuningData,
        frozen: FrozenWeights,
        evaluator: Evaluator,
    ) -> "ReferenceCache":
        """Reads the file in the workdir, or computes it where there is none of these pairs.

        The fingerprint covers the reference's weights, the pairs and the precision.
        """
        parts: dict[str, Sequence[Item]] = {_TRAIN: data.items}
        parts |= {f"heldout/{name}": items for name, items in data.heldout.items()}
        fingerprint = files.sha256_json(
            {
                "weights": frozen.fingerprint,
                "pairs": {name: items_digest(items) for name, items in parts.items()},
                "precision": dataclasses.asdict(run.precision),
            }
        )
        arrays = _read(workdir / FILE, fingerprint)
        if arrays is None:
            arrays = _compute(run, data, frozen, evaluator, parts)
            if jax.process_index() == 0:
                stream = io.BytesIO()
                np.savez(stream, **arrays, **{_FINGERPRINT: np.array(fingerprint)})
                files.write_bytes(workdir / FILE, stream.getvalue())
        heldout = {name: arrays[f"heldout/{name}"] for name in data.heldout}
        return cls(arrays[_TRAIN], heldout)


def _read(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
    except Exception as error:  # NumPy and zipfile raise many kinds; it can be made again
        warn(f"{path}: cannot be read ({error}); computing it again")
        return None
    if str(arrays.pop(_FINGERPRINT, "")) != fingerprint:
        warn(f"{path}: is of other weights or pairs; computing it again")
        return None
    info(f"reference log-probabilities: {path}")
    return arrays


def _compute(
    run: RunConfig,
    data: TuningData,
    frozen: FrozenWeights,
    evaluator: Evaluator,
    parts: Mapping[str, Sequence[Item]],
) -> dict[str, np.ndarray]:
    mesh, context = evaluator.mesh, data.schedule.phases[0].context
    decoder = Decoder(run.model, DTYPES[run.precision.compute], linear_dtype(run.precision))
    policy, chunk_tokens = Policy(decoder), run.training.loss_chunk_tokens

    def log_probs(params, batch):
        rows = {key: value[0] for key, value in batch.items()}
        hidden_BTD = policy.plain_states(params, rows)
        return answer_log_probs(hidden_BTD, head_kernel(params), rows, chunk_tokens)

    sharded = jax.shard_map(
        log_probs,
        mesh=mesh,
        in_specs=(P(), P(None, DATA_AXIS)),
        out_specs=P(DATA_AXIS),
        check_vma=False,
    )
    compiled = jax.jit(sharded, out_shardings=NamedSharding(mesh, P(DATA_AXIS)))
    out: dict[str, np.ndarray] = {}
    total = sum(map(len, parts.values()))
    with progress("reference log-probabilities", total, "pairs") as advance:
        for name, items in parts.items():
            out[name] = np.zeros((len(items), 2), np.float32)
            batches = fixed_batches(
                items,
                context=context,
                batch_rows=evaluator.rows(run, context),
                pad_id=data.tokenizer.pad_id,
                devices=mesh.size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for batch, rows in batches:
                local = {key: np.asarray(value)[None] for key, value in batch.items()}
                found_BP2 = compiled(frozen.params, put_batch(mesh, local))
                found_BP2 = multihost_utils.process_allgather(found_BP2, tiled=True)
                for i, row in enumerate(rows):
                    out[name][list(row)] = found_BP2[i, : len(row)]
                    advance(len(row))
    return out
