"""From token stores to batches: a random-access source of whole steps, loaded with Grain.

The element at index t is the batch of step t, so the loader's state is the step counter: resuming
is starting at that index, with any number of processes, devices and workers.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

import grain
import numpy as np
from absl import flags

from danube_jax.config import DataConfig, RunConfig
from danube_jax.console import warn
from danube_jax.data.phases import Phase, PhaseSchedule, SampleOrder, check_repetition
from danube_jax.data.token_store import TokenStore
from danube_jax.errors import RunError, UserError

Batch = dict[str, np.ndarray]

AUTO_VERIFY_BYTES = 8 * 2**30
READ_THREADS = 2
MAX_WORKER_DEATHS = 3  # with fewer batches than this between one and the next:
FORGIVING_BATCHES = 1_000


def open_stores(
    data: DataConfig, paths: Mapping[str, str], tokenizer: str | None = None
) -> dict[str, TokenStore]:
    """Opens stores and checks them as `data.verify` says.

    Args:
      data: the config's data section.
      paths: source name → folder.
      tokenizer: fingerprint that every store must carry; None skips this check.

    Raises:
      UserError: a store is missing, unfinished, damaged, or of another tokenizer.
    """
    stores = {name: TokenStore.open(path) for name, path in paths.items()}
    for name, store in stores.items():
        if tokenizer is not None and store.tokenizer != tokenizer:
            raise UserError(
                f"config.data.sources.{name}: {store.path} was written with the tokenizer "
                f"{store.tokenizer[:12]}, the run uses {tokenizer[:12]}; expected the same: choose "
                "the store's tokenizer in config.data.tokenizer, or prepare the data again"
            )
    size = sum(store.size_on_disk for store in stores.values())
    if data.verify == "always" or (data.verify == "auto" and size <= AUTO_VERIFY_BYTES):
        for store in stores.values():
            store.verify()
    return stores


def micro_batches(run: RunConfig, phase: Phase, devices: int) -> tuple[int, int]:
    """How a step of a phase is cut: (micro-batches A, rows B of a global micro-batch).

    Raises:
      UserError: `training.microbatch_tokens`, the devices and the batch do not divide; names
        values that would.
    """
    rows = phase.sequences
    where = f"phase {phase.name!r} with batches of {rows:,} sequences of {phase.context:,} tokens"
    if rows % devices:
        raise UserError(
            f"config.training.batch_tokens: {where} cannot be split over {devices} devices; "
            f"expected a multiple of {devices * phase.context:,} tokens, such as "
            f"{max(1, round(rows / devices)) * devices * phase.context:,}"
        )
    micro = run.training.microbatch_tokens
    if micro is None:
        return 1, rows
    a_device = rows // devices
    micro_rows = micro // phase.context
    if micro % phase.context or a_device % micro_rows:
        valid = [n * phase.context for n in range(1, a_device + 1) if a_device % n == 0]
        near = sorted(sorted(valid, key=lambda tokens: abs(tokens - micro))[:6])
        raise UserError(
            f"config.training.microbatch_tokens: {micro:,} does not divide {where} on {devices} "
            f"devices; valid values are {', '.join(f'{tokens:,}' for tokens in near)}"
        )
    return a_device // micro_rows, micro_rows * devices


class BatchSource(grain.sources.RandomAccessDataSource):
    """Random access to this process's share of every step's batch.

    Element t is a dict of arrays [A, B_local, T]: A micro-batches a step, of whose B rows process
    p of P holds [p·B/P, (p+1)·B/P), and T the context length of the step's phase. Row r of
    micro-batch a is sequence ``first_sequence_at_step(t) + a·B + r``.

      tokens, targets  int32; targets are tokens moved on by one
      weights          float32, 1 where the target counts
      segment_ids      int32, with `mask_documents` only: equal numbers in a row mean the same
                       document; a target in another document than its token has weight 0
    """

    def __init__(
        self,
        run: RunConfig,
        stores: Mapping[str, TokenStore],
        *,
        devices: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the whole run; nothing is read yet.

        Args:
          run: the config.
          stores: source name → training store; sources that no phase reads are not needed.
          devices: devices of all processes together.
          process_index, process_count: this process and the number of them.

        Raises:
          UserError: a source is missing, too small or repeated too often, or batch, devices and
            processes do not divide.
        """
        if devices % process_count:
            raise UserError(f"{devices} devices are not the same number on {process_count} hosts")
        self.schedule = PhaseSchedule.from_config(run)
        tokens = {name: store.tokens for name, store in stores.items()}
        self.order = SampleOrder(self.schedule, tokens, run.training.seed)
        check_repetition(run, self.order.use)
        self._stores = [stores[name] for name in self.order.sources]
        self._cuts = [micro_batches(run, phase, devices) for phase in self.schedule.phases]
        self._process_index, self._process_count = process_index, process_count
        self._mask_documents = run.data.mask_documents

    def __repr__(self) -> str:
        return f"BatchSource({len(self)} steps)"

    def __len__(self) -> int:
        return self.schedule.total_steps

    def __getitem__(self, step: int) -> Batch:
        phase = self.schedule.phase_at_step(int(step))
        micro, rows = self._cuts[phase.index]
        local = rows // self._process_count
        first = self.schedule.first_sequence_at_step(int(step)) + self._process_index * local
        sequences = first + np.arange(micro)[:, None] * rows + np.arange(local)
        source, start = self.order.locate(sequences.ravel())
        return self._read(source, start, (micro, local, phase.context))

    def _read(self, source: np.ndarray, start: np.ndarray, shape: tuple[int, int, int]) -> Batch:
        context = shape[-1]
        flat = (len(source), context)
        batch = {key: np.empty(flat, np.int32) for key in ("tokens", "targets")}
        batch["weights"] = np.ones(flat, np.float32)
        if self._mask_documents:
            batch["segment_ids"] = np.empty(flat, np.int32)
        for i in np.unique(source).tolist():
            chosen = np.flatnonzero(source == i)
            _fill(batch, chosen, self._stores[i], start[chosen], context)
        return {key: value.reshape(shape) for key, value in batch.items()}


