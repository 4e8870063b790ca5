"""Conversations and preferences from OpenAssistant's trees, a row a message.

A row has `message_id`, `parent_id` (null for the first question), `text`, `role` ('prompter' or
'assistant'), `lang`, and, for replies that people ranked, `rank`: 0 is the best.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from danube_jax.errors import UserError

Message = Mapping[str, str]

_ROLES = {"prompter": "user", "assistant": "assistant"}
_KEYS = ("message_id", "parent_id", "text", "role")


@dataclasses.dataclass(frozen=True)
class TreeMessage:
    """One message of a tree; `rank` is None where nobody ranked it."""

    id: str
    parent: str | None
    role: str
    text: str
    language: str
    rank: float | None


def is_tree_row(row: Mapping[str, Any]) -> bool:
    """Whether the columns are those of a tree."""
    return set(_KEYS) <= row.keys()


def tree_message(row: Mapping[str, Any]) -> TreeMessage:
    """A row as a message.

    Raises:
      UserError: a column is missing or holds what it may not.
    """
    if not is_tree_row(row):
        missing = [key for key in _KEYS if key not in row]
        raise UserError(f"no column {missing[0]!r}; expected {', '.join(_KEYS)}")
    if not isinstance(row["role"], str) or row["role"] not in _ROLES:
        raise UserError(f"role: {row['role']!r}; expected one of {', '.join(_ROLES)}")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise UserError("text: expected a text that is not empty")
    rank = row.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | float)):
        raise UserError(f"rank: {rank!r}; expected a number or null")
    return TreeMessage(
        id=str(row["message_id"]),
        parent=None if row["parent_id"] is None else str(row["parent_id"]),
        role=_ROLES[row["role"]],
        text=row["text"],
        language=str(row.get("lang") or ""),
        rank=None if rank is None or rank != rank else float(rank),
    )


class _Forest:
    def __init__(self, messages: Sequence[TreeMessage], language: str):
        kept = [m for m in messages if not language or m.language in ("", language)]
        self.by_id = {message.id: message for message in kept}
        if len(self.by_id) != len(kept):
            ids = collections.Counter(message.id for message in kept)
            raise UserError(f"message_id {ids.most_common(1)[0][0]!r} stands in two rows")
        self.replies: dict[str, list[TreeMessage]] = {}
        for message in kept:
            if message.parent is not None:
                self.replies.setdefault(message.parent, []).append(message)
        self.messages = [message for message in kept if self._has_root(message)]

    def _has_root(self, message: TreeMessage) -> bool:
        """Whether its parents lead to a question without one, in no circle and with no gap."""
        seen, node = set(), message
        while node is not None and node.id not in seen:
            if node.parent is None:
                return True
            seen.add(node.id)
            node = self.by_id.get(node.parent)
        return False

    def history(self, message: TreeMessage) -> list[Message] | None:
        """The messages up to and with this one, or None where the chain is broken or a circle."""
        chain: list[Message] = []
        node: TreeMessage | None = message
        while node is not None and len(chain) < len(self.by_id):
            chain.append({"role": node.role, "content": node.text})
            if node.parent is None:
                return _in_turn(chain[::-1])
            node = self.by_id.get(node.parent)
        return None

    def is_best(self, message: TreeMessage) -> bool:
        """Whether no ranked sibling is better; the only reply is the best."""
        siblings = self.replies.get(message.parent or "", [message])
        ranks = [m.rank for m in siblings if m.rank is not None and m.role == message.role]
        return len(siblings) == 1 or (message.rank is not None and message.rank == min(ranks))


def _in_turn(messages: list[Message]) -> list[Message] | None:
    fine = all(m["role"] == ("assistant" if i % 2 else "user") for i, m in enumerate(messages))
    return messages if fine else None


def best_conversations(
    messages: Sequence[TreeMessage], language: str = ""
) -> list[tuple[Message, ...]]:
    """Whole conversations in which every answer is the best-ranked of its siblings.

    One for each last answer, in the order of the rows; a question that nobody answered is left out.
    """
    forest = _Forest(messages, language)
    chains = _best_leaves(forest)
    return [tuple(chain) for leaf in chains if (chain := forest.history(leaf)) is not None]


def _best_leaves(forest: _Forest) -> Iterator[TreeMessage]:
    for message in forest.messages:
        if message.role != "assistant" or not _best_to_the_root(forest, message):
            continue
        deeper = any(
            forest.is_best(answer)
            for question in forest.replies.get(message.id, [])
            for answer in forest.replies.get(question.id, [])
        )
        if not deeper:
            yield message


def _best_to_the_root(forest: _Forest, message: TreeMessage | None) -> bool:
    for _ in forest.messages:  # no more steps than that, should parents go round in a circle
        if message is None:
            break
        if message.role == "assistant" and not forest.is_best(message):
            return False
        message = forest.by_id.get(message.parent or "")
    return True


def ranked_pairs(
    messages: Sequence[TreeMessage], language: str = ""
) -> list[tuple[tuple[Message, ...], str, str]]:
    """(history, chosen, rejected) of every question whose replies were ranked.

    As Danube's second round (arXiv 2401.16818, section 6.2): chosen has the lowest rank, rejected
    the highest.
    """
    forest = _Forest(messages, language)
    pairs = []
    for message in forest.messages:
        if message.role != "user":
            continue
        ranked = [m for m in forest.replies.get(message.id, []) if m.rank is not None]
        ranked = sorted((m for m in ranked if m.role == "assistant"), key=lambda m: m.rank)
        history = forest.history(message)
        if history and ranked and ranked[0].rank != ranked[-1].rank:
            pairs.append((tuple(history), ranked[0].text, ranked[-1].text))
    return pairs
