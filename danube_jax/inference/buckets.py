"""Static shapes: few sizes that every call is rounded up to, so that few programs are compiled."""

import dataclasses

CHUNK_TOKENS = 512  # of one row that one prefill program takes
DISPATCH_TOKENS = 8_192  # of all rows that one prefill program takes
CPU_DISPATCH_TOKENS = 1_024  # activations that stay in a CPU's cache
ROOM_TOKENS = 512  # new tokens that a cache has room for at first
SLOT_MULTIPLE = 64
MIN_SLOTS = 128
MIN_PREFILL = 16


def rows_bucket(rows: int) -> int:
    """Rows of a batch: a power of two."""
    return 1 << (rows - 1).bit_length()


def prefill_bucket(tokens: int) -> int:
    """Tokens of a prefill: 16, 32, or a multiple of 64."""
    if tokens <= 2 * MIN_PREFILL:
        return MIN_PREFILL if tokens <= MIN_PREFILL else 2 * MIN_PREFILL
    return _round_up(tokens, SLOT_MULTIPLE)


def slots_bucket(times: int) -> int:
    """Slots of a cache: 128, 192, 256, 384, 512, 768, ... (2^n and 3 * 2^n)."""
    power = max(MIN_SLOTS, 1 << (times - 1).bit_length())
    return power * 3 // 4 if power > MIN_SLOTS and times <= power * 3 // 4 else power


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """How prompts are fed, and the cache that holds them and what is drawn first.

    Attributes:
      chunks: (first, length) of the pieces that the prompts are fed in; the last one may reach
        beyond their end.
      rows: rows that are fed at once.
      slots: slots of the cache.
    """

    chunks: tuple[tuple[int, int], ...]
    rows: int
    slots: int

    @property
    def end(self) -> int:
        """Time after the last chunk."""
        return sum(self.chunks[-1])


def plan_prefill(
    start: int,
    prompt: int,
    new_tokens: int,
    *,
    rows: int,
    sliding_window: int | None,
    chunk_tokens: int = CHUNK_TOKENS,
    dispatch_tokens: int = DISPATCH_TOKENS,
) -> PrefillPlan:
    """Chunks and cache for `rows` prompts of `prompt` tokens, `start` of them cached already.

    Without a window the cache has room for the prompt and `ROOM_TOKENS` new tokens, and grows;
    with one it is at most a ring of the window and a chunk.
    """
    chunks = [
        (first, min(chunk_tokens, prefill_bucket(min(chunk_tokens, prompt - first))))
        for first in range(start, prompt, chunk_tokens)
    ]
    at_once = max(1, dispatch_tokens // chunks[0][1])
    plan = PrefillPlan(tuple(chunks), min(rows, rows_bucket(at_once + 1) // 2), 0)
    slots = slots_bucket(max(plan.end, prompt + min(new_tokens, ROOM_TOKENS)))
    ring = ring_slots(sliding_window, chunk_tokens)
    return dataclasses.replace(plan, slots=slots if ring is None else min(slots, ring))


def ring_slots(sliding_window: int | None, chunk_tokens: int) -> int | None:
    """Slots that suffice under a sliding window, however long the text; None without one.

    A chunk of C tokens sees the W - 1 before it, while its own C are written.
    """
    if sliding_window is None:
        return None
    return _round_up(sliding_window + chunk_tokens - 1, SLOT_MULTIPLE)
