"""From a tuning run's config to rows: read, split, tokenise, pack; and batches of them by step.

As in pretraining, a batch is a pure function of the config, the data and the step: the rows of an
epoch are visited in a pseudo-random order that is computed, so that the state is one counter.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from danube_jax import files
from danube_jax.config import RoundConfig, RunConfig, SourceConfig
from danube_jax.console import info, progress, warn
from danube_jax.data import builtin_chat, chat, permutation
from danube_jax.data.chat_examples import ChatEncoder, Dropped, Example, ExamplePair
from danube_jax.data.conversations import COLUMNS as CONVERSATION_COLUMNS
from danube_jax.data.conversations import FORMATS as CONVERSATION_FORMATS
from danube_jax.data.conversations import (
    Conversation,
    place_system_text,
    read_conversations,
)
from danube_jax.data.loader import micro_batches
from danube_jax.data.packing import Batch, Packed, pack_examples, pack_pairs
from danube_jax.data.phases import Phase, PhaseSchedule
from danube_jax.data.preferences import COLUMNS as PREFERENCE_COLUMNS
from danube_jax.data.preferences import FORMATS as PREFERENCE_FORMATS
from danube_jax.data.preferences import PreferencePair, read_preferences
from danube_jax.data.tokenizer_base import Tokenizer
from danube_jax.errors import UserError

Item = Example | ExamplePair
Raw = Conversation | PreferencePair

ORDER_VERSION = 1  # changes when the same config would give other rows or another order
MIN_WIDTH = 64  # of a batch without packing


@dataclasses.dataclass(frozen=True)
class TuningData:
    """Everything a round reads, tokenised and packed.

    Attributes:
      tokenizer: with the run's chat template.
      schedule: one phase, the round.
      items: what is trained on.
      packed: the items of each row.
      heldout: source name → held-out items.
      fingerprint: short hashes, by name, of everything that decides which rows come when.
    """

    tokenizer: Tokenizer
    schedule: PhaseSchedule
    items: tuple[Item, ...]
    packed: Packed
    heldout: Mapping[str, tuple[Item, ...]]
    fingerprint: Mapping[str, str]

    @property
    def padding(self) -> float:
        """Share of the places of all rows that hold no token."""
        places = len(self.packed.rows) * self.schedule.phases[0].context
        return 1.0 - self.packed.used / places


def open_tuning_data(run: RunConfig, tokenizer: Tokenizer) -> TuningData:
    """Reads and tokenises what the run's only round needs.

    Args:
      run: a config of one round.
      tokenizer: the run's; its chat template counts where the config names none.

    Raises:
      UserError: a file, a row or the template does not allow it, or nothing is left to train on.
    """
    (row,) = run.rounds
    tokenizer = _with_template(run, tokenizer)
    limit = run.model.max_position_embeddings
    if row.context_length > limit:
        raise UserError(
            f"config.rounds: a context_length of {row.context_length} is not possible; expected at "
            f"most the model's max_position_embeddings ({limit})"
        )
    encoder = _encoder(run, row, tokenizer)
    train: dict[str, list[Item]] = {}
    heldout: dict[str, tuple[Item, ...]] = {}
    for name in row.sources:
        raw, kept_back = _read_source(run, name)
        train[name] = _encode(run, encoder, name, raw)
        if not train[name]:
            raise UserError(
                f"config.data.sources.{name}: no example is left to train on; expected some that "
                f"fit {encoder.max_length} tokens and have an answer (config.chat.max_length, "
                "config.chat.truncation)"
            )
        if kept_back and (items := _encode(run, encoder, f"{name}, held out", kept_back)):
            heldout[name] = tuple(items)
    items = tuple(item for part in train.values() for item in part)
    lengths = [item.length for item in items]
    packed = Packed.build(lengths, row.context_length, run.chat.packing)
    schedule = _schedule(row, len(packed.rows), {k: len(v) for k, v in train.items()})
    fingerprint = _fingerprint(run, tokenizer, train)
    data = TuningData(tokenizer, schedule, items, packed, heldout, fingerprint)
    info(
        f"round {row.name}: {len(items):,} examples of {np.mean(lengths):.0f} tokens in "
        f"{len(packed.rows):,} rows of {row.context_length:,}, {data.padding:.1%} padding"
    )
    if not heldout:
        warn("no example is held out: nothing will be evaluated")
    return data


def _with_template(run: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    if run.chat.template:
        return tokenizer.with_chat_template(chat.load_template(run.chat.template))
    if tokenizer.chat_template is None:
        return tokenizer.with_chat_template(chat.TEMPLATES[chat.DEFAULT_TEMPLATE])
    return tokenizer


def _encoder(run: RunConfig, row: RoundConfig, tokenizer: Tokenizer) -> ChatEncoder:
    # A row of n places holds n + 1 tokens of one example, or the two sides of a preference.
    longest = row.context_length + 1
    if run.objective == "dpo":
        longest = row.context_length // 2 + 1
    wanted = run.chat.max_length or longest
    if wanted > longest:
        sides = " (two answers share a row)" if run.objective == "dpo" else ""
        raise UserError(
            f"config.chat.max_length: {wanted} is not possible; expected at most {longest} for "
            f"rows of {row.context_length}{sides}"
        )
    return ChatEncoder(
        tokenizer,
        tokenization=run.chat.tokenization,
        mask_prompt=run.chat.mask_prompt,
        max_length=wanted,
        truncation=run.chat.truncation,
    )


def _read_source(run: RunConfig, name: str) -> tuple[list[Raw], list[Raw]]:
    """(training, held-out) rows of a source."""
    source = run.data.sources[name]
    if source.builtin:
        raw = builtin_chat.SOURCES[source.builtin]()[: source.max_examples]
    else:
        raw = _read_rows(run, name, source, source.path, limit=source.max_examples)
    if source.heldout_path:
        return raw, _read_rows(run, name, source, source.heldout_path)
    fraction = run.data.heldout_fraction
    # By the question, so that no question is on both sides.
    back = [_hash(_question(one)) < fraction for one in raw]
    train = [one for one, held in zip(raw, back, strict=True) if not held]
    return train, [one for one, held in zip(raw, back, strict=True) if held]


def _read_rows(
    run: RunConfig, name: str, source: SourceConfig, path: str, limit: int | None = None
) -> list[Raw]:
    preferences = run.objective == "dpo"
    formats = PREFERENCE_FORMATS if preferences else CONVERSATION_FORMATS
    if source.format not in formats:
        raise UserError(
            f"config.data.sources.{name}.format: {source.format!r} is not possible; expected one "
            f"of {', '.join(formats)}"
        )
    known = PREFERENCE_COLUMNS if preferences else CONVERSATION_COLUMNS
    for key in source.columns:
        if key not in known:
            raise UserError(
                f"config.data.sources.{name}.columns: {key!r} is not possible; expected our name "
                f"for a column ({', '.join(known)}) and the file's"
            )
    read = read_preferences if preferences else read_conversations
    found, _ = read(
        path,
        format=source.format,
        columns=source.columns,
        language=source.language,
        on_bad_row=run.chat.on_bad_row,
        limit=limit,
    )
    return list(found)


def _question(raw: Raw) -> str:
    messages = raw.prompt if isinstance(raw, PreferencePair) else raw
    return next(m["content"] for m in messages if m["role"] == "user")


def _hash(text: str) -> float:
    """A pseudo-random number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _encode(run: RunConfig, encoder: ChatEncoder, name: str, raw: Sequence[Raw]) -> list[Item]:
    dropped, out = Dropped(), []
    with progress(f"tokenizing {name}", len(raw), "examples") as advance:
        for one in raw:
            advance(1)
            one = _with_system_text(one, run.chat.system_text)
            encode = encoder.pair if isinstance(one, PreferencePair) else encoder.example
            try:
                item = encode(one, dropped)
            except UserError as error:
                if run.chat.on_bad_row == "skip":
                    dropped.refused += 1
                    continue
                raise UserError(
                    f"config.data.sources.{name}: {error} (an example that begins with "
                    f"{_question(one)[:60]!r}){_system_hint(one)}"
                ) from None
            if item is not None:
                out.append(item)
    note = dropped.describe()
    info(f"{name}: {len(out):,} examples{f' ({note})' if note else ''}")
    return out


