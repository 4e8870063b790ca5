"""Tokenised conversations against transformers' own rendering, tokenising and masks."""

import dataclasses

import numpy as np
import pytest
from tokenizer_models import byte_level_folder, train_sentencepiece

from danube_jax.data import chat
from danube_jax.data.chat_examples import ChatEncoder, Dropped
from danube_jax.data.conversations import Conversation
from danube_jax.data.preferences import PreferencePair
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError
from danube_jax.interop.hf_tokenizer import export_tokenizer

TURNS: Conversation = (
    {"role": "user", "content": "How do lists 漢 grow?"},
    {"role": "assistant", "content": "(They) are resized 🙂 when full."},
    {"role": "user", "content": "And tuples?\n"},
    {"role": "assistant", "content": "Never: a tuple is immutable."},
)
SYSTEM = {"role": "system", "content": "Be brief."}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + '|' }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece tokenizer in the manner of Llama's."""
    return open_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer with ChatML's control tokens."""
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return open_tokenizer(byte_level_folder(tmp_path_factory.mktemp("bpe") / "t", config))


def exported(tokenizer, folder):
    """transformers' tokenizer of the exported folder."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    export_tokenizer(tokenizer, folder, chat_template=tokenizer.chat_template, model_max_length=512)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*chat.TEMPLATES, "chatml"])
def test_ids_are_those_of_apply_chat_template(name, pieces, byte_level, tmp_path):
    tokenizer = byte_level if name == "chatml" else pieces
    tokenizer = tokenizer.with_chat_template(chat.TEMPLATES.get(name, CHATML))
    messages = (SYSTEM, *TURNS) if name in ("danube", "chatml") else TURNS
    example = ChatEncoder(tokenizer).encode(messages)
    hf = exported(tokenizer, tmp_path / "hf")
    expected = hf.apply_chat_template([dict(m) for m in messages], return_dict=False)
    assert example.ids.tolist() == expected
    # What is trained on reads as the answers, each with its end token.
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    end = hf.eos_token
    found = hf.decode(example.ids[example.mask])
    assert found.replace(f"{end} ", end) == "".join(f"{a.strip()}{end}" for a in answers)


def test_masks_are_those_of_generation_tags(byte_level, tmp_path):
    tokenizer = byte_level.with_chat_template(MARKED)
    hf = exported(tokenizer, tmp_path / "hf")
    expected = hf.apply_chat_template(
        [dict(m) for m in TURNS], return_assistant_tokens_mask=True, return_dict=True
    )
    example = ChatEncoder(tokenizer).encode(TURNS)
    assert example.ids.tolist() == expected["input_ids"]
    assert example.mask.tolist() == [bool(m) for m in expected["assistant_masks"]]
    # The same text without the tags: found by rendering beginnings of the conversation.
    plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    trimming = MARKED.replace("{% generation %}", "{%-generation -%}")
    for other in (plain, trimming):
        again = ChatEncoder(tokenizer.with_chat_template(other)).encode(TURNS)
        np.testing.assert_array_equal(again.mask, example.mask)


def test_published_ids_of_prompt_and_answer():
    """Mistral's tokenizer: the marker ids of the published chat models, the answer on its own."""
    pytest.importorskip("mistral_common", reason="carries Mistral's tokenizer")
    from danube_jax.config import TokenizerConfig
    from danube_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TokenizerConfig(builtin="mistral"))
    tokenizer = tokenizer.with_chat_template(chat.TEMPLATES["danube2"])
    prompt = "523 28766 14350 447 28766 28767 7638 349 11605 2130 579 7783 28804 2"
    prompt = [int(i) for i in f"{prompt} 523 28766 24115 28766 28767".split()]
    answer = [2985, 10593, 2130, 349, 7783, 28723, 2]
    turns = (
        {"role": "user", "content": "Why is drinking water so healthy?"},
        {"role": "assistant", "content": "Drinking water is healthy."},
    )
    example = ChatEncoder(tokenizer, tokenization="separate").encode(turns)
    assert example.ids.tolist() == prompt + answer
    assert example.mask.tolist() == [False] * len(prompt) + [True] * len(answer)
    joint = ChatEncoder(tokenizer).encode(turns)
    assert joint.ids.tolist()[: len(prompt)] == prompt
    assert joint.ids.tolist() != example.ids.tolist()  # no space piece begins the answer


@pytest.mark.parametrize("tokenization", ["joint", "separate"])
def test_a_pair_trains_on_the_last_answer_of_a_shared_history(pieces, tokenization):
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    encoder = ChatEncoder(tokenizer, tokenization=tokenization)
    pair = encoder.pair(PreferencePair(TURNS[:3], "Never.", "Always, I think."), Dropped())
    prompts = {
        tuple(side.ids[: int(np.argmax(side.mask))]) for side in (pair.chosen, pair.rejected)
    }
    assert len(prompts) == 1
    texts = [tokenizer.decode(s.ids[s.mask]).strip() for s in (pair.chosen, pair.rejected)]
    assert texts == ["Never.", "Always, I think."]
    for side in (pair.chosen, pair.rejected):
        assert side.ids[-1] == tokenizer.eos_id
        assert side.mask[np.argmax(side.mask) :].all()


