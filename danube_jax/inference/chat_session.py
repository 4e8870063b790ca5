"""A chat over one model: questions, answers, commands. Input and output are the caller's."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from danube_jax.data.chat import render
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.inference.conversation import (
    Conversation,
    fit,
    help_text,
    parse_command,
    read_turn,
    unescape,
)
from danube_jax.inference.requests import check_text
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.inference.sampling_flags import SETTINGS, parse_setting
from danube_jax.interruption import handled

# Ordinary text in Danube's formats: a model that writes it has begun the user's next question.
_USER_MARK = "<|prompt|>"
_PROBE = {"role": "user", "content": "?"}


class ChatSession:
    """Holds a conversation and answers it.

    Attributes:
      conversation: what was said so far.
      settings: name → value of the settings of `SamplingConfig`.
    """

    def __init__(
        self,
        *,
        stream: Callable[[Sequence[int], SamplingConfig], Iterator[Any]],
        tokenizer: Tokenizer,
        context: int,
        settings: Mapping[str, float],
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (),
        system: str = "",
        write: Callable[[str], None],
        note: Callable[[str], None],
    ):
        """Begins an empty conversation.

        Args:
          stream: `Generator.stream`.
          tokenizer: with a chat template.
          context: tokens that the model takes, prompt and answer together.
          settings: the first values of the settings.
          stop_tokens: ids that end an answer.
          stop_strings: texts that end an answer.
          system: the first system text.
          write: shows a piece of an answer.
          note: shows a line about it.

        Raises:
          UserError: an impossible setting, or the template refuses a system text.
        """
        self._stream, self._tokenizer, self._context = stream, tokenizer, context
        self._write, self._note = write, note
        marks = (_USER_MARK,) if _USER_MARK in (tokenizer.chat_template or "") else ()
        self._stops = {
            "stop_tokens": tuple(stop_tokens),
            "stop_strings": tuple(dict.fromkeys((*stop_strings, *marks))),
        }
        self.settings = dict(settings)
        self._sampling()
        self._answers = 0
        self.conversation = self._with_system(system)

    def handle(self, text: str) -> bool:
        """Answers a message or obeys a command; a mistake is a line, and changes nothing.

        Returns:
          Whether the chat goes on.
        """
        try:
            check_text(text, "the message")
            command = parse_command(text)
            if command is None:
                self.ask(unescape(text))
                return True
            name, argument = command
            if name == "exit":
                return False
            getattr(self, f"_{name}")(argument)
        except UserError as error:
            self._note(f"error: {' '.join(str(error).split())}")
        return True

    def ask(self, question: str) -> None:
        """Streams an answer; Ctrl-C ends it early, and what was said by then counts.

        Raises:
          UserError: the question is too long, or the template refuses it.
        """
        asked, ids, dropped = fit(
            self.conversation.say(question),
            self._tokenizer.encode_chat,
            context=self._context,
            max_tokens=int(self.settings["max_tokens"]),
        )
        if dropped:
            self._note(
                f"warning: the context of {self._context:,} tokens is full: forgot the "
                f"{'oldest question' if dropped == 1 else f'{dropped} oldest questions'} and "
                f"answer{'' if dropped == 1 else 's'}"
            )
        sampling = self._sampling(
            max_tokens=min(int(self.settings["max_tokens"]), self._context - len(ids)),
            seed=int(self.settings.get("seed", 0)) + self._answers,
        )
        self._answers += 1
        answer, reason, progress = "", "stopped", [(0, time.monotonic())]
        try:
            for chunk in self._stream(ids, sampling):
                shown = answer.lstrip()
                answer += chunk.text
                # A first word's space belongs to the answer's tokens, but looks odd.
                self._write(answer.lstrip()[len(shown) :])
                progress.append((progress[-1][0] + len(chunk.tokens), time.monotonic()))
                reason = chunk.finish_reason
        except KeyboardInterrupt as stop:
            handled(stop)
            reason = "stopped"
        self._write("\n")
        if answer or reason != "stopped":
            self.conversation = asked.say(answer)
        self._note(_speed(progress, reason))

    def _sampling(self, **changes: float) -> SamplingConfig:
        return SamplingConfig(**(self.settings | self._stops | changes))

    def _with_system(self, text: str) -> Conversation:
        if text:  # refused now rather than at the first question
            messages = [{"role": "system", "content": check_text(text, "the system text")}, _PROBE]
            render(self._tokenizer.chat_template, messages, self._tokenizer.special_tokens)
        return Conversation(text)

    def _help(self, argument: str) -> None:
        self._note(help_text())

    def _reset(self, argument: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self._note("forgotten")

    def _system(self, text: str) -> None:
        self.conversation = self._with_system(text)
        self._note("a new conversation " + ("with that system text" if text else "without one"))

    def _save(self, path: str) -> None:
        if not path:
            raise UserError("/save needs the name of a file")
        if not self.conversation.messages():
            raise UserError("nothing was said yet")
        self.conversation.save(path)
        self._note(f"saved to {path}")

    def _load(self, path: str) -> None:
        if not path:
            raise UserError("/load needs the name of a file")
        loaded = Conversation.load(path)
        self._tokenizer.encode_chat(loaded.messages())
        self.conversation = loaded
        self._note(f"loaded {len(loaded.turns) // 2} questions and answers from {path}")

    def _undo(self, argument: str) -> None:
        question = self.conversation.last_question()
        if question is None:
            raise UserError("nothing was said yet")
        self.conversation = self.conversation.undo()
        self._note(f"forgot: {question}")

    def _retry(self, argument: str) -> None:
        question = self.conversation.last_question()
        if question is None:
            raise UserError("nothing was said yet")
        before, without = self.conversation, self.conversation.undo()
        self.conversation = without
        try:
            self.ask(question)
        finally:
            if self.conversation is without:  # no answer came
                self.conversation = before

    def _set(self, argument: str) -> None:
        words = argument.replace("=", " ").split()
        if words:
            if len(words) != 2:
                raise UserError("/set takes a name and a value, such as /set temperature 0.2")
            name, text = words
            value = parse_setting(name, text)
            self._sampling(**{name: value})
            self.settings[name] = value
        shown = [f"{name} {self.settings[name]}" for name in SETTINGS if name in self.settings]
        self._note(", ".join(shown))


def converse(
    handle: Callable[[str], bool],
    read_line: Callable[[bool], str | None],
    *,
    note: Callable[[str], None],
    interactive: bool,
) -> None:
    """Hands turns to `handle` until it says no, the input ends, or Ctrl-C comes twice in a row.

    Args:
      handle: `ChatSession.handle`.
      read_line: as `read_turn` takes it.
      note: shows a line.
      interactive: whether a person types; a script's first Ctrl-C ends it.
    """
    interrupted = False
    while True:
        try:
            text = read_turn(read_line)
        except KeyboardInterrupt as stop:
            handled(stop)
            if interrupted or not interactive:
                return
            interrupted = True
            note("\n(Ctrl-C again, or Ctrl-D, leaves)")
            continue
        interrupted = False
        if text is None or (text.strip() and not handle(text)):
            return


def _speed(progress: Sequence[tuple[int, float]], reason: str | None) -> str:
    """A line about an answer: tokens, their rate, the time to the first.

    Args:
      progress: (tokens so far, time in seconds) at the start and after each piece.
      reason: why it ended.
    """
    (_, start), (first, begun) = progress[0], progress[min(1, len(progress) - 1)]
    count, end = progress[-1]
    parts = [f"{count} tokens"]
    if count > first and end > begun:
        parts.append(f"{(count - first) / (end - begun):.1f} tokens/s")
    if count:
        parts.append(f"first after {begun - start:.2f} s")
    if reason == "length":
        parts.append("cut at max_tokens")
    elif reason == "stopped":
        parts.append("stopped")
    return f"[{', '.join(parts)}]"
