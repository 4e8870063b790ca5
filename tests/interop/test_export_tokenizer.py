import json

import pytest
from tokenizer_models import byte_level_folder, random_texts, train_sentencepiece
from transformers import AutoTokenizer

from danube_jax.config import TokenizerConfig
from danube_jax.data import chat
from danube_jax.data.tokenizer import HuggingFaceTokenizer, load_tokenizer, open_tokenizer
from danube_jax.errors import UserError
from danube_jax.interop.hf_tokenizer import export_tokenizer

NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
MESSAGES = [
    {"role": "user", "content": "Why is drinking water so healthy?"},
    {"role": "assistant", "content": " It is wet. \n</s>"},
    {"role": "user", "content": "漢字 🙂"},
]


@pytest.fixture(scope="module")
def mistral():
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    return load_tokenizer(TokenizerConfig(builtin="mistral"))


def exported(tokenizer, folder, template=None):
    export_tokenizer(tokenizer, folder, chat_template=template, model_max_length=8_192)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*chat.TEMPLATES, None])
def test_auto_tokenizer_reads_what_we_wrote(mistral, tmp_path, name):
    template = chat.TEMPLATES[name] if name else None
    theirs = exported(mistral, tmp_path, template)
    ours = mistral.with_chat_template(template)
    assert len(theirs) == 32_000
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert (theirs.pad_token_id, theirs.unk_token_id) == (0, 0)
    assert theirs.model_max_length == 8_192
    assert theirs.padding_side == "left"
    assert not theirs.clean_up_tokenization_spaces
    assert theirs.chat_template == template
    for text in [*random_texts(1_000, seed=11), "a</s> b<s>", "", " "]:
        assert theirs(text)["input_ids"] == ours.encode_prompt(text)
        ids = ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    if name:
        for prompt in (True, False):
            ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt)["input_ids"]
            assert ids == ours.encode_markup(
                ours.render_chat(MESSAGES, add_generation_prompt=prompt)
            )
            # Where a message spells no control token, that is how we ask.
            plain = [m | {"content": m["content"].replace("</s>", "")} for m in MESSAGES]
            ids = theirs.apply_chat_template(plain, add_generation_prompt=prompt)["input_ids"]
            assert ids == ours.encode_chat(plain, add_generation_prompt=prompt)
        assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=True, tokenize=False
        )


def test_files_and_fields_that_others_read(mistral, tmp_path):
    """transformers 4 and vLLM: tokenizer_config.json; llama.cpp's converter: tokenizer.model."""
    template = chat.TEMPLATES["danube2"]
    export_tokenizer(mistral, tmp_path, chat_template=template, model_max_length=8_192)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "tokenizer.model").read_bytes() == mistral.path.read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text() == template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == template
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Else version 4 gives token_type_ids too, which its models refuse.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["add_bos_token"] is True
    assert config["add_eos_token"] is False
    assert [config["added_tokens_decoder"][i]["content"] for i in "012"] == ["<unk>", "<s>", "</s>"]
    assert all(token["special"] for token in config["added_tokens_decoder"].values())
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }


def test_exported_again_gives_the_same_files(mistral, tmp_path):
    template = chat.TEMPLATES["danube"]
    exported(mistral, tmp_path / "first", template)
    again = open_tokenizer(tmp_path / "first")
    assert again.fingerprint == mistral.fingerprint
    exported(again, tmp_path / "second", template)
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_hugging_face_files_are_carried_over(tmp_path):
    source = byte_level_folder(tmp_path / "source", NAMES | {"chat_template": "old"})
    tokenizer = open_tokenizer(source)
    theirs = exported(tokenizer, tmp_path / "out", "{{ messages[0].content }}{{ eos_token }}")
    assert theirs.chat_template == "{{ messages[0].content }}{{ eos_token }}"
    assert theirs.model_max_length == 8_192
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    again = open_tokenizer(tmp_path / "out")
    assert isinstance(again, HuggingFaceTokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    original = AutoTokenizer.from_pretrained(source)
    for text in random_texts(300, seed=4):
        assert theirs(text)["input_ids"] == original(text)["input_ids"]
    # A template of an earlier export does not stay behind.
    assert exported(tokenizer, tmp_path / "out").chat_template is None


def test_what_transformers_5_saves_is_made_readable_for_4(tmp_path):
    """Version 4 knows neither the class `TokenizersBackend` nor a list of extra tokens."""
    source = byte_level_folder(tmp_path / "source", NAMES)
    saved = AutoTokenizer.from_pretrained(source)
    saved.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    saved.save_pretrained(source)
    tokenizer = open_tokenizer(source)
    theirs = exported(tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    special = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert special["eos_token"] == "<|im_end|>"
    text = "a<|tool|>b<|im_end|>"
    assert theirs(text)["input_ids"] == saved(text)["input_ids"]
    assert theirs.all_special_ids == saved.all_special_ids
    assert open_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_a_lone_tokenizer_json_becomes_a_folder(tmp_path):
    source = byte_level_folder(tmp_path / "source") / "tokenizer.json"
    theirs = exported(open_tokenizer(source), tmp_path / "out")
    assert len(theirs) == 600
    assert theirs.eos_token is None


def test_refused_models_leave_nothing(tmp_path):
    model = train_sentencepiece(tmp_path / "a.model", model_type="unigram")
    with pytest.raises(UserError, match="a unigram model"):
        exported(open_tokenizer(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
