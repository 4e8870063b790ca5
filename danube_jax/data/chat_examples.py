"""From conversations and preferences to token ids with a mask of what is trained on.

Two ways of tokenising are offered, since they give different ids where an answer begins:

    joint     the whole conversation at once: the ids are those of `apply_chat_template`
    separate  every prompt (with the marker that opens the answer) and every answer on its own, as
              H2O LLM Studio did for the published chat models: with Llama's and Mistral's
              tokenizers an answer then begins with a space piece

Trained on are the tokens of the answers and the token that ends each.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from danube_jax.data import chat
from danube_jax.data.conversations import Conversation
from danube_jax.data.preferences import PreferencePair
from danube_jax.data.tokenizer_base import Tokenizer
from danube_jax.errors import UserError

TOKENIZATIONS = ("joint", "separate")
TRUNCATIONS = ("drop", "left", "right")

_GENERATION_TAG = re.compile(r"{%-?\s*generation\s*-?%}")  # as transformers looks for it


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
      ids: int32 [n], at least two.
      mask: bool [n], True where the token is to be predicted; the first one never is.
    """

    ids: np.ndarray
    mask: np.ndarray

    @property
    def length(self) -> int:
        """Places that it takes in a row: all but its last token, which has no target."""
        return len(self.ids) - 1

    @property
    def trained(self) -> int:
        """Tokens that are trained on."""
        return int(self.mask.sum())


@dataclasses.dataclass(frozen=True)
class ExamplePair:
    """The two sides of a preference; the same prompt begins both, masked."""

    chosen: Example
    rejected: Example

    @property
    def length(self) -> int:
        """Places that both take in a row."""
        return self.chosen.length + self.rejected.length


