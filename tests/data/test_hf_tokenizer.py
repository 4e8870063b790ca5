import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_models import byte_level_folder, random_texts, train_sentencepiece
from transformers import AutoTokenizer

from danube_jax.config import TokenizerConfig
from danube_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    open_tokenizer,
)
from danube_jax.errors import UserError
from danube_jax.interop.hf_tokenizer import export_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = random_texts(500, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "byte_level"
    return byte_level_folder(path, NAMES | {"chat_template": TEMPLATE}, bos_first=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model")


def test_ids_and_texts_are_those_of_transformers(folder):
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 0)
    assert ours.vocab_size == len(theirs) == 600
    assert ours.adds_bos
    assert ours.special_ids == {0, 1, 2}
    marked = [f"{text}<|im_end|>{text}" for text in TEXTS]
    for text in [*TEXTS, *marked]:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
        assert ours.encode_markup(text) == theirs(text, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == [1, *theirs(text, add_special_tokens=False)["input_ids"], 2]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
        assert ours.decode(np.array(ids)) == text
    assert ours.decode([5, 1, 600, 70_000, 5]) == ours.decode([5, 5])


def test_chat_is_that_of_transformers(folder):
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hi <|im_end", "Hi <|im_end|>"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": " "}]
        for prompt in (True, False):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
            rendered = ours.render_chat(messages, add_generation_prompt=prompt)
            assert ours.encode_markup(rendered) == expected["input_ids"]
            same = ours.encode_chat(messages, add_generation_prompt=prompt) == expected["input_ids"]
            # A control token's name in a message is a token to transformers, and text to us.
            assert same == (text == "Hi <|im_end")


def test_names_of_control_tokens_in_a_document_are_text(folder, model):
    for tokenizer, name in (
        (open_tokenizer(folder), "<|im_end|>"),
        (open_tokenizer(model), "</s>"),
    ):
        ids = tokenizer.encode(f"a{name}b")
        assert not tokenizer.special_ids & set(ids)
        assert tokenizer.encode_batch([f"a{name}b"]) == [ids]
        assert tokenizer.decode(ids) == f"a{name}b"
        assert tokenizer.eos_id in tokenizer.encode_markup(f"a{name}b")


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_equal_single_texts(folder, threads):
    tokenizer = open_tokenizer(folder)
    expected = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS, bos=True, eos=True, threads=threads) == expected


def test_byte_lengths_sum_to_the_text(folder, model, tmp_path):
    export_tokenizer(
        SentencePieceTokenizer(model), tmp_path, chat_template=None, model_max_length=64
    )
    for tokenizer, prefix in ((open_tokenizer(folder), 0), (HuggingFaceTokenizer(tmp_path), 1)):
        lengths = tokenizer.token_byte_lengths()
        assert lengths.dtype == np.int32
        assert lengths.shape == (tokenizer.vocab_size,)
        assert not lengths[list(tokenizer.special_ids)].any()
        for text in filter(None, TEXTS):
            ids = tokenizer.encode(text, bos=True, eos=True)
            if prefix:  # there the mark of a space is a space
                text = text.replace("\u2581", " ")
            assert lengths[ids].sum() == len(text.encode()) + prefix
    reference = SentencePieceTokenizer(model).token_byte_lengths()
    np.testing.assert_array_equal(HuggingFaceTokenizer(tmp_path).token_byte_lengths(), reference)


def test_added_tokens_count_their_bytes(tmp_path):
    folder = byte_level_folder(tmp_path / "added", NAMES)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(["naïve"])
    theirs.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    theirs.save_pretrained(folder)
    ours = open_tokenizer(folder)
    assert ours.vocab_size == 602
    assert list(ours.token_byte_lengths()[600:]) == [len("naïve".encode()), 0]
    assert ours.special_ids == {0, 1, 2, 601}
    text = "a naïve<|tool|>"
    assert ours.encode_prompt(text) == theirs(text)["input_ids"]


def test_byte_lengths_of_other_kinds_are_refused(tmp_path):
    import tokenizers

    fast = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot tell how many bytes"):
        open_tokenizer(tmp_path / "tokenizer.json").token_byte_lengths()


def test_missing_bos_or_eos(tmp_path):
    both = open_tokenizer(byte_level_folder(tmp_path / "both", NAMES))
    assert not both.adds_bos
    assert both.framing() == "BOS and EOS"
    assert both.encode_prompt("a") == both.encode("a")
    end = open_tokenizer(byte_level_folder(tmp_path / "end", {"eos_token": "<|endoftext|>"}))
    assert (end.bos_id, end.eos_id, end.pad_id, end.framing()) == (None, 0, 0, "EOS")
    assert end.encode("a", bos=True, eos=True) == [*end.encode("a"), 0]
    assert not end.adds_bos
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    same = open_tokenizer(byte_level_folder(tmp_path / "same", names))
    assert same.framing() == "EOS"
    assert same.encode("a", bos=True, eos=True) == [*same.encode("a"), 0]
    assert same.encode("a", bos=True) == [0, *same.encode("a")]
    none = open_tokenizer(byte_level_folder(tmp_path / "none") / "tokenizer.json")
    assert (none.bos_id, none.eos_id, none.pad_id) == (None, None, 0)
    assert none.encode("a", bos=True, eos=True) == none.encode("a")
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        none.framing()


def test_a_tokenizer_json_is_read_with_the_config_beside_it(folder):
    by_file, by_folder = open_tokenizer(folder / "tokenizer.json"), open_tokenizer(folder)
    assert by_file.fingerprint == by_folder.fingerprint
    assert by_file.eos_id == 2
    assert load_tokenizer(TokenizerConfig(path=str(folder))).fingerprint == by_file.fingerprint