def test_whole_text_is_trained_on_where_asked(pieces):
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    example = ChatEncoder(tokenizer, mask_prompt=False).encode(TURNS)
    assert not example.mask[0]
    assert example.mask[1:].all()


def test_truncation(pieces):
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    whole = ChatEncoder(tokenizer).encode(TURNS)
    size = len(whole.ids) - 10
    counts = {}
    for truncation in ("drop", "left", "right"):
        encoder = ChatEncoder(tokenizer, max_length=size, truncation=truncation)
        dropped = Dropped()
        example = encoder.example(TURNS, dropped)
        counts[truncation] = {k: n for k, n in dataclasses.asdict(dropped).items() if n}
        if truncation == "drop":
            assert example is None
            continue
        kept = slice(10, None) if truncation == "left" else slice(size)
        np.testing.assert_array_equal(example.ids, whole.ids[kept])
        np.testing.assert_array_equal(example.mask, whole.mask[kept])
    assert counts == {"drop": {"too_long": 1}, "left": {"shortened": 1}, "right": {"shortened": 1}}
    # Cut before the first answer begins, nothing is left to train on.
    dropped = Dropped()
    short = ChatEncoder(tokenizer, max_length=5, truncation="right")
    assert short.example(TURNS, dropped) is None
    assert (dropped.nothing_to_train, dropped.shortened) == (1, 0)
    assert "without a token to train on" in dropped.describe()


def test_truncated_pairs_keep_a_common_prompt(pieces):
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    preference = PreferencePair(TURNS[:3], "Never.", "Always, as I have told you before.")
    whole = ChatEncoder(tokenizer).pair(preference, Dropped())
    longest = max(len(whole.chosen.ids), len(whole.rejected.ids))
    dropped = Dropped()
    left = ChatEncoder(tokenizer, max_length=longest - 4, truncation="left").pair(
        preference, dropped
    )
    for side, before in ((left.chosen, whole.chosen), (left.rejected, whole.rejected)):
        np.testing.assert_array_equal(side.ids, before.ids[4:])
    assert dropped.shortened == 1
    answer = whole.rejected.trained
    tight = ChatEncoder(tokenizer, max_length=answer, truncation="left").pair(preference, Dropped())
    assert len(tight.rejected.ids) == answer
    assert tight.rejected.trained == answer - 1  # a token of the prompt stays, to predict from


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(pieces):
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    same = "All of them are objects"
    preference = PreferencePair(TURNS[:1], f"{same}, and more.", f"{same}; no.")
    common = len(ChatEncoder(tokenizer).encode((*TURNS[:1], TURNS[1] | {"content": same})).ids) - 1
    dropped = Dropped()
    encoder = ChatEncoder(tokenizer, max_length=common, truncation="right")
    assert encoder.pair(preference, dropped) is None
    assert (dropped.alike, dropped.shortened) == (1, 0)
    assert dropped.describe() == "1 with two equal answers, dropped"


def test_refused_by_the_template(pieces):
    encoder = ChatEncoder(pieces.with_chat_template(chat.TEMPLATES["danube2"]))
    with pytest.raises(UserError, match="System role not supported"):
        encoder.encode((SYSTEM, *TURNS))
    changing = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="generation"):
        ChatEncoder(pieces.with_chat_template(changing)).encode(TURNS)


def test_nothing_after_the_end_of_an_answer_is_trained_on(pieces):
    """Not the space, either, that SentencePiece puts in front of the text behind it."""
    for template in (
        chat.TEMPLATES["danube"],
        "{% for m in messages %}{{ m.content }}</s>\n{% endfor %}",
    ):
        example = ChatEncoder(pieces.with_chat_template(template)).encode(TURNS)
        ends = example.ids == pieces.eos_id
        assert ends.sum() == len(TURNS)
        behind = np.roll(ends, 1)
        behind[0] = False
        assert not (example.mask & behind).any()


def test_all_bytes_of_an_answers_first_character_are_trained_on(pieces):
    """SentencePiece gives the characters of several bytes to the last one."""
    messages = [TURNS[0], {"role": "assistant", "content": "\u3402"}]
    tokenizer = pieces.with_chat_template(chat.TEMPLATES["danube"])
    example = ChatEncoder(tokenizer).encode(messages)
    trained = [tokenizer.piece(i) for i in example.ids[example.mask]]
    assert trained == ["<0xE3>", "<0x90>", "<0x82>", "</s>"]