def _system_hint(raw: Raw) -> str:
    messages = raw.prompt if isinstance(raw, PreferencePair) else raw
    if messages[0]["role"] != "system":
        return ""
    return "; where it takes no system text: --config.chat.system_text=merge (or drop)"


def _with_system_text(raw: Raw, how: str) -> Raw:
    if isinstance(raw, PreferencePair):
        return dataclasses.replace(raw, prompt=place_system_text(raw.prompt, how))
    return place_system_text(raw, how)


def _schedule(row: RoundConfig, rows: int, examples: Mapping[str, int]) -> PhaseSchedule:
    """The round as a schedule of one phase; its last batch is filled up from the next epoch."""
    steps = max(1, int(np.ceil(rows * row.epochs / row.batch_size - 1e-9)))
    batch_tokens = row.batch_size * row.context_length
    phase = Phase(
        index=0,
        name=row.name,
        first_step=0,
        steps=steps,
        first_token=0,
        tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        context=row.context_length,
        first_sequence=0,
        mixture=tuple((name, float(count)) for name, count in examples.items()),
    )
    return PhaseSchedule((phase,), row.context_length, tuple(row.sources))


def items_digest(items: Sequence[Item]) -> str:
    """SHA-256 of tokens and masks."""
    digest = hashlib.sha256()
    for item in items:
        sides = (item.chosen, item.rejected) if isinstance(item, ExamplePair) else (item,)
        for side in sides:
            digest.update(np.int64(len(side.ids)).tobytes())
            digest.update(side.ids.tobytes())
            digest.update(np.packbits(side.mask).tobytes())
    return digest.hexdigest()


