"""Text from tokens that arrive one by one: whole characters, and stop strings never shown."""

import numpy as np
import pytest
import sentencepiece

from danube_jax.inference.text import Detokenizer, StopStrings


class Bytes:
    """A tokenizer whose ids are bytes, with one replacement character for each bad byte."""

    def decode(self, ids):
        text, data = "", bytes(ids)
        while data:
            try:
                return text + data.decode()
            except UnicodeDecodeError as error:
                text += data[: error.start].decode() + "\ufffd" * (error.end - error.start)
                data = data[error.end :]
        return text


TEXT = "né 日本語 🙂👩‍👩‍👧 end."


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_characters_come_out_whole(step):
    data = (TEXT * 9).encode()
    detokenizer = Detokenizer(Bytes(), list(b"prompt"))
    pieces = [detokenizer.push(list(data[i : i + step])) for i in range(0, len(data), step)]
    assert "".join(pieces) + detokenizer.flush() == TEXT * 9
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] != ""


def test_bytes_that_are_no_character_come_out_in_the_end():
    detokenizer = Detokenizer(Bytes(), [])
    shown = "".join(detokenizer.push([0xFF]) for _ in range(10))
    assert shown == "\ufffd" * 7
    assert detokenizer.flush() == "\ufffd" * 3
    assert Detokenizer(Bytes(), list("é".encode())[:1]).push(list("é".encode())[1:]) == "é"


def test_spaces_of_sentencepiece(corpus):
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpus.path / "tokenizer.model"))
    text = "The  value of x,\n   and 日本 of the object it names. " * 4
    ids = model.encode(text)
    for cut in range(1, 30):
        prompt, rest = ids[:cut], ids[cut:]
        detokenizer = Detokenizer(model, prompt)
        shown = "".join(detokenizer.push([token]) for token in rest) + detokenizer.flush()
        # A prompt that ends within a character leaves the whole character to the continuation.
        assert model.decode(prompt).rstrip("\ufffd") + shown == model.decode(ids)


def test_stop_strings_are_held_back_and_never_shown():
    text, stops = "abcaba|bcabd and more", ("abd", "|x", "caba|bcabdx")
    for step in range(1, len(text)):
        filter_ = StopStrings(stops)
        shown = ""
        for i in range(0, len(text), step):
            shown += filter_.push(text[i : i + step])
            assert "abcaba|bc".startswith(shown)  # nothing of the stop string, at any time
        assert filter_.stopped
        assert shown + filter_.flush() == "abcaba|bc"


def test_what_only_began_like_a_stop_string_is_shown():
    filter_ = StopStrings(("END", "<|user|>"))
    assert filter_.push("a <|us") == "a "
    assert filter_.push("eful") == "<|useful"
    assert filter_.push(" EN") == " "
    assert (filter_.flush(), filter_.stopped) == ("EN", False)
    assert StopStrings(()).push("all") == "all"


def test_random_texts_stop_where_find_says():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 12))
        stops = tuple("".join(rng.choice(list("ab"), n)) for n in rng.integers(2, 6, 2))
        filter_ = StopStrings(stops)
        shown = "".join(filter_.push(letter) for letter in text) + filter_.flush()
        # The first to be completed ends the text; found letter by letter.
        expected = text
        for end in range(len(text)):
            starts = [text[: end + 1].find(stop) for stop in stops]
            if max(starts) >= 0:
                expected = text[: min(start for start in starts if start >= 0)]
                break
        assert shown == expected
