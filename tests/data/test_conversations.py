"""Formats of instruction and preference data: detection, conversion, and what is refused where."""

import gzip
import json
import math

import pytest

from danube_jax.data.conversations import place_system_text, read_conversations
from danube_jax.data.preferences import read_preferences
from danube_jax.errors import UserError

QA = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})


def write(path, rows):
    """Rows as JSONL; bytes and strings are lines as they stand."""
    lines = []
    for row in rows:
        row = row if isinstance(row, bytes | str) else json.dumps(row)
        lines.append(row if isinstance(row, bytes) else row.encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


FORMS = {
    "messages": {"messages": list(QA)},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt and response": {"prompt": "Q", "response": "A"},
    "orca": {"id": "1", "system_prompt": "", "question": "Q", "response": "A"},
    "metamath": {"query": "Q", "response": "A", "type": "x"},
    "unanswered": {"messages": [*QA, {"role": "user", "content": "more?"}]},
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_the_same_conversation(name, tmp_path):
    found, skipped = read_conversations(write(tmp_path / "a.jsonl", [FORMS[name]] * 2))
    assert (found, skipped) == ([QA, QA], 0)


def test_inputs_systems_named_columns_and_multiple_turns(tmp_path):
    alpaca = write(tmp_path / "a.jsonl", [{"instruction": "Add", "input": "1 2", "output": "3"}])
    assert read_conversations(alpaca)[0][0][0]["content"] == "Add\n\n1 2"
    row = {"frage": "Q", "antwort": "A", "ton": "kurz"}
    columns = {"prompt": "frage", "response": "antwort", "system": "ton"}
    found, _ = read_conversations(write(tmp_path / "b.jsonl", [row]), columns=columns)
    assert found == [({"role": "system", "content": "kurz"}, *QA)]
    found, _ = read_conversations(write(tmp_path / "c.jsonl", [{"messages": [*QA, *QA]}]))
    assert found == [QA + QA]
    rows = [{"dialog": FORMS["sharegpt"]["conversations"]}]
    for form in ("auto", "sharegpt", "messages"):
        path = write(tmp_path / "d.jsonl", rows)
        assert read_conversations(path, format=form, columns={"messages": "dialog"})[0] == [QA]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_data(name, tmp_path):
    row = FORMS["alpaca"]
    text = json.dumps([row]) if name.endswith(".json") else json.dumps(row)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_conversations(tmp_path / name)[0] == [QA]


def test_system_texts_can_be_left_out_or_merged_into_the_question():
    whole = ({"role": "system", "content": "S"}, *QA)
    assert place_system_text(whole, "keep") == whole
    assert place_system_text(whole, "drop") == QA
    merged = place_system_text(whole, "merge")
    assert merged == ({"role": "user", "content": "S\n\nQ"}, QA[1])
    assert place_system_text(QA, "merge") == QA


def test_parquet_gzip_json_and_folders(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    table = pyarrow.Table.from_pylist([{"messages": list(QA)}] * 3)
    parquet.write_table(table, folder / "a.parquet")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"messages": list(QA)}) + "\n\n")
    (folder / "c.json").write_text(json.dumps([{"messages": list(QA)}]))
    assert read_conversations(folder)[0] == [QA] * 5
    (folder / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        read_conversations(folder)


BAD = {
    "unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "unknown|'bot'; expected one",
    ),
    "unknown speaker": ({"conversations": [{"from": "alien", "value": "x"}]}, "role 'alien'"),
    "answer first": ({"messages": [QA[1], QA[0]]}, "an answer before its question"),
    "two questions": ({"messages": [QA[0], QA[0], QA[1]]}, "two questions in a row"),
    "no answer": ({"messages": [QA[0]]}, "no answer in it"),
    "empty": ({"messages": []}, "no answer in it"),
    "empty answer": ({"messages": [QA[0], {"role": "assistant", "content": " "}]}, "is empty"),
    "no text": ({"messages": [{"role": "user", "content": None}, QA[1]]}, "expected a text"),
    "wrong columns": ({"foo": 1, "bar": 2}, "columns foo, bar are of no known format"),
    "missing column": ({"prompt": "Q", "answr": "A"}, "no known format"),
    "no object": ([1, 2], "expected a JSON object"),
    "no JSON": ("{oops", "no JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "response": "x"}', "not UTF-8 .byte 0xff"),
    "half a character": (rb'{"prompt": "\ud83d", "response": "x"}', "half of a surrogate pair"),
    "nested without end": (b"[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_name_file_and_line(name, tmp_path):
    row, message = BAD[name]
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match=rf"bad\.jsonl, line 1: .*({message})"):
        read_conversations(path)


def test_bad_rows_can_be_skipped_and_counted(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("danube_jax.data.row_files.warn", warnings.append)
    good = {"messages": list(QA)}
    path = write(tmp_path / "some.jsonl", [good, {"messages": [QA[1]]}, b"\xff", good])
    with pytest.raises(UserError, match=r"line 2: .*on_bad_row=skip"):
        read_conversations(path)
    assert read_conversations(path, on_bad_row="skip") == ([QA, QA], 2)
    assert len(warnings) == 1
    assert "2 of 4 rows skipped; the first: " in warnings[0]
    with pytest.raises(UserError, match="none of the 2 rows can be used"):
        read_conversations(write(tmp_path / "none.jsonl", [b"\xff", "[]"]), on_bad_row="skip")
    with pytest.raises(UserError, match="there are no rows"):
        read_conversations(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="no such file"):
        read_conversations(tmp_path / "gone.jsonl")
    # Beyond a limit nothing is read.
    assert read_conversations(path, limit=1) == ([QA], 0)
    with pytest.raises(UserError, match="line 2"):
        read_conversations(path, limit=2)
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="unknown kind of file"):
        read_conversations(tmp_path / "x.csv")


PAIRS = {
    "text": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "orca": {"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
    "math": {"instruction": "Q", "chosen_response": "good", "rejected_response": "bad"},
    "messages": {"messages": [QA[0]], "chosen": "good", "rejected": "bad"},
    "answers as messages": {
        "prompt": [QA[0]],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "whole conversations": {
        "prompt": "Q",
        "chosen": [QA[0], {"role": "assistant", "content": "good"}],
        "rejected": [QA[0], {"role": "assistant", "content": "bad"}],
        "messages": [QA[0], {"role": "assistant", "content": "good"}],
    },
    "ranks": {
        "prompt": "Q",
        "replies": [
            {"text": "so-so", "rank": 1},
            {"text": "bad", "rank": 2},
            {"text": "good", "rank": 0},
        ],
    },
    "scores": {
        "messages": [QA[0]],
        "responses": [{"content": "bad", "score": 1.5}, {"content": "good", "score": 9}],
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_preference_format_gives_the_same_pair(name, tmp_path):
    (pair,), _ = read_preferences(write(tmp_path / "p.jsonl", [PAIRS[name]]))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((QA[0],), "good", "bad")


def test_what_a_question_is_about_belongs_to_it(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4"}
    ((pair,), _) = read_preferences(write(tmp_path / "p.jsonl", [row]))
    assert pair.prompt == ({"role": "user", "content": "Add\n\n1 2"},)


BAD_PAIRS = {
    "missing": ({"prompt": "Q", "chosen": "good"}, "there is no rejected answer"),
    "empty": ({"prompt": "Q", "chosen": "good", "rejected": " "}, "rejected answer is empty"),
    "equal": ({"prompt": "Q", "chosen": "x", "rejected": "x"}, "the same text"),
    "one reply": ({"prompt": "Q", "replies": [{"text": "x", "rank": 0}]}, "expected at least two"),
    "no rank": ({"prompt": "Q", "replies": [{"text": "x"}] * 2}, "no rank or score"),
    "rank and score": (
        {"prompt": "Q", "replies": [{"text": "x", "rank": 0}, {"text": "y", "score": 1}]},
        r"replies\[1\]: no rank",
    ),
    "no number": (
        {"prompt": "Q", "replies": [{"text": "x", "score": math.nan}, {"text": "y", "score": 1}]},
        r"replies\[0\]: no score",
    ),
    "neither text nor messages": (
        {"prompt": "Q", "chosen": "x", "rejected": 3},
        "rejected: expected a text or messages, got 3",
    ),
    "open": (
        {"messages": list(QA), "chosen": "x", "rejected": "y"},
        "does not end with a question",
    ),
    "different prompts": (
        {"chosen": [QA[0], QA[1]], "rejected": [{"role": "user", "content": "R"}, QA[1]]},
        "different conversations",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_preferences(name, tmp_path):
    row, message = BAD_PAIRS[name]
    with pytest.raises(UserError, match=rf"p\.jsonl, line 1: .*{message}"):
        read_preferences(write(tmp_path / "p.jsonl", [row]))


def tree(id, parent, role, text, rank=None, lang="en"):
    """A message of a tree."""
    return {
        "message_id": id,
        "parent_id": parent,
        "role": role,
        "text": text,
        "rank": rank,
        "lang": lang,
    }


TREE = [
    tree("q", None, "prompter", "Q"),
    tree("b", "q", "assistant", "worst", 2),
    tree("a", "q", "assistant", "best", 0),
    tree("c", "q", "assistant", "middle", 1),
    tree("q2", "a", "prompter", "Q2"),
    tree("d", "q2", "assistant", "second", 1),
    tree("e", "q2", "assistant", "first", 0),
    tree("f", "q2", "assistant", "unranked"),
    tree("g", None, "prompter", "Frage", lang="de"),
    tree("h", "g", "assistant", "Antwort", lang="de"),
]


def test_trees_give_best_conversations_and_pairs_of_best_and_worst(tmp_path):
    path = write(tmp_path / "tree.jsonl", TREE)
    found, _ = read_conversations(path, language="en")
    texts = [[m["content"] for m in conversation] for conversation in found]
    assert texts == [["Q", "best", "Q2", "first"]]
    assert len(read_conversations(path)[0]) == 2
    pairs, _ = read_preferences(path, language="en")
    assert [(p.chosen, p.rejected) for p in pairs] == [("best", "worst"), ("first", "second")]
    assert [m["content"] for m in pairs[1].prompt] == ["Q", "best", "Q2"]


def test_trees_without_a_root_give_nothing(tmp_path):
    circle = [tree("x", "y", "prompter", "X"), tree("y", "x", "assistant", "Y", 0)]
    gap = [tree("z", "gone", "prompter", "Z"), tree("w", "z", "assistant", "W", 0)]
    path = write(tmp_path / "tree.jsonl", [*circle, *TREE, *gap])
    found, _ = read_conversations(path, language="en")
    assert [conversation[0]["content"] for conversation in found] == ["Q"]
    assert read_conversations(path, language="en", limit=1)[0] == found
    assert len(read_preferences(path, language="en")[0]) == 2
