"""Pretraining as a task: next-token loss over token stores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from danube_jax.config import RunConfig
from danube_jax.data.loader import BatchSource, heldout_batches
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training.heldout import evaluate_source, unigram_loss
from danube_jax.training.objectives import Objective, language_modeling
from danube_jax.training.run_data import RunData
from danube_jax.training.task import Evaluator, PyTree, Task
from danube_jax.training.terminal import summarize


class Pretraining(Task):
    """Trains all weights on the phases of the config."""

    def __init__(self, run: RunConfig, workdir: Path, data: RunData):
        self.run, self.workdir, self.data = run, workdir, data
        self.tokenizer, self.schedule = data.tokenizer, data.schedule
        self.fingerprint: Mapping[str, str] = data.fingerprint

    def batch_source(self, devices: int) -> BatchSource:
        return BatchSource(
            self.run,
            self.data.train,
            devices=devices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def fresh_params(self, key: jax.Array) -> PyTree:
        return init_params(self.run.model, key)

    def train_objective(self, decoder: Decoder) -> Objective:
        training = self.run.training
        return language_modeling(
            decoder, z_loss=training.z_loss, chunk_tokens=training.loss_chunk_tokens
        )

    def eval_objective(self, decoder: Decoder) -> Objective:
        chunk_tokens = self.run.training.loss_chunk_tokens
        return language_modeling(decoder, z_loss=0.0, chunk_tokens=chunk_tokens)

    def can_evaluate(self) -> bool:
        return bool(self.data.heldout)

    def evaluate(
        self, params: PyTree, frozen: PyTree | None, evaluator: Evaluator, step: int
    ) -> dict[str, float]:
        context = self.schedule.phase_at_step(max(step - 1, 0)).context
        row: dict[str, float] = {}
        for name, store in self.data.heldout.items():
            batches = heldout_batches(
                store,
                context=context,
                batch_rows=evaluator.rows(self.run, context),
                tokens=self.run.evaluation.tokens_per_source,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                mask_documents=self.run.data.mask_documents,
            )
            result = evaluate_source(
                evaluator.step, params, batches, mesh=evaluator.mesh, bytes_V=evaluator.bytes_V
            )
            row |= {f"{key}/{name}": value for key, value in result.items()}
        return row

    def notes(self) -> list[str]:
        epochs = ", ".join(f"{n} {float(use.epochs):.2f}" for n, use in self.data.use.items())
        return [f"epochs a source over the whole run: {epochs}"]

    def baselines(self) -> dict[str, float]:
        return {
            name: unigram_loss(self.data.train[name], store, self.run.model.vocab_size)
            for name, store in self.data.heldout.items()
        }

    def summarize(
        self, evaluations: Sequence[dict[str, Any]], baselines: Mapping[str, float]
    ) -> None:
        summarize(evaluations, baselines, self.workdir)
