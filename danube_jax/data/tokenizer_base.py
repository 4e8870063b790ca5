"""What every tokenizer offers, whatever library reads its files."""

import abc
import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from danube_jax import files
from danube_jax.data import chat
from danube_jax.data.control_names import ControlNames
from danube_jax.errors import UserError

CHAT_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      path: the file or folder it was opened from.
      vocab_size: number of ids.
      bos_id, eos_id: ids that begin and end a document; None where the tokenizer has none.
      pad_id: id that fills up a batch; where the tokenizer has none of its own, the unknown token,
        EOS, or 0.
      fingerprint: SHA-256 (hexadecimal) of the files that define text → ids.
      adds_bos: whether a plain prompt begins with BOS.
      special_ids: control tokens; they stand for no text.
      special_tokens: what chat templates see, such as {"eos_token": "</s>"}.
      chat_template: Jinja source, or None.
    """

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    fingerprint: str
    adds_bos: bool
    special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_template: str | None

    @abc.abstractmethod
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, framed by BOS and EOS as asked, where the tokenizer has them.

        A tokenizer whose BOS is its EOS frames with the one at the end. Text is only text: a
        control token's name in it is spelt out.
        """

    @abc.abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int = 0
    ) -> list[list[int]]:
        """The ids of many texts; the result does not depend on `threads` (0: one a core)."""

    @abc.abstractmethod
    def encode_markup(self, text: str) -> list[int]:
        """The ids of a text in which names of control tokens stand for these tokens; no BOS.

        Names in messages that went through `shield` stay text.
        """

    @abc.abstractmethod
    def encode_markup_spans(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_markup`, and for each id where in `text` its characters end.

        One that stands for no character, such as a space put in front or the first bytes of a
        character, ends where the next one ends.
        """

    @abc.abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, as `AutoTokenizer(text)["input_ids"]` of the exported folder."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; control tokens and ids beyond the vocabulary stand for nothing."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> str:
        """How the vocabulary writes an id."""

    @abc.abstractmethod
    def token_byte_lengths(self) -> np.ndarray:
        """int32 [V]: bytes of UTF-8 text that each id stands for.

        Control and unknown tokens stand for none. Over an encoded text they sum to its bytes and,
        where the tokenizer puts a space in front of every text (as Llama's and Mistral's do), one
        more.
        """

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name → contents of the files from which `open_tokenizer` reads this tokenizer again."""

    def with_chat_template(self, template: str | None) -> Self:
        """The same tokenizer with another chat template (Jinja source)."""
        other = copy.copy(self)
        other.chat_template = template
        return other

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation in the tokenizer's chat format.

        Raises:
          UserError: there is no chat template, the messages are none, or the template refuses them.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.path}: has no chat template; expected one of {', '.join(chat.TEMPLATES)}, "
                "or a Jinja file"
            )
        return chat.render(
            self.chat_template,
            messages,
            self.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation, as `apply_chat_template(tokenize=True)` gives them.

        They differ where a message spells the name of a control token: that stays text here.
        """
        text = self.render_chat(self.shield(messages), add_generation_prompt=add_generation_prompt)
        return self.encode_markup(text)

    @abc.abstractmethod
    def control_names(self) -> ControlNames:
        """The names that stand for control tokens in `encode_markup`."""

    def shield(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Messages in which names of control tokens are marked as text for `encode_markup`.

        Raises:
          UserError: the messages are none, or hold half of a surrogate pair.
        """
        chat.check_messages(messages)
        for i, message in enumerate(messages):
            try:
                message["content"].encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"messages[{i}].content: is not valid Unicode ({error.reason}); expected UTF-8"
                ) from None
        return self.control_names().shield_messages(messages)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `files()` into a folder; each appears whole or not at all."""
        for name, data in self.files().items():
            files.write_bytes(Path(folder) / name, data)

    def framing(self) -> str:
        """What `bos=True, eos=True` puts around a document: "BOS and EOS", "BOS" or "EOS".

        Raises:
          UserError: nothing, so that a model could not tell documents apart.
        """
        if self.bos_id is None and self.eos_id is None:
            raise UserError(
                f"{self.path}: the tokenizer has neither BOS nor EOS, so documents could not be "
                "told apart; name one as bos_token or eos_token in tokenizer_config.json"
            )
        if self.eos_id is None:
            return "BOS"
        return "EOS" if self.bos_id in (None, self.eos_id) else "BOS and EOS"

    def _frame(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if eos and self.bos_id == self.eos_id:
            bos = False
        first = [self.bos_id] if bos and self.bos_id is not None else []
        last = [self.eos_id] if eos and self.eos_id is not None else []
        return [*first, *ids, *last]


def with_the_next(ends_N: np.ndarray, empty_N: Sequence[bool] | np.ndarray) -> np.ndarray:
    """Where pieces end, those that are empty where the next one does that is not."""
    out_N = np.array(ends_N, np.int64)
    for i in range(len(out_N) - 2, -1, -1):
        if empty_N[i]:
            out_N[i] = out_N[i + 1]
    return out_N
