import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from danube_jax.config import TokenizerConfig
from danube_jax.data import tokenizer
from danube_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    f"Entry {i}: the {a} {b} of  {c},\n    indented {i * 37} times.\n\n\tTab\nünï — 漢字 🙂"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("quick", "slow", "bright", "heavy", "ancient")
        for b in ("river", "danube", "water", "engine", "library")
        for c in ("mountains", "languages", "numbers", "letters")
    )
]
TEST_STRINGS = [
    "Hello  world",
    " leading and trailing ",
    "línea\nsegunda\r\n\ttab",
    "emoji 🙂🏽 and 漢字",
    "x = {'a': 1234567890}",
    "\u00a0no-break\u2009thin",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizer.train_bpe(TEXTS, tmp_path_factory.mktemp("bpe") / "a.model", 420)


@pytest.fixture(scope="module")
def mistral():
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    return tokenizer.load_tokenizer(TokenizerConfig(builtin="mistral"))


def test_trained_vocabulary_has_the_layout_of_llama(trained):
    assert trained.vocab_size == 420
    assert [trained.piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, 0)
    assert trained.piece(3 + 255) == "<0xFF>"
    pieces = [trained.piece(i) for i in range(259, 420)]
    assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)
    assert any(len(piece) > 3 for piece in pieces)


def test_training_is_deterministic_and_in_place_of_its_name_only(tmp_path, trained):
    again = tokenizer.train_bpe(iter(TEXTS), tmp_path / "b.model", 420)
    assert again.fingerprint == trained.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["b.model"]
    other = tokenizer.train_bpe(TEXTS, tmp_path / "c.model", 400)
    assert other.fingerprint != trained.fingerprint


def test_long_lines_are_not_left_out(tmp_path):
    text = " ".join(["unforgettable"] * 2_000)
    trained = tokenizer.train_bpe([text], tmp_path / "long.model", 290)
    assert len(trained.encode("unforgettable")) == 1


@pytest.mark.parametrize("text", TEST_STRINGS)
@pytest.mark.parametrize("which", ["trained", "mistral"])
def test_round_trip_and_byte_lengths(request, which, text):
    model = request.getfixturevalue(which)
    ids = model.encode(text)
    assert model.decode(ids) == text
    lengths = model.token_byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (model.vocab_size,)
    assert lengths[ids].sum() == len(text.encode()) + 1
    framed = model.encode(text, bos=True, eos=True)
    assert framed == [model.bos_id, *ids, model.eos_id]
    assert lengths[framed].sum() == lengths[ids].sum()
    assert model.decode(np.array(framed)) == text


def test_batches_equal_single_texts(trained):
    expected = [trained.encode(text, bos=True, eos=True) for text in TEXTS]
    for threads in (0, 1, 3):
        assert trained.encode_batch(TEXTS, bos=True, eos=True, threads=threads) == expected


def test_mistral_file_is_the_published_one(mistral):
    assert mistral.vocab_size == 32_000
    assert mistral.fingerprint.startswith("dadfd56d766715c6")
    assert mistral.encode("Hello  world") == [22557, 28705, 1526]
    assert [mistral.piece(i) for i in mistral.encode("Hello")] == ["▁Hello"]


def test_encoding_equals_sentencepiece(mistral):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral.path))
    assert [mistral.encode(text) for text in TEST_STRINGS] == reference.encode(TEST_STRINGS)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'danube-jax\[mistral\]'"):
        tokenizer.load_tokenizer(TokenizerConfig(builtin="mistral"))


def test_bad_files_are_refused(tmp_path, trained):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tokenizer.load_tokenizer(TokenizerConfig(path=str(tmp_path / "none.model")))
    for name, data in (
        ("empty", b""),
        ("text", b"this is no model"),
        ("cut", trained.path.read_bytes()[:3000]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: damaged or not a SentencePiece model"):
            tokenizer.open_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="expected path or builtin"):
        tokenizer.load_tokenizer(TokenizerConfig(train_vocab_size=500))


@pytest.mark.parametrize(("texts", "size"), [([], 400), ([""], 400), (["short"], 400), (TEXTS, 50)])
def test_impossible_training_writes_nothing(tmp_path, texts, size):
    with pytest.raises(UserError, match="expected"):
        tokenizer.train_bpe(texts, tmp_path / "a.model", size)
    assert list(tmp_path.iterdir()) == []


def test_error_of_the_texts_comes_through(tmp_path):
    def texts():
        yield "fine"
        raise UserError("line 7 is damaged")

    with pytest.raises(UserError, match="line 7 is damaged"):
        tokenizer.train_bpe(texts(), tmp_path / "a.model", 400)


def call_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_tool_reads_text_and_json_lines(tmp_path, trained):
    half = len(TEXTS) // 2
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[:half])
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[half:]))
    output = tmp_path / "out.model"
    inputs = (tmp_path / "a.jsonl.gz", tmp_path / "b.txt")
    done = call_tool("--vocab_size=420", f"--output={output}", *inputs)
    assert done.returncode == 0, done.stderr
    assert tokenizer.open_tokenizer(output).fingerprint == trained.fingerprint


def test_tool_refuses_bad_input_in_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    output = f"--output={tmp_path / 'out.model'}"
    for arguments, message in (
        ((output, tmp_path / "none.txt"), "no such file"),
        ((output, tmp_path / "bad.jsonl"), "line 2"),
        (("--vocab_size=many", output, tmp_path / "bad.jsonl"), "vocab_size"),
    ):
        done = call_tool(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
