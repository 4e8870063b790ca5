"""Conversations for supervised fine-tuning, from the formats that instruction data comes in.

    messages         {"messages": [{"role": "user", "content": ...}, ...]}
    sharegpt         {"conversations": [{"from": "human", "value": ...}, ...]}
    alpaca           {"instruction": ..., "input": ..., "output": ...}
    prompt_response  columns for the prompt, the response, and perhaps a system text
    oasst            a row a message, as OpenAssistant's data sets (see `message_trees`)

The format is detected from the first good row, or named in the config, and so are the columns.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.data.chat import ROLES
from danube_jax.data.message_trees import TreeMessage, best_conversations, is_tree_row, tree_message
from danube_jax.data.row_files import Row, convert_rows
from danube_jax.errors import UserError

Message = Mapping[str, str]
Conversation = tuple[Message, ...]

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_response", "oasst")
COLUMNS = ("messages", "prompt", "response", "system", "input")

PROMPT_COLUMNS = ("prompt", "question", "query", "instruction")
_RESPONSE_COLUMNS = ("response", "completion", "answer", "output")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_CONTEXT_COLUMNS = ("input", "context")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}


def read_conversations(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    language: str = "",
    on_bad_row: str = "stop",
    limit: int | None = None,
) -> tuple[list[Conversation], int]:
    """Reads conversations, each of questions and answers in turn after an optional system text.

    Args:
      path: a file or a folder of files (JSONL, JSON or Parquet).
      format: one of `FORMATS`.
      columns: what the file calls the columns of `COLUMNS`, where it has names of its own.
      language: for 'oasst', the language to keep; '' keeps all.
      on_bad_row: 'stop' or 'skip'.
      limit: most conversations, from the first on; what follows is not read, except of trees.

    Returns:
      (conversations in the order of the file; rows skipped). Each ends with an answer.

    Raises:
      UserError: a row that is no conversation (with file and line), an unknown format, no rows.
    """
    columns = dict(columns or {})
    reader = _Reader(format, columns)
    found, skipped = convert_rows(
        path,
        reader,
        on_bad_row=on_bad_row,
        enough=lambda count: reader.format != "oasst" and limit is not None and count >= limit,
    )
    if reader.format == "oasst":
        found = best_conversations(found, language)
    if not found:
        raise UserError(f"{path}: no conversations in it; expected at least one")
    return found[:limit], skipped


class _Reader:
    """Converts rows; settles on a format at the first one."""

    def __init__(self, format: str, columns: Mapping[str, str]):
        self.format, self._columns = format, columns

    def __call__(self, row: Row) -> list[Conversation] | list[TreeMessage]:
        if self.format == "auto":
            self.format = detect_format(row, self._columns)
        if self.format == "oasst":
            return [tree_message(row)]
        return [check_conversation(_CONVERTERS[self.format](row, self._columns))]


def detect_format(row: Row, columns: Mapping[str, str]) -> str:
    """The format of a row by its columns.

    Raises:
      UserError: none fits; says what columns there are.
    """
    if set(columns) & {"prompt", "response"}:
        return "prompt_response"
    if isinstance(row.get(columns.get("messages", "messages")), Sequence):
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if is_tree_row(row):
        return "oasst"
    if {"instruction", "output"} <= row.keys():
        return "alpaca"
    if find_column(row, PROMPT_COLUMNS) and find_column(row, _RESPONSE_COLUMNS):
        return "prompt_response"
    raise UserError(
        f"the columns {', '.join(map(str, row)) or '(none)'} are of no known format; expected "
        "messages, conversations, instruction and output, or prompt and response: name them in "
        "the source's columns"
    )


def find_column(row: Row, names: Sequence[str]) -> str | None:
    """The first of `names` that the row has."""
    return next((name for name in names if name in row), None)


def column_text(
    row: Row,
    columns: Mapping[str, str],
    key: str,
    names: Sequence[str],
    *,
    optional: bool = False,
) -> str:
    """The text in the column that the config calls `key`, or that has one of the usual `names`.

    Raises:
      UserError: there is none, or it holds no text; an optional one may be absent or null.
    """
    name = columns.get(key) or find_column(row, names)
    value = None if name is None else row.get(name)
    if value is None and optional:
        return ""
    if name is None or name not in row:
        raise UserError(
            f"no column {name or key!r}; the row has {', '.join(map(str, row)) or 'none'}"
        )
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text, got {value!r}"[:200])
    return value


def _from_messages(row: Row, columns: Mapping[str, str]) -> list[Message]:
    name = columns.get("messages", "messages")
    return parse_messages(row.get(name), name)


def parse_messages(value: Any, name: str) -> list[Message]:
    """A list of {role, content} as messages; ShareGPT's {from, value} too.

    Raises:
      UserError: it is no such list, or a role is unknown; says which message.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise UserError(f"{name}: expected a list of messages, got {type(value).__name__}")
    out = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise UserError(f"{name}[{i}]: expected an object with role and content")
        if "role" in item:
            role, content, key = item["role"], item.get("content"), "content"
            if role not in ROLES:
                raise UserError(f"{name}[{i}].role: {role!r}; expected one of {', '.join(ROLES)}")
        else:
            speaker, content, key = item.get("from"), item.get("value"), "value"
            role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                raise UserError(
                    f"{name}[{i}]: unknown role {item.get('from')!r}; expected one of "
                    f"{', '.join(_SHAREGPT_ROLES)}"
                )
        if not isinstance(content, str):
            raise UserError(f"{name}[{i}].{key}: expected a text, got {content!r}"[:200])
        out.append({"role": role, "content": content})
    return out


