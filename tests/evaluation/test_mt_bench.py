"""MT-Bench from question files to scores, with a tiny model and a scripted judge."""

import collections
import json
import os
import re
import xml.etree.ElementTree as ElementTree

import pytest
from evaluation_models import write_model
from helpers import command
from scripted_judge import ScriptedJudge, completion, rate_limited
from test_command_line import assert_one_line

from danube_jax.errors import UserError
from danube_jax.evaluation.mt_bench import (
    Grade,
    Journal,
    Question,
    answer_questions,
    judge_messages,
    read_mt_bench,
    summarize,
)
from danube_jax.evaluation.radar import radar_svg
from danube_jax.inference.sampling import SamplingConfig

CATEGORIES = ("writing", "math", "coding")


def write_files(folder, *, categories=CATEGORIES, references=True):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"question_id": 81 + i, "category": name, "turns": [f"do {name}", f"again {{{name}}}"]}
        for i, name in enumerate(categories)
    ]
    _write(folder / "mt_bench_question.jsonl", rows)
    answers = [
        {"question_id": row["question_id"], "choices": [{"index": 0, "turns": ["ref 1", "ref 2"]}]}
        for row in rows
        if row["category"] != "writing" and references
    ]
    _write(folder / "mt_bench_reference.jsonl", answers or [rows[0] | {"choices": [{"turns": []}]}])
    single, multi = "{question}|{answer}", "{question_1}|{answer_1}|{question_2}|{answer_2}"
    templates = {
        "single-v1": single,
        "single-math-v1": f"{single}|{{ref_answer_1}}",
        "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": f"{multi}|{{ref_answer_1}}|{{ref_answer_2}}",
    }
    _write(
        folder / "judge_prompts.jsonl",
        [
            {"name": name, "system_prompt": f"be {name}", "prompt_template": text}
            for name, text in templates.items()
        ],
    )
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_the_judge_reads(tmp_path):
    bench = read_mt_bench(write_files(tmp_path))
    writing, math, _ = bench.questions
    assert writing.references == ()
    first, second = (judge_messages(bench, math, ["3 {x}", "4"], turn) for turn in (1, 2))
    assert first == [
        {"role": "system", "content": "be single-math-v1"},
        {"role": "user", "content": "do math|3 {x}|ref 1"},
    ]
    assert second[1]["content"] == "do math|3 {x}|again {math}|4|ref 1|ref 2"
    plain = judge_messages(bench, writing, ["a", "b"], 2)
    assert plain[0]["content"] == "be single-v1-multi-turn"
    assert plain[1]["content"] == "do writing|a|again {writing}|b"


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="lacks the questions of MT-Bench"):
        read_mt_bench(tmp_path)
    with pytest.raises(UserError, match=r"no reference answer to question 82 \(math\)"):
        read_mt_bench(write_files(tmp_path / "a", references=False))
    folder = write_files(tmp_path / "b")
    _write(folder / "judge_prompts.jsonl", [{"name": "single-v1", "system_prompt": ""}])
    with pytest.raises(UserError, match="line 1: expected name, system_prompt and prompt_template"):
        read_mt_bench(folder)
    folder = write_files(tmp_path / "d")
    lines = (folder / "judge_prompts.jsonl").read_text()
    (folder / "judge_prompts.jsonl").write_text(lines.replace("ref_answer_2", "ref_answer_3"))
    with pytest.raises(UserError, match=r"line 4: .*'single-math-v1-multi-turn' cannot be filled"):
        read_mt_bench(folder)
    folder = write_files(tmp_path / "c")
    _write(folder / "mt_bench_question.jsonl", [{"question_id": 1, "category": "x", "turns": []}])
    with pytest.raises(UserError, match="line 1: expected 2 turns"):
        read_mt_bench(folder)
    (folder / "mt_bench_question.jsonl").write_text('{"question_id":')
    with pytest.raises(UserError, match="cannot be read"):
        read_mt_bench(folder)


def test_real_files_have_eighty_questions():
    from helpers import ROOT

    data = ROOT.parent / "shared" / "data"
    if not (data / "mt_bench_question.jsonl.gz").is_file():
        pytest.skip("needs ../shared/data")
    bench = read_mt_bench(data)
    counts = collections.Counter(question.category for question in bench.questions)
    assert len(counts) == 8
    assert set(counts.values()) == {10}
    assert sum(bool(question.references) for question in bench.questions) == 30
    for question in bench.questions:
        for turn in (1, 2):
            text = judge_messages(bench, question, ["A1", "A2"], turn)[1]["content"]
            assert "A1" in text
            assert not re.search(r"\{(question|answer|ref_answer)\w*\}", text)