def _fingerprint(
    run: RunConfig, tokenizer: Tokenizer, train: Mapping[str, Sequence[Item]]
) -> dict[str, str]:
    (row,) = run.rounds
    parts = {f"source {name}": items_digest(items) for name, items in train.items()}
    parts |= {"tokenizer": tokenizer.fingerprint, "training.seed": run.training.seed}
    parts |= {"chat.packing": run.chat.packing, "order of rows": ORDER_VERSION}
    parts[f"round {row.name}"] = dataclasses.asdict(row)
    return {name: files.sha256_json(part)[:12] for name, part in parts.items()}


class RowSource(grain.sources.RandomAccessDataSource):
    """Random access to this process's share of every step's batch of rows.

    Element t is a dict of arrays [A, B_local, T] as `pack_examples` or `pack_pairs` describes them,
    and `sequence` int32 [A, B_local], the number of each row in the run. T is the round's context;
    without packing, the shortest of its halves, quarters, ... that holds the step's longest row.
    """

    def __init__(
        self,
        run: RunConfig,
        data: TuningData,
        *,
        devices: int = 1,
        process_index: int = 0,
        process_count: int = 1,
        reference: np.ndarray | None = None,
    ):
        """`reference` float32 [items, 2]: log-probabilities that are handed to the objective.

        Raises:
          UserError: batch, devices and processes do not divide.
        """
        if devices % process_count:
            raise UserError(f"{devices} devices are not the same number on {process_count} hosts")
        self._data, self._seed = data, run.training.seed
        self._phase = data.schedule.phases[0]
        if self._phase.sequences % devices:
            nearest = max(1, round(self._phase.sequences / devices)) * devices
            raise UserError(
                f"config.rounds: the batch_size of {self._phase.sequences} in round "
                f"{self._phase.name!r} cannot be split over {devices} devices; expected a "
                f"multiple, such as {nearest}"
            )
        self._cut = micro_batches(run, self._phase, devices)
        self._process_index, self._process_count = process_index, process_count
        self._packing, self._reference = run.chat.packing, reference

    def __repr__(self) -> str:
        return f"RowSource({len(self)} steps)"

    def __len__(self) -> int:
        return self._phase.steps

    def rows_of(self, sequences: np.ndarray) -> np.ndarray:
        """Which row each sequence of the run is; every epoch visits all rows in an order."""
        rows = len(self._data.packed.rows)
        out = np.empty(len(sequences), np.int64)
        epochs, places = np.divmod(sequences, rows)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = (self._seed, "rows", self._phase.name, epoch)
            out[chosen] = permutation.permute(places[chosen], rows, *key)
        return out

    def __getitem__(self, step: int) -> Batch:
        micro, rows = self._cut
        local = rows // self._process_count
        first = int(step) * self._phase.sequences
        everything = first + np.arange(micro * rows).reshape(micro, rows)
        width = self._width(self.rows_of(everything.ravel()))
        begin = self._process_index * local
        sequences = everything[:, begin : begin + local]
        batch = self._pack(self.rows_of(sequences.ravel()), width)
        batch = {key: value.reshape(micro, local, *value.shape[1:]) for key, value in batch.items()}
        return batch | {"sequence": sequences.astype(np.int32)}

    def _width(self, rows: np.ndarray) -> int:
        width = self._phase.context
        if self._packing == "none":
            longest = max(self._data.items[self._data.packed.rows[row][0]].length for row in rows)
            while width % 2 == 0 and width // 2 >= max(longest, MIN_WIDTH):
                width //= 2
        return width

    def _pack(self, rows: np.ndarray, width: int) -> Batch:
        items = [self._data.packed.rows[row] for row in rows.tolist()]
        batch = pack_items(
            [[self._data.items[i] for i in row] for row in items],
            width,
            self._data.packed.items,
            self._data.tokenizer.pad_id,
        )
        if self._reference is not None:
            batch["reference"] = np.zeros((*batch["pairs"].shape, 2), np.float32)
            for i, row in enumerate(items):
                batch["reference"][i, : len(row)] = self._reference[list(row)]
        return batch