def test_fingerprint_follows_ids_alone(folder, tmp_path):
    original = open_tokenizer(folder).fingerprint
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "x", "model_max_length": 7}))
    assert open_tokenizer(copy).fingerprint == original
    path.write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    assert open_tokenizer(copy).fingerprint != original
    path.write_text(json.dumps(config))
    content = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(content.replace("<|im_end|>", "<|im_stop|>"))
    assert open_tokenizer(copy).fingerprint != original


def test_saved_and_opened_again(folder, model, tmp_path):
    for source in (folder, model):
        tokenizer = open_tokenizer(source).with_chat_template("{{ eos_token }}é")
        tokenizer.save(tmp_path / "saved" / source.name)
        again = open_tokenizer(tmp_path / "saved" / source.name)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.chat_template == "{{ eos_token }}é"
        tokenizer.with_chat_template(None).save(tmp_path / "none" / source.name)
        assert open_tokenizer(tmp_path / "none" / source.name).chat_template is None


def published_folder(model, folder, config):
    """A folder as Llama's and Danube's were published: both files, a class of its own."""
    export_tokenizer(SentencePieceTokenizer(model), folder, chat_template=None, model_max_length=64)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_published_llama_folders_keep_the_ids_of_sentencepiece(model, tmp_path, model_type):
    """transformers 5 makes other ids of such a folder where a Llama is beside it, or no model."""
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = published_folder(model, tmp_path / "published", config | names)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    reference = SentencePieceTokenizer(model)
    opened = open_tokenizer(folder)
    assert isinstance(opened, HuggingFaceTokenizer)
    opened.save(tmp_path / "saved")
    export_tokenizer(opened, tmp_path / "exported", chat_template=None, model_max_length=64)
    for name in ("saved", "exported"):
        again = open_tokenizer(tmp_path / name)
        assert again.fingerprint == opened.fingerprint
        # Whatever stands beside it.
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in [*TEXTS, " one", "  two", " "]:
            expected = reference.encode_prompt(text)
            assert opened.encode_prompt(text) == expected
            assert again.encode_prompt(text) == expected
            assert theirs(text)["input_ids"] == expected
    stored = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == stored


def test_special_tokens_that_a_folder_leaves_to_its_class(model, tmp_path):
    folder = published_folder(model, tmp_path / "bare", {"tokenizer_class": "LlamaTokenizerFast"})
    (folder / "special_tokens_map.json").unlink()
    opened = open_tokenizer(folder)
    assert (opened.bos_id, opened.eos_id) == (1, 2)
    opened.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, 600)
    assert again.fingerprint == opened.fingerprint
    # A class whose tokens the vocabulary lacks adds none to it.
    byte_level = byte_level_folder(tmp_path / "bytes", {"tokenizer_class": "LlamaTokenizerFast"})
    assert open_tokenizer(byte_level).vocab_size == 600
    assert open_tokenizer(byte_level).bos_id is None


def test_tokenizer_json_decides_on_bos(model, tmp_path):
    """As in transformers 5; what is exported says the same everywhere."""
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "bos_token": "<s>"}
    folder = published_folder(model, tmp_path / "published", config)
    opened = open_tokenizer(folder)
    assert opened.adds_bos
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 1
    export_tokenizer(opened, tmp_path / "exported", chat_template=None, model_max_length=64)
    written = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert written["add_bos_token"] is True
    assert open_tokenizer(tmp_path / "exported").fingerprint == opened.fingerprint


def test_vocabulary_and_merges_become_a_tokenizer_json(tmp_path):
    source = byte_level_folder(tmp_path / "source")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    opened = open_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    opened.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == opened.fingerprint
    assert again.eos_id == opened.eos_id == theirs.eos_token_id == 0
    for text in TEXTS:
        assert opened.encode_prompt(text) == theirs(text)["input_ids"] == again.encode_prompt(text)


def test_folder_of_a_sentencepiece_model_alone(model, tmp_path):
    shutil.copy(model, tmp_path / "tokenizer.model")
    tokenizer = open_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.fingerprint == SentencePieceTokenizer(model).fingerprint
    assert tokenizer.chat_template is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"add_bos_token": False, "chat_template": TEMPLATE}))
    tokenizer = open_tokenizer(tmp_path)
    assert not tokenizer.adds_bos
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a")
    tokenizer.save(tmp_path / "again")
    assert not open_tokenizer(tmp_path / "again").adds_bos
    config.write_text(json.dumps({"added_tokens_decoder": {"600": {"content": "<|im_end|>"}}}))
    with pytest.raises(UserError, match=r"adds tokens to the 600 of tokenizer.model"):
        open_tokenizer(tmp_path)


def test_our_own_export_is_recognised_until_it_is_changed(model, tmp_path):
    export_tokenizer(
        SentencePieceTokenizer(model), tmp_path, chat_template=None, model_max_length=64
    )
    assert isinstance(open_tokenizer(tmp_path), SentencePieceTokenizer)
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "[1]", "holds list; expected a JSON object"),
        ("tokenizer_config.json", "{", "expected a JSON object"),
        ("tokenizer_config.json", '{"auto_map": {}}', "Python code of its own"),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, name, content, fragment):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=fragment):
        open_tokenizer(copy)


def test_missing_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        open_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        open_tokenizer(tmp_path / "nothing")


def test_neither_network_nor_torch(folder):
    program = f"""
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from danube_jax.data.tokenizer import open_tokenizer
assert "transformers" not in sys.modules
tokenizer = open_tokenizer({str(folder)!r})
print(tokenizer.encode_chat([{{"role": "user", "content": "Hi"}}])[0], "torch" in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["1", "False"]
