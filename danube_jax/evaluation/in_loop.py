"""Benchmarks while training: lm-eval's tasks on the training mesh, with the run's own weights.

Log-likelihoods are computed from the training state as it lies on the devices, sharded or not;
each dispatch gathers what it needs, as a training step does. Tasks that generate text hold a copy
of the weights, in the compute dtype, while they run.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from danube_jax.config import RunConfig
from danube_jax.console import info, warn
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError

KIND = "benchmark"


class WritesRows(Protocol):
    """What takes a row of metrics."""

    def write(self, row: dict[str, Any]) -> None:
        """Takes one row."""


class NoBenchmarks:
    """A run without benchmarks."""

    def due(self, step: int, last_step: int) -> bool:
        """Never."""
        return False

    def run_if_missing(
        self,
        params: Any,
        step: int,
        tokens: int,
        writer: WritesRows | None,
        stop: Callable[[], bool],
    ) -> bool:
        """Nothing, and that is done."""
        return True

    def close(self) -> None:
        """Nothing."""


def open_benchmarks(
    run: RunConfig, workdir: Path, mesh: Mesh, tokenizer: Tokenizer
) -> "NoBenchmarks | Benchmarks":
    """What `config.evals` asks for; its tasks and their documents are loaded now.

    Raises:
      UserError: an unknown task, data that cannot be had, or a chat format without template.
    """
    return Benchmarks(run, workdir, mesh, tokenizer) if run.evals.tasks else NoBenchmarks()


class Benchmarks:
    """Runs tasks at the steps where they are due."""

    def __init__(self, run: RunConfig, workdir: Path, mesh: Mesh, tokenizer: Tokenizer):
        """Loads the tasks; see `open_benchmarks`."""
        from danube_jax.evaluation.tasks import load_tasks, select

        config = run.evals
        if config.chat and tokenizer.chat_template is None:
            raise UserError("config.evals.chat: the run's tokenizer has no chat template")
        self._run, self._workdir, self._mesh, self._tokenizer = run, workdir, mesh, tokenizer
        self._selection = select(config.tasks.split(","), config.num_fewshot)
        self._open = contextlib.ExitStack()
        self._tasks, notes = self._open.enter_context(
            load_tasks(
                self._selection,
                include_path=config.include_path or None,
                data=config.local_data or None,
            )
        )
        for note in notes:
            warn(note)
        self._scorer: Any = None

    def due(self, step: int, last_step: int) -> bool:
        """Whether benchmarks belong to this step."""
        every = self._run.evals.every_steps
        return step == last_step or bool(every and step and step % every == 0)

    def run_if_missing(
        self,
        params: Any,
        step: int,
        tokens: int,
        writer: WritesRows | None,
        stop: Callable[[], bool],
    ) -> bool:
        """Runs the tasks, unless metrics.jsonl has their row of this step from before a stop.

        Args:
          params: the training state's parameters, on the mesh.
          step, tokens: how far the run is.
          writer: takes the row of scores; None on all processes but the first.
          stop: whether the run is asked to stop. Heard within a batch in a run of one process;
            several, which compute together, finish the evaluation.

        Returns:
          Whether the scores are there; False where the run was asked to stop first.
        """
        missing = writer is not None and not self._has_row(step)
        if jax.process_count() > 1:
            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        if not missing:
            return True
        from danube_jax.evaluation.harness import Stopped

        try:
            results = self._evaluate(params, stop if jax.process_count() == 1 else None)
        except Stopped:
            info(f"the benchmarks of step {step} were stopped; they run when the run goes on")
            return False
        if writer is None:
            return True
        from danube_jax.evaluation.results import markdown, task_rows, write_results

        stem = f"results_{step}_{self._selection.name}"
        notes = (
            [] if self._run.evals.limit is None else [f"{self._run.evals.limit} documents a task"]
        )
        text = markdown(results, self._selection.preset, f"{self._run.name}, step {step}", notes)
        write_results(self._workdir / "evaluation", stem, results, text, samples=False)
        rows = task_rows(results)
        scores = {f"{row.task}/{row.metric}": row.value for row in rows}
        errors = {f"{row.task}/{row.metric}_stderr": row.stderr for row in rows}
        writer.write({"kind": KIND, "step": step, "tokens": tokens, **scores, **errors})
        shown = ", ".join(f"{row.task} {row.metric} {row.text()}" for row in rows)
        info(f"benchmarks at step {step}: {shown}")
        return True

    def _has_row(self, step: int) -> bool:
        path = self._workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = (json.loads(line) for line in lines if f'"{KIND}"' in line)
        return any(row["kind"] == KIND and row["step"] == step for row in rows)

    def _evaluate(self, params: Any, stop: Callable[[], bool] | None) -> dict[str, Any]:
        from danube_jax.evaluation.harness import DanubeLM
        from danube_jax.evaluation.run import run_tasks

        lm = DanubeLM(
            scorer=self._scorer_of(params),
            params=params,
            generator=functools.partial(self._generators, params),
            tokenizer=self._tokenizer,
            max_length=self._run.model.max_position_embeddings,
            stop=stop,
        )
        config = self._run.evals
        return dict(run_tasks(lm, self._tasks, limit=config.limit, chat=config.chat))

    def _scorer_of(self, params: Any) -> Any:
        """The scorer, which is built once; later evaluations find their programs compiled."""
        if self._scorer is None:
            from danube_jax.evaluation.scoring import Scorer
            from danube_jax.models.decoder import Decoder

            config = dataclasses.replace(
                self._run.model, remat="none", attention_backend="auto"
            )  # cuDNN's attention, which a run may name, cannot pad prefixes
            specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
            self._scorer = Scorer(Decoder(config, self._dtype), mesh=self._mesh, specs=specs)
        return self._scorer

    @property
    def _dtype(self) -> Any:
        return jax.numpy.dtype(self._run.precision.compute)

    def _generators(self, params: Any) -> Any:
        """One generator a device of this process; every process comes to the same texts."""
        from danube_jax.evaluation.loading import local_generators
        from danube_jax.inference.generate import Generator

        model, dtype = self._run.model, self._dtype
        if self._mesh.size == 1:
            return [Generator(model, params, tokenizer=self._tokenizer, dtype=dtype)]
        whole = jax.jit(
            lambda tree: jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, tree),
            out_shardings=NamedSharding(self._mesh, Spec()),
        )(params)
        here = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
        first = Generator(model, here, tokenizer=self._tokenizer, dtype=dtype)
        if first.decoder.config.tie_word_embeddings != model.tie_word_embeddings:
            return [first]  # it made a head of its own, which the others would lack
        return local_generators(first, whole)

    def close(self) -> None:
        """Removes what the tasks keep on disk."""
        self._open.close()
