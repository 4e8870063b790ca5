"""The phase schedule: which source and which window every sequence of a run is.

A sample is a pure function of (config, token counts, global sequence number). Nothing is drawn
while the run goes on, so that the state of the data is one counter.

*Which source.* Inside a phase a table of up to 65,536 sequences repeats. It gives every source its
largest-remainder share and spreads it evenly: every prefix of the table holds less than one
sequence more or less than the source's rate asks for.

*Which window.* A source is a stream of blocks of the run's longest context, block after block of
one epoch in pseudo-random order, then the next epoch with another order and another offset. A
phase takes the blocks right after those of earlier phases and cuts its own shorter windows inside
them, so no position is read twice before the source is used up, whatever the context lengths.
"""

import dataclasses
import fractions
import heapq
import itertools
from collections.abc import Mapping

import numpy as np

from danube_jax import files
from danube_jax.config import RunConfig
from danube_jax.data import permutation
from danube_jax.errors import UserError

MAX_PERIOD = 65_536
ORDER_VERSION = 1  # changes when the same config would give another order of samples


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase with its place in the run; all counts are exact Python integers.

    Attributes:
      first_step, first_token, first_sequence: steps, tokens and sequences of the run before it.
      steps, tokens, num_sequences: its own.
      batch_tokens, sequences: tokens and sequences a step.
      context: tokens a sequence.
      mixture: (source, weight) pairs with positive weights, in the order of the config.
    """

    index: int
    name: str
    first_step: int
    steps: int
    first_token: int
    tokens: int
    batch_tokens: int
    context: int
    first_sequence: int
    mixture: tuple[tuple[str, float], ...]

    @property
    def sequences(self) -> int:
        return self.batch_tokens // self.context

    @property
    def num_sequences(self) -> int:
        return self.steps * self.sequences


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """The run's phases one after another.

    Attributes:
      phases: at least one.
      block: the longest context of the run, in tokens.
      sources: names of the sources that some phase reads, in the order of the config.
    """

    phases: tuple[Phase, ...]
    block: int
    sources: tuple[str, ...]

    @classmethod
    def from_config(cls, run: RunConfig) -> "PhaseSchedule":
        """The schedule of a validated config."""
        phases, step, token, sequence = [], 0, 0, 0
        for i, row in enumerate(run.phases):
            batch = row.batch_tokens or run.training.batch_tokens
            mixture = tuple((name, weight) for name, weight in row.mixture.items() if weight > 0)
            phase = Phase(
                index=i,
                name=row.name,
                first_step=step,
                steps=row.tokens // batch,
                first_token=token,
                tokens=row.tokens,
                batch_tokens=batch,
                context=row.context_length,
                first_sequence=sequence,
                mixture=mixture,
            )
            phases.append(phase)
            step += phase.steps
            token += phase.tokens
            sequence += phase.num_sequences
        used = {name for phase in phases for name, _ in phase.mixture}
        return cls(
            phases=tuple(phases),
            block=max(phase.context for phase in phases),
            sources=tuple(name for name in run.data.sources if name in used),
        )

    @property
    def total_steps(self) -> int:
        return self.phases[-1].first_step + self.phases[-1].steps

    @property
    def total_tokens(self) -> int:
        return self.phases[-1].first_token + self.phases[-1].tokens

    @property
    def total_sequences(self) -> int:
        return self.phases[-1].first_sequence + self.phases[-1].num_sequences

    def phase_at_step(self, step: int) -> Phase:
        """The phase that step `step` (counted from 0) belongs to.

        Raises:
          IndexError: the step is not one of the run's.
        """
        for phase in self.phases:
            if 0 <= step < phase.first_step + phase.steps:
                return phase
        raise IndexError(f"step {step} is outside the run of {self.total_steps} steps")

    def tokens_at_step(self, step: int) -> int:
        """Tokens read before step `step` begins; `total_steps` gives the run's tokens.

        Raises:
          IndexError: the step is neither one of the run's nor its end.
        """
        if step == self.total_steps:
            return self.total_tokens
        phase = self.phase_at_step(step)
        return phase.first_token + (step - phase.first_step) * phase.batch_tokens

    def first_sequence_at_step(self, step: int) -> int:
        """Global number of the first sequence of step `step`.

        Raises:
          IndexError: the step is not one of the run's.
        """
        phase = self.phase_at_step(step)
        return phase.first_sequence + (step - phase.first_step) * phase.sequences


@dataclasses.dataclass(frozen=True)
class MixTable:
    """Which source each sequence of a phase reads, as a table that repeats.

    Attributes:
      source: int16 [P], position in the phase's mixture.
      rank: int32 [P], how many earlier entries of the table have the same source.
      counts: int64 [sources], entries of each source in the table.
    """

    source: np.ndarray
    rank: np.ndarray
    counts: np.ndarray

    @classmethod
    def build(cls, weights: tuple[float, ...], period: int) -> "MixTable":
        """Largest-remainder shares of `period`, spread by `spread_evenly`."""
        counts = largest_remainder(weights, period)
        source = spread_evenly(counts)
        rank = np.empty(period, np.int32)
        for i, count in enumerate(counts):
            rank[source == i] = np.arange(count)
        return cls(source, rank, np.array(counts, np.int64))

    def totals(self, sequences: int) -> list[int]:
        """Entries of each source among the first `sequences` of the repeated table."""
        periods, rest = divmod(sequences, len(self.source))
        tail = np.bincount(self.source[:rest], minlength=len(self.counts))
        pairs = zip(self.counts.tolist(), tail.tolist(), strict=True)
        return [periods * count + more for count, more in pairs]


def largest_remainder(weights: tuple[float, ...], total: int) -> list[int]:
    """Shares `total` out in whole numbers; each is within one of its exact share."""
    exact = [fractions.Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    counts = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def spread_evenly(counts: list[int]) -> np.ndarray:
    """Orders `counts[i]` entries of each i so that every prefix is fair.

    In a prefix of n entries, i appears less than one time more or less than n·counts[i]/total
    (R. Tijdeman, The chairman assignment problem, 1980): each appearance has a first and a last
    allowed place, and among those that may come, the one with the earliest last place does.

    Returns:
      int16 [sum(counts)].
    """
    total = sum(counts)
    slack = max(2, 2 * sum(count > 0 for count in counts) - 2)
    jobs = []
    for i, count in enumerate(counts):
        if count:
            turn = np.arange(count, dtype=np.int64) * slack
            release = -(-total * (turn + 1) // (slack * count))
            deadline = total * (turn + slack - 1) // (slack * count)
            jobs += zip(release.tolist(), deadline.tolist(), itertools.repeat(i))
    jobs.sort(reverse=True)
    ready: list[tuple[int, int]] = []
    out = np.empty(total, np.int16)
    for place in range(1, total + 1):
        while jobs and jobs[-1][0] <= place:
            _, deadline, i = jobs.pop()
            heapq.heappush(ready, (deadline, i))
        out[place - 1] = heapq.heappop(ready)[1]
    return out


@dataclasses.dataclass(frozen=True)
class SourceUse:
    """What a run reads of one source.

    Attributes:
      tokens: the source's size.
      windows: sequences read in each phase.
      blocks: blocks taken in each phase.
      blocks_an_epoch: whole blocks in the source.
    """

    tokens: int
    windows: tuple[int, ...]
    blocks: tuple[int, ...]
    blocks_an_epoch: int

    @property
    def epochs(self) -> fractions.Fraction:
        """How many times the run goes through the source, exactly."""
        return fractions.Fraction(sum(self.blocks), self.blocks_an_epoch)


class SampleOrder:
    """Maps global sequence numbers to (source, window).

    Attributes:
      schedule: the phases.
      sources: names; results hold positions in it.
      use: source name → `SourceUse`.
    """

    def __init__(self, schedule: PhaseSchedule, source_tokens: Mapping[str, int], seed: int):
        """Builds the tables.

        Args:
          schedule: the phases.
          source_tokens: tokens of each source that the schedule reads.
          seed: of every pseudo-random order.

        Raises:
          UserError: a source is missing or smaller than one block.
        """
        self.schedule, self.sources = schedule, schedule.sources
        self._seed = seed
        self._tables = [_mix_table(phase) for phase in schedule.phases]
        self.use = _source_use(schedule, self._tables, source_tokens)

    def locate(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where sequences begin; a window is context + 1 tokens, the last one a target only.

        Args:
          sequences: integer [N], global sequence numbers.

        Returns:
          int16 [N], position of the source in `sources`; int64 [N], position of the window's
          first token in the source.

        Raises:
          IndexError: a number is not one of the run's.
        """
        sequences = np.asarray(sequences, np.int64)
        phases = self.schedule.phases
        firsts = np.array([phase.first_sequence for phase in phases], np.int64)
        total = self.schedule.total_sequences
        if sequences.size and (sequences.min() < 0 or sequences.max() >= total):
            raise IndexError(f"sequence numbers beyond the run's {total}")
        which = np.searchsorted(firsts, sequences, side="right") - 1
        source = np.empty(sequences.shape, np.int16)
        start = np.empty(sequences.shape, np.int64)
        for i in np.unique(which).tolist():
            chosen = np.flatnonzero(which == i)
            source[chosen], start[chosen] = self._locate_in(phases[i], sequences[chosen])
        return source, start

    def _locate_in(self, phase: Phase, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self._tables[phase.index]
        period, place = np.divmod(sequences - phase.first_sequence, len(table.source))
        entry = table.source[place]
        ordinal = period * table.counts[entry] + table.rank[place]
        source = np.empty(len(sequences), np.int16)
        start = np.empty(len(sequences), np.int64)
        for i in np.unique(entry).tolist():
            chosen = np.flatnonzero(entry == i)
            name = phase.mixture[i][0]
            source[chosen] = self.sources.index(name)
            start[chosen] = self._window_starts(phase, name, ordinal[chosen])
        return source, start

    def _window_starts(self, phase: Phase, name: str, ordinal: np.ndarray) -> np.ndarray:
        """Start of the windows that are the ordinal-th of the source in the phase."""
        use, block = self.use[name], self.schedule.block
        windows_a_block = block // phase.context
        blocks_an_epoch = use.blocks_an_epoch
        first_block = sum(use.blocks[: phase.index])
        end_block = first_block + use.blocks[phase.index]
        stream = first_block * windows_a_block + ordinal
        epochs = stream // (windows_a_block * blocks_an_epoch)
        start = np.empty(len(ordinal), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == epoch)
            # The part of this epoch that the phase reads, shuffled as a whole.
            low = max(first_block, epoch * blocks_an_epoch)
            high = min(end_block, (epoch + 1) * blocks_an_epoch)
            window = permutation.permute(
                stream[chosen] - low * windows_a_block,
                (high - low) * windows_a_block,
                *(self._seed, name, "windows", phase.index, epoch),
            )
            inside, part = np.divmod(window, windows_a_block)
            turn = inside + (low - epoch * blocks_an_epoch)
            key = (self._seed, name, "blocks", epoch)
            place = permutation.permute(turn, blocks_an_epoch, *key)
            slack = use.tokens - 1 - blocks_an_epoch * block
            offset = permutation.draw(slack + 1, self._seed, name, "offset", epoch)
            start[chosen] = offset + place * block + part * phase.context
        return start


def source_use(schedule: PhaseSchedule, source_tokens: Mapping[str, int]) -> dict[str, SourceUse]:
    """What the run reads of each source, from token counts alone.

    Raises:
      UserError: a source is missing or smaller than one block.
    """
    return _source_use(schedule, [_mix_table(phase) for phase in schedule.phases], source_tokens)


def sequences_read(schedule: PhaseSchedule, step: int) -> list[dict[str, int]]:
    """For each phase, how many sequences of each source of its mixture the first `step` steps read.

    Exact: which source a sequence is from depends on nothing but its number.
    """
    read = []
    for phase in schedule.phases:
        steps = min(max(step - phase.first_step, 0), phase.steps)
        totals = _mix_table(phase).totals(steps * phase.sequences)
        names = [name for name, _ in phase.mixture]
        read.append(dict(zip(names, totals, strict=True)))
    return read


def check_repetition(run: RunConfig, use: Mapping[str, SourceUse]) -> None:
    """Refuses a run that repeats a source more often than its `max_epochs`.

    Raises:
      UserError: names the source, what is needed, what there is and what would be valid.
    """
    block = max(phase.context_length for phase in run.phases)
    for name, source in use.items():
        most = run.data.sources[name].max_epochs
        if source.epochs <= fractions.Fraction(most):
            continue
        blocks = sum(source.blocks)
        least = int(-(-blocks // fractions.Fraction(most))) * block + 1
        allowed = -(-source.epochs * 100 // 1) / 100
        raise UserError(
            f"config.data.sources.{name}.max_epochs: the run needs {blocks * block:,} tokens of "
            f"{name!r}, which has {source.tokens:,}: {float(source.epochs):.2f} epochs, more than "
            f"{most:g}; use at least {least:,} tokens of it, a lower weight or fewer tokens in the "
            f"phases, or max_epochs of at least {float(allowed):.2f}"
        )


def data_fingerprint(run: RunConfig, stores: Mapping[str, str], tokenizer: str) -> dict[str, str]:
    """Short hashes, by name, of everything that decides which tokens come when.

    Args:
      run: the config.
      stores: source name → fingerprint of its training store.
      tokenizer: fingerprint of the tokenizer.
    """
    schedule = PhaseSchedule.from_config(run)
    parts = {f"source {name}": stores[name] for name in schedule.sources}
    parts |= {"tokenizer": tokenizer, "training.seed": run.training.seed}
    parts |= {"data.mask_documents": run.data.mask_documents, "longest context": schedule.block}
    for phase in schedule.phases:
        parts[f"phase {phase.index} ({phase.name})"] = dataclasses.asdict(phase)
    parts["order of samples"] = ORDER_VERSION
    return {name: files.sha256_json(part)[:12] for name, part in parts.items()}


def describe_mismatch(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs between two data fingerprints, a phrase each; empty where nothing does."""
    out = []
    for name in {**old, **new}:
        if name not in new:
            out.append(f"{name} is gone")
        elif name not in old:
            out.append(f"{name} is new")
        elif old[name] != new[name]:
            out.append(f"{name} changed ({old[name]} to {new[name]})")
    return out


def _mix_table(phase: Phase) -> MixTable:
    weights = tuple(weight for _, weight in phase.mixture)
    return MixTable.build(weights, min(phase.num_sequences, MAX_PERIOD))


def _source_use(
    schedule: PhaseSchedule, tables: list[MixTable], source_tokens: Mapping[str, int]
) -> dict[str, SourceUse]:
    block = schedule.block
    windows = {name: [0] * len(schedule.phases) for name in schedule.sources}
    for phase, table in zip(schedule.phases, tables, strict=True):
        totals = table.totals(phase.num_sequences)
        for (name, _), total in zip(phase.mixture, totals, strict=True):
            windows[name][phase.index] = total
    out = {}
    for name, counts in windows.items():
        if name not in source_tokens:
            raise UserError(f"config.data.sources.{name}: no token store for this source")
        tokens = int(source_tokens[name])
        if tokens <= block:
            raise UserError(
                f"config.data.sources.{name}: {tokens:,} tokens are fewer than one block of the "
                f"longest context ({block:,}) and its last target; expected at least "
                f"{block + 1:,} tokens, or shorter contexts in config.phases"
            )
        blocks = (
            -(-count * phase.context // block)
            for count, phase in zip(counts, schedule.phases, strict=True)
        )
        out[name] = SourceUse(tokens, tuple(counts), tuple(blocks), (tokens - 1) // block)
    return out
