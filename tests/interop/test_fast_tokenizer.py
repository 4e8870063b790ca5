"""tokenizer.json made of a SentencePiece model gives the ids of SentencePiece."""

import importlib.util
from pathlib import Path

import pytest
from tokenizer_models import FRAGMENTS, random_texts, train_sentencepiece

from danube_jax.data.tokenizer import SentencePieceTokenizer, train_bpe
from danube_jax.errors import UserError
from danube_jax.interop import fast_tokenizer
from danube_jax.interop.fast_tokenizer import to_fast_tokenizer

MISTRAL = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
}
# Options of SentencePiece's trainer, beside those of our own models.
TRAINED = {
    "ours": {},
    "no_prefix": {"add_dummy_prefix": False},
    "no_byte_fallback": {"byte_fallback": False},
    "extra_whitespace_removed": {"remove_extra_whitespaces": True},
    "extra_whitespace_removed_no_prefix": {
        "remove_extra_whitespaces": True,
        "add_dummy_prefix": False,
    },
    "user_defined": {"user_defined_symbols": ["<sep>", "<sep2>", "sepp", "\u2581\u2581\u2581"]},
    "user_defined_no_prefix": {
        "user_defined_symbols": ["<sep>", "<sep2>", "sepp", "a.b"],
        "add_dummy_prefix": False,
    },
    "control": {"control_symbols": ["<sep>", "<sep2>"], "pad_id": 3},
    "across_words": {"split_by_whitespace": False, "split_digits": False},
}
REFUSED = {
    "normalised": ({"normalization_rule_name": "nmt_nfkc"}, "the normaliser 'nmt_nfkc'"),
    "unigram": ({"model_type": "unigram"}, "a unigram model"),
    "characters": ({"model_type": "char"}, "a char model"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    "symbol with a space": ({"user_defined_symbols": ["a b"]}, "symbol with a space"),
    "symbols and whitespace": (
        {"user_defined_symbols": ["<sep>"], "remove_extra_whitespaces": True},
        "beside remove_extra_whitespaces",
    ),
}
MARKERS = ("[REF]", "[/REF]", "[REFERENCE_DOC_1]", "[REFERENCE_DOC_12]", "[REFERENCE_DOC_")
HARD_TEXTS = (
    "",
    " ",
    "  ",
    "\u2581",
    " \u2581 ",
    "\x00",
    "a\x00b",
    "\n",
    "\r\n\t \t",
    " leading",
    "trailing ",
    "x" * 3_000,
    " " * 3_000,
    "\n" * 1_000,
    "-" * 777 + "=" * 777,
    "e\u0301" * 50 + "\u0301" * 20,
    "👩\u200d👩\u200d👧\u200d👦" * 9,
    "<0x0A><0xFF><0x",
    "<|prompt|>Why?<|answer|>",
)


def model(name, folder):
    if name in MISTRAL:
        spec = importlib.util.find_spec("mistral_common")
        if spec is None:
            pytest.skip("mistral-common is not installed")
        path = Path(spec.submodule_search_locations[0]) / "data" / MISTRAL[name]
        if not path.is_file():
            pytest.skip(f"this mistral-common has no {MISTRAL[name]}")
        return SentencePieceTokenizer(path)
    path = train_sentencepiece(folder / f"{name}.model", **TRAINED[name])
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module", params=[*MISTRAL, *TRAINED])
def pair(request, tmp_path_factory):
    """A SentencePiece tokenizer and what it was converted to."""
    tokenizer = model(request.param, tmp_path_factory.mktemp("models"))
    return tokenizer, to_fast_tokenizer(tokenizer)


def plain(texts, tokenizer):
    """The texts in which no control token's name stands."""
    names = [tokenizer.piece(i) for i in tokenizer.special_ids]
    return [text for text in texts if not any(name in text for name in names)]


def test_ids_and_texts_equal_those_of_sentencepiece(pair):
    tokenizer, fast = pair
    fragments = (*FRAGMENTS, *MARKERS)
    texts = plain([*HARD_TEXTS, *random_texts(4_000, seed=5, fragments=fragments)], tokenizer)
    assert len(texts) > 500
    ids = tokenizer.model.encode(texts)
    assert [one.ids for one in fast.encode_batch(texts, add_special_tokens=False)] == ids
    assert fast.decode_batch(ids) == [tokenizer.decode(one) for one in ids]


def test_runs_of_one_character(pair):
    tokenizer, fast = pair
    texts = [
        before + character * n + after
        for character in " \n\t-=.#a1é漢🙂"
        for n in range(1, 70)
        for before, after in (("", ""), ("a", "b"), ("\n", " "))
    ]
    ids = tokenizer.model.encode(texts)
    assert [one.ids for one in fast.encode_batch(texts, add_special_tokens=False)] == ids


def test_names_of_control_tokens_are_these_tokens(pair):
    tokenizer, fast = pair
    names = [tokenizer.piece(i) for i in sorted(tokenizer.special_ids)[:6]]
    for text in random_texts(500, seed=9, fragments=(*FRAGMENTS, *names, *names)):
        ids = tokenizer.encode_markup(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert fast.encode(text).ids == tokenizer.encode_prompt(text) == [tokenizer.bos_id, *ids]
        assert fast.decode(ids) == tokenizer.decode(ids)


def test_growing_prefixes_decode_alike(pair):
    """As streaming decodes: after each token, what is complete."""
    tokenizer, fast = pair
    text = plain(["  Hi  there, 漢字 é 👩\u200d👧!\n\n  code = 1 \u2581 x"], tokenizer)[0]
    ids = tokenizer.encode(text)
    for end in range(len(ids) + 1):
        ours, theirs = tokenizer.decode(ids[:end]), fast.decode(ids[:end])
        if ours.endswith("\ufffd"):  # within a character: to be waited for
            assert theirs.endswith("\ufffd")
        else:
            assert ours == theirs


def test_a_trained_model_of_ours_converts(tmp_path):
    texts = random_texts(300, seed=1)
    tokenizer = train_bpe(texts, tmp_path / "a.model", 500)
    fast = to_fast_tokenizer(tokenizer)
    assert fast.get_vocab_size() == 500
    checked = plain(random_texts(3_000, seed=2), tokenizer)
    assert [fast.encode(text, add_special_tokens=False).ids for text in checked] == [
        tokenizer.encode(text) for text in checked
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name, tmp_path):
    options, fragment = REFUSED[name]
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model", **options))
    with pytest.raises(UserError, match=fragment):
        to_fast_tokenizer(tokenizer)


def test_a_conversion_that_differs_is_refused(tmp_path, monkeypatch):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model"))
    merges = fast_tokenizer._merges
    monkeypatch.setattr(fast_tokenizer, "_merges", lambda pieces: merges(pieces)[::-1])
    with pytest.raises(UserError, match="they differ on 'Hello  world'"):
        to_fast_tokenizer(tokenizer)
