"""Task definitions over local files: lm-eval's own tasks on the user's rows."""

import gzip
import json

import pytest
from helpers import ROOT

lm_eval = pytest.importorskip("lm_eval")

from danube_jax.errors import UserError  # noqa: E402
from danube_jax.evaluation.local_data import HELD_OUT_ROWS, write_local_tasks  # noqa: E402
from danube_jax.evaluation.presets import PRESETS  # noqa: E402
from danube_jax.evaluation.tasks import load_tasks, select  # noqa: E402

DATA = ROOT.parent / "shared" / "data"


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def piqa(count):
    return [{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(count)]


def requests(task, limit=3):
    task.build_all_requests(limit=limit)
    return [instance.args for instance in task.instances]


def test_prompts_are_the_official_ones(tmp_path):
    write(tmp_path / "piqa_valid.jsonl.gz", piqa(5))
    with load_tasks(select(["piqa"]), data=str(tmp_path)) as (tasks, notes):
        (task,) = tasks
        assert notes == []
        assert len(task.eval_docs) == 5
        question = "Question: g0\nAnswer:"
        assert requests(task, 1) == [(question, " a"), (question, " b")]


def test_examples_come_from_rows_that_are_not_scored(tmp_path):
    write(tmp_path / "piqa_valid.jsonl", piqa(HELD_OUT_ROWS + 3))
    with load_tasks(select(["piqa"], 2), data=str(tmp_path)) as (tasks, notes):
        (task,) = tasks
        assert "the other 3 are scored" in notes[0]
        assert [doc["goal"] for doc in task.eval_docs] == ["g40", "g41", "g42"]
        prompt = requests(task)[0][0]
    shown = {f"g{i}" for i in range(HELD_OUT_ROWS)}
    goals = [line.removeprefix("Question: ") for line in prompt.split("\n") if "Question" in line]
    assert len(goals) == 3
    assert set(goals[:2]) <= shown
    assert goals[2] == "g40"


def test_a_training_file_gives_the_examples(tmp_path):
    write(tmp_path / "piqa_valid.jsonl", piqa(4))
    write(tmp_path / "piqa_train.jsonl", [row | {"goal": "train"} for row in piqa(3)])
    with load_tasks(select(["piqa"], 1), data=str(tmp_path)) as (tasks, notes):
        assert notes == []
        assert len(tasks[0].eval_docs) == 4
        assert requests(tasks[0])[0][0].startswith("Question: train\n")


BAD = {
    "no such folder": (lambda folder: folder.rmdir(), "is no folder"),
    "no file": (lambda folder: None, r"no data for the task piqa; expected a file piqa_val\*"),
    "empty": (lambda folder: write(folder / "piqa_val.jsonl", []), "holds no rows"),
    "no JSON": (
        lambda folder: (folder / "piqa_val.jsonl").write_text('{"goal": '),
        r"piqa_val.jsonl, line 1: .* expected a JSON object",
    ),
    "missing column": (
        lambda folder: write(folder / "piqa_val.jsonl", [{"goal": "x"}]),
        "line 1: expected a JSON object with goal, sol1, sol2, label",
    ),
    "not gzip": (
        lambda folder: (folder / "piqa_val.jsonl.gz").write_text("x"),
        "piqa_val.jsonl.gz: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_cannot_be_used(name, tmp_path):
    spoil, message = BAD[name]
    folder = tmp_path / "data"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(UserError, match=message):
        write_local_tasks(folder, tmp_path / "out", {"piqa": None})
    assert not (tmp_path / "out").exists()


def test_few_rows_are_not_enough_for_examples(tmp_path):
    write(tmp_path / "piqa_val.jsonl", piqa(3))
    with pytest.raises(UserError, match="too few rows for 2 few-shot examples of piqa"):
        write_local_tasks(tmp_path, tmp_path / "out", {"piqa": 2})


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_real_files(preset):
    """Every task of a preset builds its prompts, with as many examples as it should have."""
    with load_tasks(select([preset]), data=str(DATA)) as (tasks, _):
        leaves = [
            leaf
            for task in tasks
            for leaf in (task.get_all_tasks()[:2] if hasattr(task, "get_all_tasks") else [task])
        ]
        shots = {leaf.task_name: leaf.config.num_fewshot for leaf in leaves}
        prompts = {leaf.task_name: requests(leaf, 1)[0][0] for leaf in leaves}
    for column in PRESETS[preset].columns:
        names = [name for name in shots if name == column.task or name.startswith("mmlu_")]
        assert names
    assert shots["arc_challenge"] == (25 if preset == "leaderboard" else 0)
    if preset == "leaderboard":
        assert prompts["arc_challenge"].count("Question:") == 26
        assert prompts["gsm8k"].count("Question:") == 6
        assert prompts["mmlu_abstract_algebra"].count("Answer:") == 6
    else:
        assert prompts["triviaqa"].count("Question:") == 6
        assert prompts["piqa"].count("Question:") == 1
