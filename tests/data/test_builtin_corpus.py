import ast
import inspect

import numpy as np
import pytest
from tokenizer_models import byte_level_folder

from danube_jax import config
from danube_jax.data.corpus import builtin, prepare
from danube_jax.data.corpus.builtin import Document
from danube_jax.data.token_store import TokenStore
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError


@pytest.fixture
def make_run():
    def build(**data):
        sources = {"reference": {"builtin": "language_reference"}}
        return config.parse_config(
            {
                "data": {"sources": sources, "tokenizer": {"train_vocab_size": 500}, **data},
                "phases": [
                    {
                        "name": "only",
                        "tokens": 1_179_648,
                        "context_length": 64,
                        "mixture": {"reference": 1.0},
                    }
                ],
            }
        )

    return build


def everything(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def paragraphs(text):
    return [" ".join(p.split()).casefold() for p in text.split("\n\n")]


def test_language_reference_is_in_order_and_without_repeats():
    texts = list(builtin.documents("language_reference"))
    assert texts == list(builtin.documents("language_reference"))
    assert len({text.id for text in texts}) == len(texts) > 100
    assert sum(len(text.text) for text in texts) > 200_000
    assert all(len(text.text) >= builtin.MIN_CHARACTERS for text in texts)
    long = [p for text in texts for p in paragraphs(text.text) if len(p) >= builtin.MIN_DUPLICATE]
    assert len(set(long)) == len(long)
    assert any('The "while" statement is used for repeated execution' in t.text for t in texts)


def test_package_descriptions_hold_text_and_no_badges():
    texts = list(builtin.documents("package_descriptions"))
    assert texts == list(builtin.documents("package_descriptions"))
    together = "\n".join(text.text for text in texts)
    assert "shields.io/badge" not in together
    assert any(text.id.startswith("package_descriptions/numpy/") for text in texts)
    assert not any("danube-jax" in text.id for text in texts)


def test_descriptions_lose_badges_html_and_link_targets():
    text = """<p align="center">
<img src="logo.png">
</p>
[![CI](https://ci.org/badge.svg)](https://ci.org) [![Docs][docs-badge]][docs]
[![split](
https://ci.org/badge.svg)](
https://ci.org)
.. image:: https://example.org/x.png
   :target: https://example.org

# A title

See the [manual (new)](https://example.org/a_(b)) and `the site <https://example.org>`_.
<!-- a comment
over lines -->
Use `a < b` and `x[0](y)`.

[docs]: https://example.org
"""
    expected = "# A title\n\nSee the manual (new) and the site.\n\nUse `a < b` and `x[0](y)`."
    assert builtin.clean_description(text) == expected


def test_docstrings_equal_those_of_the_imported_module():
    found = dict(builtin.file_docstrings(builtin.Path(ast.__file__)))
    assert found["literal_eval"] == inspect.getdoc(ast.literal_eval)
    assert found["NodeVisitor"] == inspect.getdoc(ast.NodeVisitor)
    assert found[""] == inspect.getdoc(ast)
    assert found["NodeTransformer"] == inspect.getdoc(ast.NodeTransformer)


def test_docstrings_of_odd_files(tmp_path):
    path = tmp_path / "a.py"
    long = "words " * 20
    path.write_text(
        f'if True:\n  class A:\n    """{long}"""\n    def f(self):\n      """{long}b"""\n'
        '  def g():\n    """short"""\n'
    )
    assert [name for name, _ in builtin.file_docstrings(path)] == ["A", "A.f"]
    path.write_text('"""unfinished')
    assert builtin.file_docstrings(path) == []


def test_seen_paragraphs_are_dropped_across_sources():
    shared, own = "this paragraph stands in both of the texts " * 2, "this stands in one only " * 6
    seen = set()
    first = list(builtin.remove_repeated_paragraphs([Document("a", shared)], seen))
    second = builtin.remove_repeated_paragraphs(
        [Document("b", f"{own}\n\n  {shared.title()}"), Document("c", shared)], seen
    )
    assert first == [Document("a", shared)]
    assert list(second) == [Document("b", own)]


def test_cut_keeps_every_paragraph_once():
    text = "\n\n".join(f"paragraph {i} " + "x" * (i * 7 % 400 + 80) for i in range(100))
    pieces = list(builtin.cut([Document("a", text), Document("b", "short " * 20)]))
    assert "\n\n".join(piece.text for piece in pieces[:-1]) == text
    assert pieces[-1] == Document("b/0", "short " * 20)
    assert max(len(piece.text) for piece in pieces) < builtin.PIECE_CHARACTERS + 500


def test_split_by_hash_is_stable():
    texts = [Document(f"id{i}", f"text {i}") for i in range(5_000)]
    train, heldout = prepare.split_heldout(texts, 0.1)
    assert sorted(train + heldout) == sorted(texts)
    assert 420 < len(heldout) < 580
    assert prepare.split_heldout(reversed(texts), 0.1) == (train, heldout)
    fewer_train, fewer_heldout = prepare.split_heldout(texts[:-7], 0.1)
    gone = set(texts[-7:])
    assert fewer_train == [text for text in train if text not in gone]
    assert fewer_heldout == [text for text in heldout if text not in gone]
    assert train != sorted(train)
    for count, least in ((2, 1), (50, 5), (400, 16)):
        assert len(prepare.split_heldout(texts[:count], 1e-9)[1]) == least
    with pytest.raises(UserError, match="two at least"):
        prepare.split_heldout(texts[:1], 0.1)


def test_near_copies_leave_the_heldout_part():
    words = [f"word{i}" for i in range(200)]
    train = [Document("t", " ".join(words[:100]))]
    copy = Document("copy", " ".join([*words[20:90], "changed", "end"]))
    fresh = Document("fresh", " ".join(words[95:]))
    assert prepare.drop_near_copies([copy, fresh], train) == [fresh]
    assert prepare.drop_near_copies([copy], train) == [copy]


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


def test_prepared_stores_hold_the_documents(prepared_folder, make_run, capsys):
    done = prepare.prepare_builtin(make_run(), prepared_folder)
    assert done.train == {"reference": str(prepared_folder / "reference/train")}
    assert done.heldout == {"reference": str(prepared_folder / "reference/heldout")}
    tokenizer = open_tokenizer(done.tokenizer)
    assert tokenizer.vocab_size == 500
    found = {}
    for part, path in (("train", done.train), ("heldout", done.heldout)):
        store = TokenStore.open(path["reference"])
        store.verify()
        assert store.tokenizer == tokenizer.fingerprint
        starts = store.document_starts()
        texts = []
        for start, end in zip(starts, [*starts[1:], store.tokens], strict=True):
            (ids,) = store.read(np.array([start]), end - start)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids))
        assert store.bytes == sum(len(text.encode()) for text in texts)
        found[part] = texts
    originals = {text.text for text in builtin.documents("language_reference")}
    assert set(found["train"]) | set(found["heldout"]) <= originals
    assert len(originals) - len(found["train"] + found["heldout"]) < 10
    apart = [set(p for t in found[k] for p in paragraphs(t) if len(p) > 80) for k in found]
    assert apart[0]
    assert apart[0].isdisjoint(apart[1])
    capsys.readouterr()
    before = everything(prepared_folder)
    assert prepare.prepare_builtin(make_run(), prepared_folder) == done
    assert "already prepared" in capsys.readouterr().err
    assert everything(prepared_folder) == before


