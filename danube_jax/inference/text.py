"""Text of tokens that arrive one after another: whole characters only, stop strings never shown."""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how tokenizers write bytes that are no character (yet)
MAX_PENDING_BYTES = 3  # of an unfinished UTF-8 character
CONTEXT_TOKENS = 8  # decoded along, since a token's text can depend on those before it
WINDOW_TOKENS = 64


class Decodes(Protocol):
    """What a tokenizer must offer here."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens stand for nothing."""


class Detokenizer:
    """Turns a continuation's tokens into text, piece by piece.

    The pieces joined are what the tokens add to the text of the prompt: SentencePiece, say, drops
    the space in front of a text's first word, but not of a continuation's.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._shown = len(self._decode().rstrip(INCOMPLETE))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with these tokens."""
        self._window += tokens
        text = self._decode()
        certain = text.rstrip(INCOMPLETE)
        # More bytes than a character can wait for will never become one.
        certain += INCOMPLETE * max(0, len(text) - len(certain) - MAX_PENDING_BYTES)
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(self._window) > WINDOW_TOKENS and not text.endswith(INCOMPLETE):
            self._window = self._window[-CONTEXT_TOKENS:]
            self._shown = len(self._decode())
        return piece

    def flush(self) -> str:
        """What was held back, at the end."""
        text = self._decode()
        piece = text[self._shown :]
        self._shown = len(text)
        return piece


class StopStrings:
    """Passes text through up to the first of several stop strings.

    Text that may be the beginning of a stop string is held back until it is certain not to be.
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._strings) if at >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        keep = max((self._overlap(string) for string in self._strings), default=0)
        split = len(self._held) - keep
        piece, self._held = self._held[:split], self._held[split:]
        return piece

    def _overlap(self, string: str) -> int:
        """Length of the longest beginning of `string` that the held text ends with."""
        longest = min(len(string) - 1, len(self._held))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if self._held.endswith(string[:n])), 0)

    def flush(self) -> str:
        """What was held back, at the end."""
        piece, self._held = self._held, ""
        return piece