@dataclasses.dataclass
class Dropped:
    """What was left out, by reason."""

    too_long: int = 0
    nothing_to_train: int = 0
    alike: int = 0  # pairs whose answers have the same tokens, perhaps once cut
    shortened: int = 0  # kept, but cut
    refused: int = 0  # by the template

    def describe(self) -> str:
        """A phrase for the user; '' where nothing happened."""
        parts = []
        if self.too_long:
            parts.append(f"{self.too_long:,} too long, dropped")
        if self.nothing_to_train:
            parts.append(f"{self.nothing_to_train:,} without a token to train on, dropped")
        if self.alike:
            parts.append(f"{self.alike:,} with two equal answers, dropped")
        if self.refused:
            parts.append(f"{self.refused:,} refused by the chat template, dropped")
        if self.shortened:
            parts.append(f"{self.shortened:,} shortened")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class ChatEncoder:
    """Conversations → examples.

    Attributes:
      tokenizer: carries the chat template.
      tokenization: 'joint' or 'separate'.
      mask_prompt: train on the answers alone; False trains on every token.
      max_length: longest example, in tokens.
      truncation: what becomes of a longer one: 'drop', or lose tokens at its 'left' (the oldest
        ones, as H2O LLM Studio) or 'right' end.
    """

    tokenizer: Tokenizer
    tokenization: str = "joint"
    mask_prompt: bool = True
    max_length: int = 4_096
    truncation: str = "drop"

    def encode(self, messages: Conversation) -> Example:
        """The ids and mask of a whole conversation, not truncated.

        Raises:
          UserError: the template refuses the conversation, or cannot be told apart into turns.
        """
        text, spans = self._render(messages)
        ids, answer = self._tokenize(text, spans, [True] * len(spans))
        return _example(ids, answer if self.mask_prompt else np.ones(len(ids), bool))

    def example(self, messages: Conversation, dropped: Dropped) -> Example | None:
        """`encode`, truncated; None, and counted in `dropped`, where nothing is left to train on.

        Raises:
          UserError: as `encode`.
        """
        example = self.encode(messages)
        surplus = len(example.ids) - self.max_length
        if surplus > 0:
            if self.truncation == "drop":
                dropped.too_long += 1
                return None
            cut = slice(surplus, None) if self.truncation == "left" else slice(self.max_length)
            example = _cut(example, cut)
        if len(example.ids) < 2 or not example.trained:
            dropped.nothing_to_train += 1
            return None
        dropped.shortened += surplus > 0
        return example

    def pair(self, preference: PreferencePair, dropped: Dropped) -> ExamplePair | None:
        """Both sides of a preference; the prompt and earlier answers are masked.

        'left' takes the same number of tokens from the beginning of both sides, as many as the
        longer one has too many, but never from an answer; what is still too long, and all that
        'right' cuts, goes from the end of the answers.

        Raises:
          UserError: as `encode`.
        """
        sides = [
            self._last_answer((*preference.prompt, {"role": "assistant", "content": text}))
            for text in (preference.chosen, preference.rejected)
        ]
        surplus = max(len(side.ids) for side in sides) - self.max_length
        if surplus > 0:
            if self.truncation == "drop":
                dropped.too_long += 1
                return None
            if self.truncation == "left":
                prompt = min(int(np.argmax(side.mask)) for side in sides)
                sides = [
                    _cut(side, slice(min(surplus, max(prompt - 1, 0)), None)) for side in sides
                ]
            sides = [_cut(side, slice(self.max_length)) for side in sides]
        if not all(side.trained for side in sides):
            dropped.nothing_to_train += 1
            return None
        if np.array_equal(sides[0].ids, sides[1].ids):
            dropped.alike += 1
            return None
        dropped.shortened += surplus > 0
        return ExamplePair(*sides)

    def _last_answer(self, messages: Conversation) -> Example:
        text, spans = self._render(messages)
        last = [False] * (len(spans) - 1) + [True]
        return _example(*self._tokenize(text, spans, last))

    def _tokenize(
        self, text: str, spans: Sequence[tuple[int, int]], trained: Sequence[bool]
    ) -> tuple[list[int], np.ndarray]:
        """Ids, and bool [n] that is True inside the spans that are trained on."""
        if self.tokenization == "joint":
            ids, ends = self.tokenizer.encode_markup_spans(text)
            ends_n = np.asarray(ends, np.int64)
            mask = np.zeros(len(ids), bool)
            for (start, end), train in zip(spans, trained, strict=True):
                # A token belongs to the answer that its last character belongs to.
                mask |= (ends_n > start) & (ends_n <= end) & train
            return ids, mask
        ids, parts, position = [], [], 0
        for (start, end), train in zip(
            [*spans, (len(text), len(text))], [*trained, False], strict=True
        ):
            for part, value in ((text[position:start], False), (text[start:end], train)):
                new = self.tokenizer.encode_markup(part) if part else []
                ids += new
                parts.append(np.full(len(new), value))
            position = end
        return ids, np.concatenate(parts)

    def _render(self, messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it each answer stands, with what ends it."""
        messages = self.tokenizer.shield(messages)
        if _GENERATION_TAG.search(self.tokenizer.chat_template or ""):
            return chat.render_with_spans(
                self.tokenizer.chat_template, messages, self.tokenizer.special_tokens
            )
        text = self.tokenizer.render_chat(messages, add_generation_prompt=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.tokenizer.render_chat(messages[:i], add_generation_prompt=True)
            through = self.tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
            if not text.startswith(through) or not through.startswith(before):
                raise UserError(
                    "the chat template renders the beginning of a conversation differently once it "
                    "goes on, so its answers cannot be found; expected one that marks them with "
                    "{% generation %} and {% endgeneration %}"
                )
            spans.append((len(before), self._end_of_answer(text, len(before), len(through))))
        return text, spans

    def _end_of_answer(self, text: str, start: int, end: int) -> int:
        """Where an answer ends: after its last control token, without the line break behind it."""
        ends = [
            start + at + len(name)
            for name in _control_names(self.tokenizer.special_tokens)
            if (at := text[start:end].rfind(name)) >= 0
        ]
        last = max(ends, default=end)
        return last if not text[last:end].strip() else end


def _control_names(special_tokens: Mapping[str, str]) -> list[str]:
    return [name for key, name in special_tokens.items() if key in ("eos_token", "pad_token")]


def _example(ids: Sequence[int], mask: np.ndarray) -> Example:
    mask[:1] = False
    return Example(np.asarray(ids, np.int32), mask)


def _cut(example: Example, part: slice) -> Example:
    return _example(example.ids[part], example.mask[part].copy())