def test_hugging_face_tokenizers_prepare_too(tmp_path, make_run):
    folder = byte_level_folder(tmp_path / "tokenizer", {"eos_token": "<|endoftext|>"})
    run = make_run(tokenizer={"path": str(folder)})
    done = prepare.prepare_builtin(run, tmp_path / "data")
    assert done.tokenizer == str(folder)
    tokenizer = open_tokenizer(folder)
    store = TokenStore.open(done.train["reference"])
    assert store.tokenizer == tokenizer.fingerprint
    starts = store.document_starts()
    ((*ids, last),) = store.read(np.array([0]), starts[1])
    assert last == tokenizer.eos_id
    assert tokenizer.eos_id not in ids
    texts = [text.text for text in builtin.documents("language_reference")]
    assert tokenizer.decode(ids) in texts
    (all_ids,) = store.read(np.array([0]), store.tokens)
    assert tokenizer.token_byte_lengths()[all_ids].sum() == store.bytes


def test_a_tokenizer_that_cannot_tell_documents_apart_is_refused(tmp_path, make_run):
    path = byte_level_folder(tmp_path / "tokenizer") / "tokenizer.json"
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        prepare.prepare_builtin(make_run(tokenizer={"path": str(path)}), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_killed_preparation_continues_to_the_same_bytes(
    tmp_path, prepared_folder, make_run, monkeypatch
):
    prepare.prepare_builtin(make_run(), prepared_folder)
    add, calls = TokenStoreWriter.add, []

    def dies(self, tokens, size):
        calls.append(size)
        if len(calls) == 100:
            raise KeyboardInterrupt
        add(self, tokens, size)

    monkeypatch.setattr(TokenStoreWriter, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_builtin(make_run(), tmp_path)
    monkeypatch.setattr(TokenStoreWriter, "add", add)
    prepare.prepare_builtin(make_run(), tmp_path)
    assert everything(tmp_path) == everything(prepared_folder)


def test_other_settings_in_the_same_folder_are_refused(prepared_folder, make_run):
    prepare.prepare_builtin(make_run(), prepared_folder)
    for change in (
        {"heldout_fraction": 0.1},
        {"tokenizer": {"train_vocab_size": 600}},
        {"sources": {"reference": {"builtin": "package_descriptions"}}},
    ):
        with pytest.raises(UserError, match="was prepared with"):
            prepare.prepare_builtin(make_run(**change), prepared_folder)


def test_other_text_than_a_killed_preparation_began_with(tmp_path, make_run, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "train_bpe", die)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_builtin(make_run(), tmp_path)
    texts = [Document(f"{i}", f"a text of its own {i}") for i in range(40)]
    monkeypatch.setattr(builtin, "documents", lambda *_: texts)
    with pytest.raises(UserError, match="installed packages changed"):
        prepare.prepare_builtin(make_run(), tmp_path)


def test_paths_are_passed_through_and_impossible_sources_refused(tmp_path, make_run):
    sources = {"reference": {"path": "/a", "heldout_path": "/b"}}
    model = {"builtin": "mistral"}
    pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    done = prepare.prepare_builtin(make_run(sources=sources, tokenizer=model), tmp_path / "no")
    assert (done.train, done.heldout) == ({"reference": "/a"}, {"reference": "/b"})
    assert done.tokenizer.endswith("tokenizer.model.v1")
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="no built-in source to train on"):
        prepare.prepare_builtin(make_run(sources=sources), tmp_path)
    twice = {name: {"builtin": "docstrings"} for name in ("reference", "again")}
    with pytest.raises(UserError, match="more than one source"):
        prepare.prepare_builtin(make_run(sources=twice), tmp_path)