def pack_items(
    rows: Sequence[Sequence[Item]], width: int, most: int, pad_id: int, height: int | None = None
) -> Batch:
    """Rows of examples or of pairs as arrays; `most` is the largest number of pairs in a row."""
    if isinstance(rows[0][0], ExamplePair):
        return pack_pairs(rows, width, most, pad_id, height=height)
    return pack_examples(rows, width, pad_id, height=height)


def fixed_batches(
    items: Sequence[Item],
    *,
    context: int,
    batch_rows: int,
    pad_id: int,
    devices: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[Batch, list[tuple[int, ...]]]]:
    """All items once, packed into batches of at most `batch_rows` rows, a multiple of `devices`.

    A process gets its part of each.

    Yields:
      (arrays [B_local, T], the items of each of the batch's rows on all processes); rows beyond
      the last are padding, with weights and pairs of 0.
    """
    packed = Packed.build([item.length for item in items], context, "best_fit")
    batch_rows = min(batch_rows, -(-len(packed.rows) // devices) * devices)
    local = batch_rows // process_count
    for first in range(0, len(packed.rows), batch_rows):
        rows = packed.rows[first : first + batch_rows]
        whole = pack_items(
            [[items[i] for i in row] for row in rows], context, packed.items, pad_id, batch_rows
        )
        begin = process_index * local
        yield {key: value[begin : begin + local] for key, value in whole.items()}, list(rows)


def limit_tokens(items: Sequence[Item], tokens: int) -> Sequence[Item]:
    """The first items that together have about `tokens` tokens; at least one."""
    total = np.cumsum([item.length for item in items])
    return items[: max(1, int(np.searchsorted(total, tokens, side="right")))]