def test_means_leave_out_what_has_no_score():
    grades = [
        Grade(1, "writing", 1, 8.0, ""),
        Grade(1, "writing", 2, None, "broken"),
        Grade(2, "coding", 1, 2.0, ""),
        Grade(2, "coding", 2, 3.0, ""),
        Grade(3, "math", 1, 4.0, ""),
        Grade(3, "math", 2, 1.0, ""),
    ]
    summary = summarize(grades)
    assert summary["turn_1"] == pytest.approx(14 / 3)
    assert summary["turn_2"] == pytest.approx(2.0)
    assert summary["average"] == pytest.approx(18 / 5)
    assert summary["categories"]["writing"] == {"turn_1": 8.0, "turn_2": None, "average": 8.0}
    assert summary["average_without_coding"] == pytest.approx((8 + 2.5) / 2)
    assert summary["ungraded"] == [{"question_id": 1, "turn": 2, "reason": "broken"}]
    assert summary["graded"] == 5


def test_radar_is_a_picture_with_a_corner_a_score():
    scores = {"a & b": 10.0, "c": 5.0, "d": None, "e": 1.0}
    root = ElementTree.fromstring(radar_svg([("<mine>", scores)], list(scores), title="x"))
    space = "{http://www.w3.org/2000/svg}"
    outline = root.findall(f"{space}polygon")[-1].get("points").split()
    assert len(outline) == 3
    assert outline[0] == "320.0,100.0"  # the rim, straight up
    texts = {node.text for node in root.iter(f"{space}text")}
    assert {"a & b", "<mine>"} <= texts


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "model", "llama", chat=True)


def evaluate(*arguments, **options):
    return command(*arguments, module="danube_jax.evaluate", **options)


def test_from_the_command_line(chat_model, tmp_path):
    bench, output = write_files(tmp_path / "bench"), tmp_path / "out"
    base = (
        f"--model={chat_model}",
        "--tasks=mt_bench",
        f"--mt_bench={bench}",
        f"--output={output}",
        "--judge_model=judge",
        "--judge_attempts=3",
        "--judge_workers=2",
    )

    # A judge that talks but never grades: an error, no score, and the answers stay.
    with ScriptedJudge(lambda number, body: completion("hm")).running() as server:
        done = evaluate(*base, f"--judge_url={server.url}")
    assert_one_line(done, "no answer could be graded: the judge gave no score from 1 to 10")
    assert "tokens/s" in done.stderr
    assert not (output / "mt_bench.json").exists()
    answers = (output / "mt_bench_answers.jsonl").read_text()

    asked = set()

    def moody(number, body):
        text = body["messages"][-1]["content"]
        if text.startswith("do coding") and "again" not in text:
            return completion("no idea")  # never a score
        if text not in asked:  # by its number, one request might be refused every time
            asked.add(text)
            return rate_limited()
        return completion("[[6]]" if "again" in text else "[[8]]")

    with ScriptedJudge(moody).running() as server:
        done = evaluate(*base, f"--judge_url={server.url}")
    assert done.returncode == 0, done.stderr
    assert "question 83, turn 1 has no score: the judge gave no score" in done.stderr
    summary = json.loads((output / "mt_bench.json").read_text())
    assert summary["turn_1"] == 8.0
    assert summary["turn_2"] == 6.0
    assert summary["average"] == pytest.approx((8 + 8 + 6 + 6 + 6) / 5)
    assert [item["question_id"] for item in summary["ungraded"]] == [83]
    assert "Danube-Chat" in done.stdout
    assert (output / "mt_bench.svg").is_file()
    assert "1 could not be graded" in (output / "mt_bench.md").read_text()
    assert "6.23 / 5.34" in done.stdout  # Danube2-Chat's
    assert (output / "mt_bench_answers.jsonl").read_text() == answers

    # The same command again: nothing is answered anew, and only the missing score is asked for
    # (after the one request that asks whether the judge is there).
    with ScriptedJudge(lambda number, body: completion("[[2]]")).running() as server:
        again = evaluate(*base, f"--judge_url={server.url}")
    assert again.returncode == 0, again.stderr
    assert len(server.bodies) == 2
    assert (output / "mt_bench_answers.jsonl").read_text() == answers
    assert json.loads((output / "mt_bench.json").read_text())["ungraded"] == []


