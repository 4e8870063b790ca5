"""Tuning as a task: SFT on conversations and DPO on preferences, of all weights or of adapters."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from danube_jax.config import RunConfig
from danube_jax.data.packing import Batch
from danube_jax.data.tokenizer import Tokenizer, load_tokenizer
from danube_jax.data.tuning_data import (
    Item,
    RowSource,
    TuningData,
    fixed_batches,
    limit_tokens,
    open_tuning_data,
)
from danube_jax.errors import UserError
from danube_jax.interop.model_source import open_model
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.models.lora import LoraConfig, init_adapters, merge
from danube_jax.training.frozen_weights import FrozenWeights, load_frozen
from danube_jax.training.heldout import evaluate_source
from danube_jax.training.objectives import (
    Objective,
    language_modeling,
    preference_optimization,
)
from danube_jax.training.reference_cache import ReferenceCache
from danube_jax.training.task import Evaluator, PyTree, Task
from danube_jax.training.terminal import summarize_tuning


def tuning_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer that the config names, or that of the model the run starts from.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    named = run.data.tokenizer
    if named.path or named.builtin:
        return load_tokenizer(named)
    return open_model(run.init_from.path).tokenizer()


def lora_of(run: RunConfig) -> LoraConfig | None:
    """The run's adapters, or None where all weights are trained."""
    return LoraConfig(**dataclasses.asdict(run.lora)) if run.lora.rank else None


