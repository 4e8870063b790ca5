"""Requests for completions: files of prompts, their token ids, and rows of results."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.data.chat import check_messages
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
      id: names its results.
      where: where it was written, for messages.
      prompt: plain text to be continued, or None.
      messages: a conversation to be answered, or None.
    """

    id: str | int
    where: str
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request as token ids, and the most new tokens that it gets."""

    request: Request
    tokens: tuple[int, ...]
    max_tokens: int


def read_requests(path: str | Path, *, chat: bool = False, system: str = "") -> list[Request]:
    """Reads a batch file.

    A `.jsonl` file holds an object a line: `prompt` (a text) or `messages` (a conversation), and
    perhaps `id` (a text or a whole number; by default the line's number). Any other file holds a
    prompt a line. Empty lines are passed over.

    Args:
      path: the file, UTF-8.
      chat: whether plain prompts are questions, to be answered in the chat format.
      system: system text of those questions.

    Raises:
      UserError: the file cannot be read, or a line is none of this; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); expected a file of prompts") from None
    as_json = path.suffix == ".jsonl"
    requests: dict[str | int, Request] = {}
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        request = (
            _parse_line(line, number, where)
            if as_json
            else Request(number, where, prompt=check_text(line, where))
        )
        if chat and request.prompt is not None:
            request = as_question(request, system)
        if request.id in requests:
            raise UserError(
                f"{where}: id {request.id!r} stands in {requests[request.id].where} too; expected "
                "a different id a line"
            )
        requests[request.id] = request
    if not requests:
        raise UserError(f"{path}: holds no prompts; expected one a line")
    return list(requests.values())


def _parse_line(line: str, number: int, where: str) -> Request:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected a JSON object") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError(f'{where}: expected a JSON object with "prompt" or "messages"')
    name = row.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"{where}: id {name!r} is not possible; expected a text or a whole number")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: prompt is {row['prompt']!r}; expected a text")
        return Request(name, where, prompt=check_text(row["prompt"], where))
    try:
        check_messages(row["messages"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for message in row["messages"]:
        check_text(message["content"], where)
    return Request(name, where, messages=tuple(row["messages"]))


def as_question(request: Request, system: str = "") -> Request:
    """The request's prompt as a conversation of one question."""
    messages = ({"role": "user", "content": request.prompt},)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    return dataclasses.replace(request, prompt=None, messages=messages)


def check_text(text: str, where: str) -> str:
    """`text`, unless it holds what is no character (half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: is not valid Unicode ({error.reason}); expected UTF-8") from None
    return text


def to_prompt(
    request: Request, tokenizer: Tokenizer, *, context: int, max_tokens: int, exact: bool
) -> Prompt:
    """Encodes a request.

    Args:
      request: what is asked.
      tokenizer: the model's, with a chat template where the request is a conversation.
      context: tokens that the model takes, prompt and answer together.
      max_tokens: most new tokens.
      exact: whether `max_tokens` must fit; otherwise it is cut to what the context leaves.

    Raises:
      UserError: the prompt is empty or too long.
    """
    try:
        if request.messages is not None:
            tokens = tokenizer.encode_chat(request.messages)
        else:
            tokens = tokenizer.encode_prompt(request.prompt)
    except UserError as error:
        raise UserError(f"{request.where}: {error}") from None
    if not tokens:
        raise UserError(
            f"{request.where}: the prompt is empty, and the tokenizer puts no BOS in front; "
            "expected some text"
        )
    left = context - len(tokens)
    if left < 1:
        raise UserError(
            f"{request.where}: the prompt has {len(tokens):,} tokens; expected fewer than the "
            f"model's context of {context:,}"
        )
    if exact and max_tokens > left:
        raise UserError(
            f"{request.where}: the prompt has {len(tokens):,} tokens, so max_tokens={max_tokens:,} "
            f"exceeds the model's context of {context:,}; at most {left:,} fit"
        )
    return Prompt(request, tuple(tokens), min(max_tokens, left))


def batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of prompts that are generated together: up to `size`, with equal `max_tokens`."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.max_tokens, []).append(i)
    return [
        group[begin : begin + size]
        for group in groups.values()
        for begin in range(0, len(group), size)
    ]


def to_row(prompt: Prompt, sample: int, completion: Any, *, logprobs: bool) -> dict[str, Any]:
    """A completion as a JSON object."""
    request = prompt.request
    asked = (
        {"prompt": request.prompt}
        if request.messages is None
        else {"messages": [dict(message) for message in request.messages]}
    )
    row = {
        "id": request.id,
        "sample": sample,
        **asked,
        "text": completion.text if request.messages is None else trim_answer(completion.text),
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(prompt.tokens),
    }
    if logprobs:
        row["token_logprobs"] = [_finite(x) for x in completion.token_logprobs]
        row["top_logprobs"] = [
            [[int(token), _finite(x)] for token, x in step] for step in completion.top_logprobs
        ]
    return row


def trim_answer(text: str) -> str:
    """An answer without the space that SentencePiece has in front of its first word."""
    return text.removeprefix(" ")


def _finite(x: float) -> float | None:
    """JSON has no infinity."""
    x = float(x)
    return x if math.isfinite(x) else None
