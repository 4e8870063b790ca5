import ast
import inspect
import json
import sys

import numpy as np
import pytest
from tokenizer_models import byte_level_folder

from danube_jax import config
from danube_jax.data.corpus import builtin, pipeline, prepare
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
    """Every file's bytes, without those that hold times."""
    timed = ("statistics.json", "report.html", ".lock")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in timed)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def paragraphs(text):
    return [" ".join(p.split()).casefold() for p in text.split("\n\n")]


def test_language_reference_is_in_order():
    texts = list(builtin.documents("language_reference"))
    assert texts == list(builtin.documents("language_reference"))
    assert len({text.id for text in texts}) == len(texts) > 100
    assert sum(len(text.text) for text in texts) > 200_000
    assert all(len(text.text) >= builtin.MIN_CHARACTERS for text in texts)
    assert any('The "while" statement is used for repeated execution' in t.text for t in texts)


def test_parts_hold_every_docstring_once(monkeypatch, tmp_path):
    for i in range(11):
        (tmp_path / f"m{i}.py").write_text(f'"""{f"Words of module {i} stand here. " * 6}"""')
    monkeypatch.setattr(builtin, "DOCSTRING_PACKAGES", ())
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    parts = [list(builtin.documents("docstrings", i)) for i in range(builtin.PARTS["docstrings"])]
    together = sorted(document.id for part in parts for document in part)
    assert together == sorted(f"docstrings/python/m{i}.py:" for i in range(11))
    assert all(parts)


def test_only_paragraphs_of_sentences_stay():
    prose = "A paragraph that is made of words, and of nothing but words,\nover two lines here."
    text = f"A heading\n\n{prose}\n\n>>> f(1) is called with one and it returns two then\n\n"
    text += "x = a[0] + b[1] * c[2] - (d[3] / e[4]) % f[5] ** g[6] and so on and on"
    (found,) = builtin.prose([Document("a", text)])
    assert found == Document("a", " ".join(prose.split()))


def test_what_is_installed_is_told_by_versions(monkeypatch):
    before = builtin.installed("package_descriptions")
    assert before == builtin.installed("docstrings")
    assert before.startswith(builtin.installed("language_reference"))
    monkeypatch.setattr(builtin.importlib.metadata, "distributions", list)
    assert builtin.installed("package_descriptions") != before


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


def test_cut_keeps_every_paragraph_once():
    text = "\n\n".join(f"paragraph {i} " + "x" * (i * 7 % 400 + 80) for i in range(100))
    pieces = list(builtin.cut([Document("a", text), Document("b", "short " * 20)]))
    assert "\n\n".join(piece.text for piece in pieces[:-1]) == text
    assert pieces[-1] == Document("b/0", "short " * 20)
    assert max(len(piece.text) for piece in pieces) < builtin.PIECE_CHARACTERS + 500


@pytest.fixture(scope="module")
def prepared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


def test_prepared_stores_hold_the_documents(prepared_folder, make_run, monkeypatch):
    done = prepare.prepare_builtin(make_run(), prepared_folder)
    stores = prepared_folder / "stores"
    assert done.train == {"reference": str(stores / "reference/train")}
    assert done.heldout == {"reference": str(stores / "reference/heldout")}
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
    originals = {
        paragraph
        for text in builtin.documents("language_reference")
        for paragraph in paragraphs(text.text)
    }
    kept = [p for part in found.values() for text in part for p in paragraphs(text)]
    assert set(kept) <= originals
    assert len(kept) > 0.8 * len(originals)
    assert len(found["heldout"]) >= len(found["train"]) // 10
    page = (prepared_folder / "report.html").read_text()
    for step in ("Gopher quality", "exact duplicates", "near duplicates"):
        assert step in page
    apart = [set(p for t in found[k] for p in paragraphs(t) if len(p) > 80) for k in found]
    assert apart[0]
    assert apart[0].isdisjoint(apart[1])
    lines = []
    monkeypatch.setattr(pipeline, "info", lines.append)
    before = everything(prepared_folder)
    assert prepare.prepare_builtin(make_run(), prepared_folder) == done
    assert [line for line in lines if "already prepared" in line]
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
    originals = "\n".join(text.text for text in builtin.documents("language_reference"))
    assert all(paragraph in originals for paragraph in tokenizer.decode(ids).split("\n\n"))
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
        if len(calls) == 70:
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


def test_packages_that_changed_since_a_killed_preparation_began(
    tmp_path, prepared_folder, make_run, monkeypatch
):
    prepare.prepare_builtin(make_run(), prepared_folder)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_on_documents", die)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_builtin(make_run(), tmp_path)
    monkeypatch.setattr(builtin, "installed", lambda source: "Python 4")
    with pytest.raises(UserError, match=r"installed packages.*config\.data\.directory"):
        prepare.prepare_builtin(make_run(), tmp_path)
    # A finished one holds its text.
    assert prepare.prepare_builtin(make_run(), prepared_folder).train


def test_the_least_like_the_reference_go_into_stores_of_their_own(tmp_path, make_run):
    pytest.importorskip("lightgbm", reason="quality models need lightgbm")
    kinds = {"reference": "language_reference", "packages": "package_descriptions"}
    run = make_run(sources={name: {"builtin": kind} for name, kind in kinds.items()})
    done = prepare.prepare_builtin(run, tmp_path)
    assert list(done.train) == list(kinds)
    assert done.train["packages"] == str(tmp_path / "stores/packages_high/train")
    report = json.loads((tmp_path / "quality.json").read_text())["report"]
    assert report["roc_auc"] > 0.8
    values = json.loads((tmp_path / "statistics.json").read_text())
    stores = {
        name: sum(p["documents"] for p in row.values()) for name, row in values["stores"].items()
    }
    assert 0.05 < stores["packages_low"] / sum(stores.values()) < 0.15
    assert stores.get("reference_low", 0) < 0.1 * stores["reference_high"]
    assert set(values["tally"]["steps"]["packages"]) >= {
        *("gopher_quality", "fineweb", "exact", "minhash", "quality", "tokenise")
    }


def test_a_machine_without_lightgbm_goes_without_scores(tmp_path, make_run, monkeypatch):
    lines = []
    monkeypatch.setattr(prepare, "warn", lines.append)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    kinds = {"reference": "language_reference", "packages": "package_descriptions"}
    run = make_run(sources={name: {"builtin": kind} for name, kind in kinds.items()})
    done = prepare.prepare_builtin(run, tmp_path)
    assert done.train["packages"] == str(tmp_path / "stores/packages/train")
    assert len(lines) == 1
    assert "no quality scores" in lines[0]
    monkeypatch.undo()
    assert prepare.prepare_builtin(run, tmp_path) == done


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
