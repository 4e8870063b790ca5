"""Keeps what people write apart from the control tokens that a chat template writes.

A template turns a conversation into one text, in which names such as `</s>` stand for tokens. A
message that spells such a name would end its own turn there, and could put words into the mouth of
the other side. So the first character of a name inside a message is replaced by a stand-in before
the template sees it, and comes back when the text around the template's own names is encoded: the
name is then spelt out in ordinary pieces, as it is in a document.

Stand-ins are low surrogates: no valid text holds one, and a text keeps its length.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

_FIRST_STAND_IN, _STAND_INS = 0xDC00, 0x400
_ANY_STAND_IN = re.compile("[\udc00-\udfff]")


def is_shielded(text: str) -> bool:
    """Whether a text holds a stand-in."""
    return not text.isascii() and _ANY_STAND_IN.search(text) is not None


class ControlNames:
    """The names of a tokenizer's control tokens."""

    def __init__(self, names: Iterable[str]):
        self.names = tuple(sorted(filter(None, names), key=lambda name: (-len(name), name)))
        self.firsts = tuple(sorted({name[0] for name in self.names}))
        assert len(self.firsts) <= _STAND_INS
        stand_ins = [chr(_FIRST_STAND_IN + i) for i in range(len(self.firsts))]
        self._stand_in = dict(zip(self.firsts, stand_ins, strict=True))
        self._first = str.maketrans(dict(zip(stand_ins, self.firsts, strict=True)))
        self._pattern = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")

    def split(self, text: str) -> list[str]:
        """Ordinary text and names in turn, the longest name where several begin."""
        out, position = [], 0
        for found in self._pattern.finditer(text):
            out += [text[position : found.start()], found[0]]
            position = found.end()
        return [*out, text[position:]]

    def mark(self, text: str, first: Mapping[str, str]) -> str:
        """`text` with the first character of every name replaced as `first` says."""
        return self._pattern.sub(lambda found: first[found[0][0]] + found[0][1:], text)

    def shield(self, text: str) -> str:
        """`text` in which no name is left; each one's first character is a stand-in."""
        while self._pattern.search(text):  # names can overlap
            text = self.mark(text, self._stand_in)
        return text

    def unshield(self, text: str) -> str:
        """What `shield` was given."""
        return text.translate(self._first)

    def shield_messages(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """Messages whose contents are shielded; other keys and values are as they were."""
        return [{**message, "content": self.shield(message["content"])} for message in messages]