def _fill(
    batch: Batch, rows: np.ndarray, store: TokenStore, starts: np.ndarray, context: int
) -> None:
    """Reads windows of context + 1 tokens into the given rows of flat arrays [N, context]."""
    windows = store.read(starts, context + 1)
    batch["tokens"][rows] = windows[:, :-1]
    batch["targets"][rows] = windows[:, 1:]
    if "segment_ids" in batch:
        segments = store.segment_ids(starts, context + 1)
        batch["segment_ids"][rows] = segments[:, :-1]
        batch["weights"][rows] = segments[:, 1:] == segments[:, :-1]


def make_loader(
    source: BatchSource,
    start_step: int = 0,
    stop_step: int | None = None,
    *,
    num_workers: int = 0,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Iterates over the batches of steps [start_step, stop_step), read ahead of their use.

    Args:
      source: the batches.
      start_step, stop_step: None as the end means the run's last step.
      num_workers: processes that read; 0 reads with threads of this process.
      prefetch: batches held ready, over all workers.

    Returns:
      A Grain iterator of `Batch`; `close` ends its workers. A worker that dies makes `next` raise.
    """
    stop = len(source) if stop_step is None else min(stop_step, len(source))
    dataset = grain.MapDataset.source(source)[start_step:stop]
    workers = min(num_workers, len(dataset))
    if not workers:
        options = grain.ReadOptions(min(READ_THREADS, prefetch), prefetch_buffer_size=prefetch)
        return iter(dataset.to_iter_dataset(options))
    # Grain reads absl flags in this process and hands them to its workers.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    ahead = -(-prefetch // workers)
    return iter(
        dataset.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
            worker_init_fn=_begin_worker,
        )
    )


class WorkersDied(RunError):
    """The loader's workers died again and again."""


def read_batches(
    source: BatchSource,
    start_step: int,
    stop_step: int,
    *,
    num_workers: int = 0,
    prefetch: int = 4,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """The batches of `make_loader`, with workers that died replaced: what they read is the same.

    Args:
      source, start_step, stop_step, num_workers, prefetch: as for `make_loader`.
      stopping: says, when a worker has died, whether to end early instead; a signal to all
        processes of a job reaches the workers, too.

    Raises:
      WorkersDied: more than `MAX_WORKER_DEATHS` times, less than `FORGIVING_BATCHES` apart.
      UserError: what a worker could not read.
    """
    step, deaths, last_death = start_step, 0, start_step
    while step < stop_step:
        batches = make_loader(source, step, stop_step, num_workers=num_workers, prefetch=prefetch)
        try:
            for batch in batches:
                yield batch
                step += 1
            return
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain has no class for it
                raise
            if stopping():
                return
            deaths = deaths + 1 if step - last_death < FORGIVING_BATCHES else 1
            last_death, code = step, str(error).partition("exit code ")[2].partition(".")[0]
            if deaths > MAX_WORKER_DEATHS:
                raise WorkersDied(
                    f"a data loader worker died for the {deaths}th time (exit code {code}), at "
                    f"batch {step + 1}: it may have run out of memory; lower "
                    "config.data.num_workers or config.data.prefetch (0 workers read with "
                    "threads) and run the same command again"
                ) from None
            warn(f"a data loader worker died (exit code {code}) at batch {step + 1}: restarting")
        finally:
            batches.close()


def _begin_worker(worker: int, workers: int) -> None:
    """Control-C, which reaches all processes of a terminal, is the parent's; its death ends us."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def heldout_batches(
    store: TokenStore,
    *,
    context: int,
    batch_rows: int,
    tokens: int,
    process_index: int = 0,
    process_count: int = 1,
    mask_documents: bool = False,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Batches of a held-out store from its start on, each target once.

    Args:
      store: the held-out store.
      context: tokens a row.
      batch_rows: rows of a global batch, a multiple of `process_count`.
      tokens: targets to score, or all there are where the store has fewer.
      process_index, process_count: every process gets as many batches, of its own rows.
      mask_documents: as in training.
      pad_id: token of padded places.

    Yields:
      As `BatchSource`, but [B_local, T]; what pads the last window and the last batch has weight
      0 and segment 0. The weights of all processes sum to min(tokens, store.tokens - 1), less the
      targets across documents where these are masked.

    Raises:
      UserError: the rows do not divide, or the store has no target.
    """
    if batch_rows % process_count:
        raise UserError(
            f"held-out batches of {batch_rows} rows do not divide over {process_count} processes"
        )
    targets = min(tokens, store.tokens - 1)
    if targets < 1:
        raise UserError(f"{store.path}: {store.tokens} tokens hold nothing to predict")
    local = batch_rows // process_count
    for first in range(0, targets, batch_rows * context):
        begin = first + process_index * local * context
        starts = np.arange(begin, min(begin + local * context, targets), context)
        yield _heldout_batch(store, starts, (local, context), targets, mask_documents, pad_id)


def _heldout_batch(
    store: TokenStore,
    starts: np.ndarray,
    shape: tuple[int, int],
    targets: int,
    mask_documents: bool,
    pad_id: int,
) -> Batch:
    batch = {key: np.full(shape, pad_id, np.int32) for key in ("tokens", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    if mask_documents:
        batch["segment_ids"] = np.zeros(shape, np.int32)
    for row, start in enumerate(starts.tolist()):
        length = min(shape[1], targets - start)
        part = {key: value[:, :length] for key, value in batch.items()}
        part["weights"][row] = 1
        _fill(part, np.array([row]), store, np.array([start]), length)
    return batch
