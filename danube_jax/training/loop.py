"""The loop around the training step: data in, metrics out, checkpoints, evaluation, samples.

It is the same loop for every objective. All that a run is stands in its config, its stores and
its checkpoint; everything here can be stopped at any moment and started again.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from danube_jax.console import info, warn
from danube_jax.data.loader import WorkersDied, read_batches
from danube_jax.data.phases import describe_mismatch
from danube_jax.errors import EXIT_INTERRUPTED, RunError, UserError
from danube_jax.evaluation.in_loop import open_benchmarks
from danube_jax.inference.generate import Generator
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.interruption import Interrupted
from danube_jax.models.decoder import Decoder, flops_per_token
from danube_jax.training.checkpoint import Checkpointer
from danube_jax.training.dtypes import DTYPES, linear_dtype
from danube_jax.training.events import DIVERGED, FINISHED, PHASE, STOPPED, EventLog
from danube_jax.training.frozen_weights import FrozenWeights
from danube_jax.training.heldout import make_eval_step
from danube_jax.training.mesh import DATA_AXIS, make_mesh, put_batch
from danube_jax.training.metrics import MetricsWriter, Throughput, memory_bytes
from danube_jax.training.optimizer import learning_rate_schedule, make_optimizer
from danube_jax.training.signals import StopRequest
from danube_jax.training.spike_guard import SpikeGuard, skip_reason
from danube_jax.training.step import (
    TrainState,
    init_state,
    make_train_step,
    state_shardings,
    state_specs,
)
from danube_jax.training.task import Evaluator, Task
from danube_jax.training.terminal import TrainingDisplay, announce
from danube_jax.training.workdir import (
    CHECKPOINTS,
    claim_workdir,
    keep_tokenizer,
)


@dataclasses.dataclass
class _Pending:
    """A dispatched step whose metrics are still on the device."""

    step: int
    tokens: int
    data_wait: float
    host_metrics: dict[str, float]
    metrics: dict[str, jax.Array]


class Trainer:
    """One process's part of a run: compiled steps, state, and what it writes."""

    def __init__(self, task: Task):
        run, workdir = task.run, task.workdir
        self.task, self.config, self.workdir = task, run, workdir
        self.schedule = task.schedule
        self.mesh = make_mesh()
        self.source = task.batch_source(self.mesh.size)
        self.initialization = task.plan_initialization()
        self._compile_parts()
        self.benchmarks = open_benchmarks(run, workdir, self.mesh, task.tokenizer)
        self.last_step = self._last_step()
        if jax.process_index() == 0:
            claim_workdir(workdir, run)
            keep_tokenizer(workdir, task.tokenizer)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("workdir claimed")
        self.checkpointer = Checkpointer(workdir / CHECKPOINTS, run.checkpoint)
        self.origin: dict[str, Any] | None = None  # what the weights were initialised from
        self.frozen: FrozenWeights | None = None
        self.data_changes: list[str] = []
        self.state = self._restore_or_init()
        self.source = task.begin(self.source, self.frozen, self.evaluator)
        self.step = self.saved_step = int(self.state.step)
        self.writer = MetricsWriter(workdir, self.step) if jax.process_index() == 0 else None
        self.events = EventLog(self.writer, run.model, self.schedule, self.last_step)
        self.display = TrainingDisplay(self.schedule, self.last_step)
        self.phase: Any = None
        self.throughput: Throughput | None = None
        self.stop_agreed = False

    def _compile_parts(self) -> None:
        """Decoder, sharded state layout, and the jitted steps."""
        run, dtype = self.config, DTYPES[self.config.precision.compute]
        self.decoder = Decoder(run.model, dtype, linear_dtype(run.precision))
        self.optimizer = make_optimizer(run.optimizer)
        guard = run.training.spike_guard, run.training.spike_guard_window
        self.spike_guard = SpikeGuard(*guard) if guard[0] else None
        has_frozen = self.task.has_frozen
        abstract = jax.eval_shape(self._fresh_state)
        specs = state_specs(abstract, self.mesh.size, run.training.zero1)
        self.shardings = state_shardings(self.mesh, specs)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.shardings,
        )
        layout: dict[str, Any] = {"mesh": self.mesh, "specs": specs, "compute_dtype": dtype}
        self.train_step = make_train_step(
            self.task.train_objective(self.decoder),
            self.optimizer,
            learning_rate_schedule(run.optimizer, self.schedule),
            clip_norm=run.optimizer.clip_norm,
            count_name=self.task.count_name,
            has_frozen=has_frozen,
            fp8_config=run.precision.fp8_config,
            spike_guard=self.spike_guard,
            **layout,
        )
        objective = self.task.eval_objective(self.decoder)
        eval_step = make_eval_step(objective, has_frozen=has_frozen, **layout)
        bytes_V = np.zeros(run.model.vocab_size, np.float32)
        lengths = self.task.tokenizer.token_byte_lengths()
        bytes_V[: len(lengths)] = lengths
        self.evaluator = Evaluator(eval_step, self.mesh, bytes_V)

    def _last_step(self) -> int:
        total, limit = self.schedule.total_steps, self.config.training.max_steps
        if limit is None or limit >= total:
            return total
        phase = self.schedule.phase_at_step(limit - 1)
        warn(
            f"training.max_steps={limit} ends the run in phase {phase.name!r}, before its "
            f"{total} steps; the learning rate still follows the whole schedule"
        )
        return limit

    def _fresh_state(self) -> TrainState:
        key = jax.random.key(self.config.training.seed)
        fp8_config = self.config.precision.fp8_config
        params = self.task.fresh_params(key)
        return init_state(params, self.optimizer, fp8_config, self.spike_guard)

    def _restore_or_init(self) -> TrainState:
        restored = self.checkpointer.restore_latest(self.abstract_state)
        if restored is None and self.initialization is not None:
            self.initialization.announce()
            self.origin = self.initialization.describe()
        if restored is None:
            return self._first_state()
        state, meta = restored
        self.frozen = self._load_frozen(meta.get("frozen"))
        self.origin = meta.get("init_from")
        changes = describe_mismatch(meta["data"], self.task.fingerprint)
        if changes and not self.config.checkpoint.allow_data_change:
            raise UserError(
                f"{self.workdir}: the data is not what this run was trained on "
                f"({'; '.join(changes)}); bring it back, or accept the change with "
                "--config.checkpoint.allow_data_change=True"
            )
        self.data_changes = changes
        for change in changes:
            warn(f"resuming on changed data: {change}")
        if meta["devices"] != self.mesh.size:
            warn(
                f"the checkpoint was written with {meta['devices']} devices and this run has "
                f"{self.mesh.size}: same data, losses equal within rounding"
            )
        return state

    def _first_state(self) -> TrainState:
        self.frozen = self._load_frozen(None)
        if self.initialization is None or self.config.lora.rank:
            return jax.jit(self._fresh_state, out_shardings=self.shardings)()
        return self.initialization.state(self.optimizer, self._fresh_state, self.shardings)

    def _load_frozen(self, expected: dict[str, str] | None) -> FrozenWeights | None:
        return self.task.load_frozen(self.mesh, self.decoder.dtype, expected)

    @property
    def _frozen_argument(self) -> Any:
        """What the compiled steps take besides the state."""
        return self.frozen.params if self.task.has_frozen and self.frozen is not None else None

    def run(self, stop: StopRequest) -> int:
        """Trains to the last step and reports; returns the exit status."""
        announce(self.config, self.workdir, self.schedule, self.task.notes())
        if 0 < self.step < self.last_step:
            info(f"resuming at step {self.step} of {self.last_step}")
        if jax.process_count() > 1:  # one process cannot stop on its own
            stop.defer()
        if self.step >= self.last_step:
            if not self._evaluate_if_missing(stop):
                return EXIT_INTERRUPTED
            info("this run is complete; nothing was trained")
            self._summarize()
            return 0
        self.events.begin(self.state, self.checkpointer.damaged, self.origin, self.data_changes)
        interrupted = False
        if self._evaluation_due() or (self.step == 0 and self.config.evaluation.at_start):
            interrupted = not self._evaluate_if_missing(stop)
        if not interrupted:
            with self.display:
                try:
                    interrupted = self._train_steps(stop)
                except WorkersDied:
                    if jax.process_count() == 1:
                        self._save()
                    raise
        self.checkpointer.wait()
        if interrupted:
            self.events.record(STOPPED, self.step)
            info(f"saved at step {self.step}; the same command continues from there")
            return EXIT_INTERRUPTED
        self._summarize()
        return 0

    def _train_steps(self, stop: StopRequest) -> bool:
        """Steps up to the last one; True where the run was asked to stop before it."""
        config = self.config.checkpoint
        pending: _Pending | None = None
        frozen = () if self._frozen_argument is None else (self._frozen_argument,)
        for batch, data_wait, host_metrics in self._device_batches(stop):
            if pending is not None and self.schedule.phase_at_step(self.step) is not self.phase:
                self._finish(pending)
                pending = None
            entered = self._enter_phase()
            self.state, metrics = self.train_step(
                self.state, batch, self._stop_flags(stop), *frozen
            )
            self.step += 1
            stop.defer()
            if pending is not None:
                self._finish(pending)
            pending = _Pending(self.step, batch["tokens"].size, data_wait, host_metrics, metrics)
            stopping = self.stop_agreed or (jax.process_count() == 1 and stop.requested)
            last = self.step == self.last_step
            save = stopping or last or self.step % config.every_steps == 0
            if entered or save or self._evaluation_due():
                self._finish(pending, compiled=entered)
                pending = None
            if save:
                self._save()
            if stopping and not last:
                return True
            if self._evaluation_due() and not self._evaluate_if_missing(stop):
                if not save:
                    self._save()
                return True
            if pending is None:  # compiling, saving and evaluating are not the speed of training
                self.throughput.reset()
        if self.step < self.last_step:  # the loader's workers were stopped, too
            self._save()
            return True
        return False

    def _device_batches(
        self, stop: StopRequest
    ) -> Iterator[tuple[dict[str, jax.Array], float, dict[str, float]]]:
        """Global batches from the next step on, one transferred ahead.

        With the seconds waited for each, and the task's figures of it.
        """
        alone = jax.process_count() == 1
        batches = read_batches(
            self.source,
            self.step,
            self.last_step,
            num_workers=self.config.data.num_workers,
            prefetch=self.config.data.prefetch,
            stopping=lambda: alone and stop.requested,
        )
        ahead: tuple[dict[str, jax.Array], float, dict[str, float]] | None = None
        while True:
            start = time.perf_counter()
            host_batch = next(batches, None)
            waited = time.perf_counter() - start
            if host_batch is None:
                break
            device_batch = put_batch(self.mesh, host_batch)
            if ahead is not None:
                yield ahead
            ahead = (device_batch, waited, self.task.batch_metrics(host_batch))
        if ahead is not None:
            yield ahead

    def _stop_flags(self, stop: StopRequest) -> jax.Array:
        sharding = NamedSharding(self.mesh, P(DATA_AXIS))
        local = np.full(jax.local_device_count(), int(stop.requested), np.int32)
        return jax.make_array_from_process_local_data(sharding, local)

    def _enter_phase(self) -> bool:
        """Prepares for the phase of the coming step; True where it is a new one."""
        phase = self.schedule.phase_at_step(self.step)
        if phase is self.phase:
            return False
        self.phase = phase
        self.display.enter_phase(phase)
        if self.step == phase.first_step > 0:
            self.events.record(PHASE, self.step, phase=phase.name, context=phase.context)
        self.throughput = Throughput(
            flops_per_token(self.config.model, phase.context),
            jax.devices()[0].device_kind,
            self.mesh.size,
        )
        return True

    def _finish(self, pending: _Pending, *, compiled: bool = False) -> None:
        """Fetches a step's metrics, acts on them, and logs them where due.

        A step that was `compiled` has no speed.
        """
        metrics = {key: value.item() for key, value in jax.device_get(pending.metrics).items()}
        for key in ("loss_bound", "grad_norm_bound"):  # the spike guard's, once it judges
            if metrics.get(key) == math.inf:
                del metrics[key]
        self.stop_agreed |= metrics.pop("stop") > 0
        self.throughput.add(pending.tokens, pending.data_wait)
        if metrics["skipped_in_a_row"]:
            self._on_skip(pending.step, metrics)
        self.display.update(pending.step, metrics["loss"])
        if pending.step % self.config.training.log_every and pending.step != self.last_step:
            return
        rates = self.throughput.read()
        if compiled:
            rates = dict.fromkeys(rates)
        self.throughput.reset()
        row = {
            "kind": "train",
            "step": pending.step,
            "tokens": self.schedule.tokens_at_step(pending.step),
            "phase": self.phase.name,
            "context": self.phase.context,
            **metrics,
            **pending.host_metrics,
            **rates,
            "memory_bytes": memory_bytes(),
        }
        if self.writer is not None:
            self.writer.write(row)
        self.display.log(row)

    def _on_skip(self, step: int, metrics: dict[str, Any]) -> None:
        limit = self.config.training.max_skipped_steps
        warn(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: "
            f"{skip_reason(metrics)}: update skipped ({metrics['skipped_in_a_row']} in a row, "
            f"{metrics['skipped']} in all)"
        )
        self.events.skipped(step, metrics)
        if metrics["skipped_in_a_row"] >= limit:
            self.events.record(DIVERGED, step, in_a_row=limit)
            self.checkpointer.wait()
            steps = self.checkpointer.steps()
            raise RunError(
                f"{limit} updates in a row were skipped, at step {step}, the last one since "
                f"{skip_reason(metrics)}: the run has diverged; "
                f"the last checkpoint is {f'step {steps[-1]}' if steps else 'none yet'}; lower "
                "optimizer.learning_rate or optimizer.clip_norm and start again from there"
            )

    def _save(self) -> None:
        """Begins to write a checkpoint, unless this step has one."""
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        self.checkpointer.save(
            self.step,
            self.state,
            {
                "step": self.step,
                "tokens": self.schedule.tokens_at_step(self.step),
                "data": dict(self.task.fingerprint),
                "devices": self.mesh.size,
                "init_from": self.origin,
            }
            | self.task.checkpoint_meta(self.frozen),
        )

    def _evaluation_due(self) -> bool:
        return self._heldout_due() or self.benchmarks.due(self.step, self.last_step)

    def _heldout_due(self) -> bool:
        every = self.config.evaluation.every_steps
        on_schedule = every and self.step and self.step % every == 0
        return self.task.can_evaluate() and bool(on_schedule or self.step == self.last_step)

    def _evaluate_if_missing(self, stop: StopRequest) -> bool:
        """Evaluates and samples at this step, unless metrics.jsonl has it from before a stop.

        False where a signal came, and what is missing is left for later: it may take longer than
        the notice that a machine gives. A run of several processes finishes it, since none of them
        can leave alone.
        """
        alone = jax.process_count() == 1
        if alone and stop.requested:
            return False
        try:
            with stop.at_once() if alone else contextlib.nullcontext():
                self._evaluate_heldout_if_missing()
        except Interrupted as interrupted:
            if not stop.deferred:
                raise
            interrupted.handled()
            warn(f"{interrupted}: saving, then stopping; once more ends at once")
            return False
        if not self.benchmarks.due(self.step, self.last_step):
            return True
        tokens = self.schedule.tokens_at_step(self.step)
        params = self._whole_params() if self.config.lora.rank else self.state.params
        return self.benchmarks.run_if_missing(
            params, self.step, tokens, self.writer, lambda: stop.requested
        )

    def _evaluate_heldout_if_missing(self) -> None:
        at_start = self.step == 0 and self.config.evaluation.at_start
        missing = (
            self.writer is not None
            and (self._heldout_due() or at_start)
            and self.task.can_evaluate()
            and not any(row["step"] == self.step for row in self.writer.evaluations)
        )
        if jax.process_count() > 1:
            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        if missing:
            self._evaluate()
            self._sample()

    def _whole_params(self) -> Any:
        """Adapters merged into their base, on every device."""
        merge = jax.jit(self.task.whole_params, out_shardings=NamedSharding(self.mesh, P()))
        return merge(self.state.params, self._frozen_argument)

    def _evaluate(self) -> None:
        phase = self.schedule.phase_at_step(max(self.step - 1, 0))
        row: dict[str, Any] = {
            "kind": "evaluation",
            "step": self.step,
            "tokens": self.schedule.tokens_at_step(self.step),
            "phase": phase.name,
            "context": phase.context,
        }
        row |= self.task.evaluate(
            self.state.params, self._frozen_argument, self.evaluator, self.step
        )
        if self.writer is not None:
            self.writer.write(row)
        self.display.log_evaluation(row)

    def _sample(self) -> None:
        """Continues the configured prompts; process 0 generates from a copy of the weights."""
        config, task = self.config.samples, self.task
        if not config.prompts:
            return
        replicate = jax.jit(lambda p: p, out_shardings=NamedSharding(self.mesh, P()))
        params = jax.tree.map(lambda x: x.addressable_data(0), replicate(self.state.params))
        if self.writer is None:
            return
        if self.frozen is not None:
            frozen = jax.tree.map(lambda x: x.addressable_data(0), self.frozen.params)
            params = task.whole_params(params, frozen)
        eos_id = task.tokenizer.eos_id
        prompts = [task.encode_prompt(prompt) for prompt in config.prompts]
        generator = Generator(self.config.model, params, dtype=self.decoder.dtype)
        sampling = SamplingConfig(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            stop_tokens=() if eos_id is None else (eos_id,),
            seed=self.config.training.seed,
        )
        completions = generator.generate(prompts, sampling)
        texts = [
            task.sample_text(prompt, ids, completion.tokens)
            for prompt, ids, (completion,) in zip(config.prompts, prompts, completions, strict=True)
        ]
        self.display.log_samples(self.step, config.prompts, texts)
        self.writer.write_samples(self.step, texts)

    def _summarize(self) -> None:
        """Tables of the end, and the event, unless it stands in metrics.jsonl already."""
        if self.writer is not None:
            baselines = self.task.baselines()
            if self.writer.finished != self.step:
                self.events.record(FINISHED, self.step, unigram=baselines)
            self.task.summarize(self.writer.evaluations, baselines)

    def close(self) -> None:
        """Waits for checkpoints and closes files."""
        self.checkpointer.close()
        self.benchmarks.close()
        if self.writer is not None:
            self.writer.close()