class Tuning(Task):
    """One round of SFT or DPO."""

    def __init__(self, run: RunConfig, workdir: Path, data: TuningData):
        """`run` has one round, and `data` is what `open_tuning_data` made of it.

        Raises:
          UserError: the tokenizer has more ids than the model has rows.
        """
        self.run, self.workdir, self.data = run, workdir, data
        self.tokenizer, self.schedule = data.tokenizer, data.schedule
        self.fingerprint: Mapping[str, str] = data.fingerprint
        self.lora = lora_of(run)
        self.preferences = run.objective == "dpo"
        self.cached = self.preferences and run.dpo.reference == "cache"
        # A cached reference leaves nothing frozen to compute with, unless adapters need a base.
        self.has_frozen = self.lora is not None or (self.preferences and not self.cached)
        self.count_name = "pairs" if self.preferences else "valid_tokens"
        self._reference: ReferenceCache | None = None
        if self.tokenizer.vocab_size > run.model.vocab_size:
            raise UserError(
                f"config.model.vocab_size: {run.model.vocab_size} is not possible; the tokenizer "
                f"has {self.tokenizer.vocab_size} tokens, so at least that many are needed"
            )

    def batch_source(self, devices: int) -> RowSource:
        return RowSource(
            self.run,
            self.data,
            devices=devices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            reference=None if self._reference is None else self._reference.train,
        )

    def fresh_params(self, key: jax.Array) -> PyTree:
        if self.lora is not None:
            return init_adapters(self.lora, self.run.model, key)
        return init_params(self.run.model, key)

    def train_objective(self, decoder: Decoder) -> Objective:
        packed = self.run.chat.packing != "none"
        return self._objective(decoder, self.run.training.z_loss, mask_segments=packed)

    def eval_objective(self, decoder: Decoder) -> Objective:
        return self._objective(decoder, 0.0, mask_segments=True)

    def _objective(self, decoder: Decoder, z_loss: float, *, mask_segments: bool) -> Objective:
        training = self.run.training
        options: dict[str, Any] = {
            "chunk_tokens": training.loss_chunk_tokens,
            "lora": self.lora,
            "seed": training.seed,
        }
        if self.preferences:
            return preference_optimization(decoder, self.run.dpo, **options)
        return language_modeling(decoder, z_loss=z_loss, mask_segments=mask_segments, **options)

    def load_frozen(
        self, mesh: Mesh, dtype: jnp.dtype, expected: Mapping[str, str] | None
    ) -> FrozenWeights | None:
        if self.lora is None and not self.preferences:
            return None
        return load_frozen(self.run.init_from.path, self.workdir, mesh, dtype, expected)

    def begin(self, source: Any, frozen: FrozenWeights | None, evaluator: Evaluator) -> Any:
        if not self.cached:
            return source
        assert frozen is not None
        self._reference = ReferenceCache.open(self.run, self.workdir, self.data, frozen, evaluator)
        return self.batch_source(evaluator.mesh.size)

    def checkpoint_meta(self, frozen: FrozenWeights | None) -> dict[str, Any]:
        meta: dict[str, Any] = {"objective": self.run.objective}
        if frozen is not None:
            meta["frozen"] = frozen.describe()
        if self.lora is not None:
            assert frozen is not None
            values = dataclasses.asdict(self.lora) | {"targets": list(self.lora.targets)}
            meta["lora"] = values | {"base": frozen.path}
        return meta

    def whole_params(self, params: PyTree, frozen: PyTree | None) -> PyTree:
        if self.lora is None:
            return params
        return merge(frozen, params, self.lora, self.run.model)

    def can_evaluate(self) -> bool:
        return bool(self.data.heldout)

    def evaluate(
        self, params: PyTree, frozen: PyTree | None, evaluator: Evaluator, step: int
    ) -> dict[str, float]:
        row: dict[str, float] = {}
        for name, items in self.data.heldout.items():
            chosen = limit_tokens(items, self.run.evaluation.tokens_per_source)
            reference = None if self._reference is None else self._reference.heldout[name]
            result = evaluate_source(
                evaluator.step,
                params,
                self._batches(chosen, evaluator, reference),
                mesh=evaluator.mesh,
                bytes_V=evaluator.bytes_V,
                frozen=frozen,
            )
            row |= {f"{key}/{name}": value for key, value in result.items()}
        return row

    def _batches(
        self, items: Sequence[Item], evaluator: Evaluator, reference: np.ndarray | None
    ) -> Iterator[Batch]:
        context = self.schedule.phases[0].context
        rows = evaluator.rows(self.run, context)
        index, count = jax.process_index(), jax.process_count()
        for batch, places in fixed_batches(
            items,
            context=context,
            batch_rows=rows,
            pad_id=self.tokenizer.pad_id,
            devices=evaluator.mesh.size,
            process_index=index,
            process_count=count,
        ):
            if reference is not None:
                batch["reference"] = np.zeros((*batch["pairs"].shape, 2), np.float32)
                local = len(batch["tokens"])
                for i, row in enumerate(places[index * local : (index + 1) * local]):
                    batch["reference"][i, : len(row)] = reference[list(row)]
            yield batch

    def notes(self) -> list[str]:
        row, chat = self.run.rounds[0], self.run.chat
        what = "preference pairs" if self.preferences else "conversations"
        rows = len(self.data.packed.rows)
        trained = "all weights"
        if self.lora is not None:
            trained = f"LoRA of rank {self.lora.rank} on {', '.join(self.lora.targets)}"
        return [
            f"{len(self.data.items):,} {what}, {row.epochs:g} epochs of {rows:,} rows, "
            f"packing {chat.packing} ({self.data.padding:.1%} padding), "
            f"tokenised {chat.tokenization}",
            f"trained: {trained}",
        ]

    def summarize(
        self, evaluations: Sequence[dict[str, Any]], baselines: Mapping[str, float]
    ) -> None:
        del baselines
        summarize_tuning(evaluations, list(self.data.heldout), self.workdir)

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])

    def sample_text(self, prompt: str, prompt_ids: Sequence[int], new: Sequence[int]) -> str:
        return f"{prompt}\n{self.tokenizer.decode(new).strip()}"

    def batch_metrics(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        metrics = {"padding": float(np.mean(batch["segment_ids"] == 0))}
        if not self.preferences:
            metrics["examples"] = int(batch["segment_ids"].max(axis=-1).sum())
        return metrics


def open_round(run: RunConfig, workdir: Path, tokenizer: Tokenizer) -> Tuning:
    """Reads a round's data and makes its task; writes nothing.

    Raises:
      UserError: as `open_tuning_data`.
    """
    return Tuning(run, workdir, open_tuning_data(run, tokenizer))
