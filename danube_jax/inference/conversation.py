"""A conversation's state and the language of the chat prompt; nothing here knows a model."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from danube_jax import files
from danube_jax.data.chat import check_messages
from danube_jax.errors import UserError
from danube_jax.untrusted import parse_json

COMMANDS = {
    "help": "this list",
    "reset": "forget the conversation (a system text stays)",
    "system": "TEXT  set the system text and forget the conversation; without TEXT, remove it",
    "save": "FILE  write the conversation as JSON",
    "load": "FILE  go on with a conversation that was saved",
    "undo": "forget the last question and its answer",
    "retry": "answer the last question anew",
    "set": "NAME VALUE  change a setting, such as temperature 0.2; without NAME, show them",
    "exit": "leave (also Ctrl-D)",
}
_ALIASES = {"quit": "exit", "bye": "exit", "?": "help", "clear": "reset"}
QUOTES = '"""'

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said: questions and answers in turn, and perhaps a system text before them."""

    system: str = ""
    turns: tuple[str, ...] = ()  # question, answer, question, …

    def messages(self) -> list[Message]:
        """As chat templates take them."""
        out = [{"role": "system", "content": self.system}] if self.system else []
        for i, text in enumerate(self.turns):
            out.append({"role": "assistant" if i % 2 else "user", "content": text})
        return out

    def say(self, text: str) -> "Conversation":
        """With one turn more."""
        return dataclasses.replace(self, turns=(*self.turns, text))

    def undo(self) -> "Conversation":
        """Without the last question and what followed it."""
        return dataclasses.replace(self, turns=self.turns[: (len(self.turns) - 1) // 2 * 2])

    def last_question(self) -> str | None:
        """The last question, answered or not; None at the beginning."""
        return self.turns[(len(self.turns) - 1) // 2 * 2] if self.turns else None

    def save(self, path: str | Path) -> None:
        """Writes `{"messages": […]}`, whole or not at all."""
        try:
            files.write_json(path, {"messages": self.messages()})
        except (OSError, ValueError) as error:  # a name with NUL in it, too
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be written ({reason})") from None

    @classmethod
    def load(cls, path: str | Path) -> "Conversation":
        """Reads what `save` wrote.

        Raises:
          UserError: unreadable, or no conversation of questions and answers in turn.
        """
        try:
            if Path(path).exists() and not Path(path).is_file():  # a device has no end
                raise UserError(f"{path}: cannot be read (no regular file)")
            value = parse_json(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"no JSON: {error}"
            raise UserError(f"{path}: cannot be read ({reason})") from None
        if not isinstance(value, dict) or "messages" not in value:
            raise UserError(f'{path}: expected a JSON object with "messages"')
        try:
            check_messages(value["messages"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        messages = list(value["messages"])
        first = messages[0]
        system = messages.pop(0)["content"] if first["role"] == "system" else ""
        for i, message in enumerate(messages):
            if message["role"] != ("assistant" if i % 2 else "user"):
                raise UserError(f"{path}: expected messages of user and assistant in turn")
        if len(messages) % 2:
            raise UserError(f"{path}: the last message has no answer; expected one of assistant")
        return cls(system, tuple(message["content"] for message in messages))


def fit(
    conversation: Conversation,
    encode: Callable[[Sequence[Message]], list[int]],
    *,
    context: int,
    max_tokens: int,
) -> tuple[Conversation, list[int], int]:
    """Drops the oldest questions and answers until the rest and a new answer fit.

    Args:
      conversation: ends with a question.
      encode: messages → token ids.
      context: tokens that the model takes, prompt and answer together.
      max_tokens: room to be left for the answer, where the last question allows it; no more than
        half the context.

    Returns:
      (what is left of the conversation, its ids, the number of pairs dropped).

    Raises:
      UserError: the last question alone does not fit, or the template refuses the conversation.
    """
    room = min(max_tokens, context // 2)
    dropped = 0
    while True:
        ids = encode(conversation.messages())
        if len(ids) + room <= context:
            return conversation, ids, dropped
        if len(conversation.turns) < 3:
            break
        conversation = dataclasses.replace(conversation, turns=conversation.turns[2:])
        dropped += 1
    if len(ids) >= context:
        raise UserError(
            f"the message has {len(ids):,} tokens; expected fewer than the model's context of "
            f"{context:,}"
        )
    return conversation, ids, dropped


def parse_command(text: str) -> tuple[str, str] | None:
    """(command, argument) of a line that begins with a slash, or None for a message.

    Raises:
      UserError: no such command.
    """
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, argument = text[1:].partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        raise UserError(
            f"there is no command /{name}; /help lists them, and // begins a message with a slash"
        )
    return name, argument.strip()


def unescape(text: str) -> str:
    """The message of a line: two slashes at its beginning stand for one."""
    return text[1:] if text.startswith("//") else text


def read_turn(read_line: Callable[[bool], str | None]) -> str | None:
    """Reads one turn, of one line or several.

    A line that ends with a backslash goes on in the next one; after a line that begins with three
    quotation marks everything counts up to the next three.

    Args:
      read_line: (whether the turn has begun) → a line without its newline, or None at the end.

    Returns:
      The text, or None at the end of the input.
    """
    line = read_line(False)
    if line is None:
        return None
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while QUOTES not in lines[-1]:
            following = read_line(True)
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines).partition(QUOTES)[0].strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        following = read_line(True)
        if following is None:
            break
        lines.append(following)
    return "\n".join(lines)


def help_text() -> str:
    """What /help shows."""
    lines = [f"  /{name} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "Commands:",
            *lines,
            'A line that ends with \\ goes on in the next; """ begins and ends a text of several.',
            "Ctrl-C stops an answer.",
        ]
    )