def test_journals_keep_what_belongs_to_other_models_and_judges(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    Journal(path, {"judge": "a"}).add({"question": 1})
    other = Journal(path, {"judge": "b"})
    assert other.rows == []
    other.add({"question": 2})
    with path.open("a") as file:
        file.write('{"key": "cut o')
    again = Journal(path, {"judge": "a"})
    assert [row["question"] for row in again.rows] == [1]
    assert [json.loads(line)["question"] for line in path.read_text().splitlines()] == [1, 2]


def test_no_damage_to_a_journal_makes_another_row_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a second instead of ten
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {})
    journal.add({"id": 1, "text": "\x1b é"})
    journal.add({"id": 2})
    whole = path.read_bytes()
    for at in range(whole.index(b"\n") + 1):  # the other row is of the same form
        for bit in (0, 2, 5, 7):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            rows = Journal(path, {}).rows
            assert all(row in journal.rows for row in rows)
            # What is left is all, where the damage made \\u001B of \\u001b.
            assert len(rows) < 2 or whole[at : at + 1].swapcase() == damaged[at : at + 1]
        path.write_bytes(whole[:at])
        assert Journal(path, {}).rows == journal.rows[: whole[: at + 1].count(b"\n")]


class Lengths:
    """A tokenizer whose messages are as many tokens as they have characters."""

    def encode_chat(self, messages):
        return [1] * sum(len(message["content"]) for message in messages)


@pytest.mark.parametrize("longest", [3, 700])
def test_answers_depend_neither_on_what_is_known_nor_on_a_long_neighbour(longest):
    questions = [
        Question(i, "writing" if i % 2 else "math", ("x" * (longest if i == 4 else i), "y"), ())
        for i in range(1, 12)
    ]

    def generate(prompts, sampling):
        """Answers that depend on everything that a real one does."""
        assert all(len(ids) + sampling.max_tokens <= 1_000 for ids in prompts)
        return [
            f"{sampling.seed} {sampling.temperature} {place} of {len(prompts)}, {len(ids)}"
            for place, ids in enumerate(prompts)
        ]

    def answered(known=(), asked=questions):
        found = {}
        answer_questions(
            asked,
            generate,
            Lengths(),
            context=1_000,
            sampling=SamplingConfig(seed=7),
            batch=3,
            on_answers=lambda question, turns: found.update({question.id: turns}),
            known=known,
        )
        return found

    everything = answered()
    assert everything.keys() == {question.id for question in questions}
    for known in ({1}, {2, 4, 6}, {3, 4, 5, 10}, everything.keys()):
        expected = {i: turns for i, turns in everything.items() if i not in known}
        assert answered(known) == expected


def test_a_long_question_leaves_the_others_their_room():
    rooms = {}

    def generate(prompts, sampling):
        rooms.update({len(ids): sampling.max_tokens for ids in prompts})
        return ["z" for _ in prompts]

    questions = [Question(i, "math", ("x" * n, "y"), ()) for i, n in ((1, 5), (2, 2_000), (3, 9))]
    answer_questions(
        questions,
        generate,
        Lengths(),
        context=2_100,
        sampling=SamplingConfig(),
        batch=3,
        on_answers=lambda *_: None,
    )
    assert (rooms[5], rooms[2_000], rooms[9]) == (1_024, 100, 1_024)


def test_refused_from_the_command_line(chat_model, tmp_path):
    bench = write_files(tmp_path / "bench")
    base = ("--tasks=mt_bench", f"--mt_bench={bench}", f"--output={tmp_path / 'out'}")
    there = (f"--model={chat_model}", "--judge_url=http://127.0.0.1:9/v1", "--judge_model=judge")
    assert_one_line(evaluate(*base, *there, "--judge_attempts=1"), "cannot be reached")
    assert not (tmp_path / "out").exists()
    with ScriptedJudge(lambda number, body: (200, b"<html>hello</html>")).running() as server:
        nonsense = evaluate(
            *base, there[0], f"--judge_url={server.url}", there[2], "--judge_attempts=1"
        )
    assert_one_line(nonsense, "answers what is no chat completion: '<html>hello</html>'")
    assert not (tmp_path / "out").exists()
    base_model = write_model(tmp_path / "base", "llama")
    assert_one_line(evaluate(*base, f"--model={base_model}", *there[1:]), "so it is a base model")
