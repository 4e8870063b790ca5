"""Preference pairs for DPO: a conversation that ends with a question, and two answers to it.

pairs   a prompt (text or messages), `chosen` and `rejected` (texts, or messages: the answer
        alone or the whole conversation, as in UltraFeedback)
ranked  a prompt and `replies`, each with a text and a `rank` (lowest is best) or a `score`
        (highest is best); the pair is best against worst
oasst   a row a message, as OpenAssistant's data sets (see `message_trees`)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.data.conversations import (
    PROMPT_COLUMNS,
    Conversation,
    Message,
    check_turns,
    find_column,
    parse_messages,
    prompt_messages,
)
from danube_jax.data.message_trees import TreeMessage, is_tree_row, ranked_pairs, tree_message
from danube_jax.data.row_files import Row, convert_rows
from danube_jax.errors import UserError

FORMATS = ("auto", "pairs", "ranked", "oasst")
COLUMNS = ("prompt", "messages", "system", "input", "chosen", "rejected", "replies")

_SIDES = {
    "chosen": ("chosen", "chosen_response", "response_chosen"),
    "rejected": ("rejected", "rejected_response", "response_rejected"),
}
_REPLIES = ("replies", "responses", "completions", "answers")
_TEXTS = ("content", "text", "response", "value")
_SCORES = ("score", "rating", "overall_score")


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """`prompt` ends with a question; `chosen` and `rejected` are answers, which differ."""

    prompt: Conversation
    chosen: str
    rejected: str


def read_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    language: str = "",
    on_bad_row: str = "stop",
    limit: int | None = None,
) -> tuple[list[PreferencePair], int]:
    """Reads preference pairs.

    Args:
      path: a file or a folder of files (JSONL, JSON or Parquet).
      format: one of `FORMATS`.
      columns: what the file calls the columns of `COLUMNS`, where it has names of its own.
      language: for 'oasst', the language to keep; '' keeps all.
      on_bad_row: 'stop' or 'skip'.
      limit: most pairs, from the first on; what follows is not read, except of trees.

    Returns:
      (pairs in the order of the file; rows skipped). Rows of ranked replies that are all as good
      as each other give no pair.

    Raises:
      UserError: a row that is no preference (with file and line), an unknown format, no pairs.
    """
    reader = _Reader(format, dict(columns or {}))
    found, skipped = convert_rows(
        path,
        reader,
        on_bad_row=on_bad_row,
        enough=lambda count: reader.format != "oasst" and limit is not None and count >= limit,
    )
    if reader.format == "oasst":
        found = [
            PreferencePair(history, chosen, rejected)
            for history, chosen, rejected in ranked_pairs(found, language)
            if chosen.strip() != rejected.strip()
        ]
    if not found:
        raise UserError(f"{path}: no preferences in it; expected at least one pair of answers")
    return found[:limit], skipped


class _Reader:
    """Converts rows; settles on a format at the first one."""

    def __init__(self, format: str, columns: Mapping[str, str]):
        self.format, self._columns = format, columns

    def __call__(self, row: Row) -> list[PreferencePair] | list[TreeMessage]:
        if self.format == "auto":
            self.format = _detect(row, self._columns)
        if self.format == "oasst":
            return [tree_message(row)]
        if self.format == "ranked":
            return _from_ranked(row, self._columns)
        return [_from_pair(row, self._columns)]


def _detect(row: Row, columns: Mapping[str, str]) -> str:
    if "replies" in columns:
        return "ranked"
    if {"chosen", "rejected"} & set(columns) or any(find_column(row, c) for c in _SIDES.values()):
        return "pairs"
    if is_tree_row(row):
        return "oasst"
    if find_column(row, _REPLIES):
        return "ranked"
    raise UserError(
        f"the columns {', '.join(map(str, row)) or '(none)'} are of no known format; expected "
        "prompt, chosen and rejected, or prompt and replies: name them in the source's columns"
    )


def _from_pair(row: Row, columns: Mapping[str, str]) -> PreferencePair:
    sides = {}
    for side, names in _SIDES.items():
        name = columns.get(side) or find_column(row, names)
        value = None if name is None else row.get(name)
        if value is None or (isinstance(value, str | list) and not value):
            raise UserError(
                f"one-sided preference: there is no {side} answer; expected a text or messages in "
                f"the column {name or side!r}"
            )
        sides[side] = value
    chosen, rejected = sides["chosen"], sides["rejected"]
    for side, value in sides.items():
        if not isinstance(value, str | list):
            raise UserError(f"{side}: expected a text or messages, got {value!r}"[:200])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("chosen and rejected: one is a text, the other messages; expected alike")
    if isinstance(chosen, str):
        return make_pair(_prompt(row, columns), chosen, rejected)
    chosen, rejected = (parse_messages(sides[side], side) for side in _SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise UserError("chosen and rejected: they answer different conversations")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{side}: the last message is no answer; expected the role assistant")
    prompt = chosen[:-1] or _prompt(row, columns)
    return make_pair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _prompt(row: Row, columns: Mapping[str, str]) -> list[Message]:
    name = columns.get("messages") or columns.get("prompt")
    name = name or find_column(row, ("messages", *PROMPT_COLUMNS))
    if name is not None and isinstance(row.get(name), Sequence) and not isinstance(row[name], str):
        return parse_messages(row[name], name)
    return prompt_messages(row, columns)


def make_pair(prompt: Sequence[Message], chosen: str, rejected: str) -> PreferencePair:
    """A checked pair.

    Raises:
      UserError: the prompt does not end with a question, or the answers are empty or equal.
    """
    turns = check_turns(prompt, name="prompt")
    if not turns or turns[-1]["role"] != "user":
        raise UserError("prompt: does not end with a question; expected the role user at its end")
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise UserError(f"one-sided preference: the {side} answer is empty")
    if chosen == rejected:
        raise UserError("chosen and rejected are the same text; expected two different answers")
    return PreferencePair(turns, chosen, rejected)


def _from_ranked(row: Row, columns: Mapping[str, str]) -> list[PreferencePair]:
    name = columns.get("replies") or find_column(row, _REPLIES)
    replies = row.get(name) if name else None
    if isinstance(replies, str) or not isinstance(replies, Sequence):
        raise UserError(f"{name or 'replies'}: expected a list of ranked replies, got {replies!r}")
    if len(replies) < 2:
        raise UserError(f"one-sided preference: {name} holds {len(replies)}; expected at least two")
    measure = _measure(replies[0])
    rated = [_rated(reply, f"{name}[{i}]", measure) for i, reply in enumerate(replies)]
    rated.sort(key=_badness)
    (best, chosen), (worst, rejected) = rated[0], rated[-1]
    prompt = _prompt(row, columns)
    if best == worst or chosen == rejected:
        return []
    return [make_pair(prompt, chosen, rejected)]


def _badness(rated: tuple[float, str]) -> float:
    return rated[0]


def _measure(reply: Any) -> str:
    """The key that says how good a reply is; the same one in all of a row's replies."""
    keys = ("rank", *_SCORES) if isinstance(reply, Mapping) else ()
    return next((key for key in keys if reply.get(key) is not None), "rank or score")


def _rated(reply: Any, name: str, measure: str) -> tuple[float, str]:
    """(badness, text) of one reply: its rank, or its score with the sign changed."""
    if not isinstance(reply, Mapping):
        raise UserError(f"{name}: expected an object with a text and a rank or score")
    text = next((reply[key] for key in _TEXTS if isinstance(reply.get(key), str)), None)
    if text is None:
        raise UserError(f"{name}: no text; expected one of {', '.join(_TEXTS)}")
    value = reply.get(measure)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name}: no {measure}; expected a number, as in all of the row's replies")
    return (1.0 if measure == "rank" else -1.0) * float(value), text