def _from_sharegpt(row: Row, columns: Mapping[str, str]) -> list[Message]:
    name = columns.get("messages", "conversations")
    return parse_messages(row.get(name), name)


def _from_alpaca(row: Row, columns: Mapping[str, str]) -> list[Message]:
    return _from_prompt_response(row, {"prompt": "instruction", "response": "output", **columns})


def _from_prompt_response(row: Row, columns: Mapping[str, str]) -> list[Message]:
    response = column_text(row, columns, "response", _RESPONSE_COLUMNS)
    return [*prompt_messages(row, columns), {"role": "assistant", "content": response}]


def prompt_messages(row: Row, columns: Mapping[str, str]) -> list[Message]:
    """System text, perhaps empty, and question of a row that has columns for them.

    What the question is about (Alpaca's `input`) follows it, with an empty line between.

    Raises:
      UserError: there is no question, or a column holds no text.
    """
    text = functools.partial(column_text, row, columns)
    system = text("system", _SYSTEM_COLUMNS, optional=True)
    prompt, more = text("prompt", PROMPT_COLUMNS), text("input", _CONTEXT_COLUMNS, optional=True)
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{prompt}\n\n{more}" if more.strip() else prompt},
    ]


_CONVERTERS: Mapping[str, Callable[[Row, Mapping[str, str]], list[Message]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_response": _from_prompt_response,
}


def check_turns(messages: Sequence[Message], *, name: str = "messages") -> Conversation:
    """Messages as a conversation: an empty system text goes, then question and answer in turn.

    Raises:
      UserError: an answer before a question, two turns of one role in a row, or an empty turn.
    """
    messages = list(messages)
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns)
    for i, message in enumerate(turns):
        place, expected = f"{name}[{i + offset}]", "assistant" if i % 2 else "user"
        if message["role"] != expected:
            what = {
                "assistant": "an answer before its question" if not i else "two answers in a row",
                "user": "two questions in a row",
                "system": "a system text that is not the first message",
            }[message["role"]]
            raise UserError(f"{place}: {what}; expected the role {expected}")
        if not message["content"].strip():
            raise UserError(f"{place}: the text is empty")
    return tuple(messages)


def place_system_text(messages: Conversation, how: str) -> Conversation:
    """A conversation whose system text is kept ('keep'), left out ('drop'), or put before the first
    question, with an empty line between ('merge').
    """
    if how == "keep" or not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if how == "merge" and rest:
        text = f"{system['content']}\n\n{rest[0]['content']}"
        rest[0] = {"role": rest[0]["role"], "content": text}
    return tuple(rest)


def check_conversation(messages: Sequence[Message], *, name: str = "messages") -> Conversation:
    """`check_turns`; a question at the end that nobody answered is left out.

    Raises:
      UserError: as `check_turns`, or there is no answer.
    """
    turns = check_turns(messages, name=name)
    if turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(f"{name}: no answer in it; expected a question and its answer")
    return turns
