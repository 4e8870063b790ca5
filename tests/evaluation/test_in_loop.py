"""Benchmarks while training: scores as of the checkpoint, curves, and what a stop leaves undone."""

import importlib.util
import json

import pytest
from evaluation_models import write_tasks
from helpers import read_rows

pytest.importorskip("lm_eval")

from danube_jax.config import parse_config
from danube_jax.errors import UserError
from danube_jax.evaluation.harness import DanubeLM
from danube_jax.evaluation.run import run_tasks
from danube_jax.evaluation.tasks import load_tasks, select
from danube_jax.training.loop import train
from danube_jax.training.signals import StopRequest

TASKS = "tiny_choice,tiny_generation"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "yaml")


def tiny_config(corpus, folder, **evals):
    spec = importlib.util.spec_from_file_location("tiny_config", corpus.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.training.max_steps = 2
    config.checkpoint.every_steps = 1
    config.evals.tasks = TASKS
    config.evals.include_path = str(folder)
    config.evals.every_steps = 1
    config.evals.limit = 4
    for key, value in evals.items():
        config.evals[key] = value
    return parse_config(config)


def test_scores_are_those_of_the_checkpoint(corpus, tasks, tmp_path):
    workdir = tmp_path / "run"
    with StopRequest() as stop:
        assert train(tiny_config(corpus, tasks), workdir, stop) == 0
    rows = read_rows(workdir, "benchmark")
    assert [row["step"] for row in rows] == [1, 2]
    row = rows[-1]
    assert row["tokens"] == 2 * 512
    folder = workdir / "evaluation"
    saved = json.loads((folder / "results_2_tiny_choice_tiny_generation.json").read_text())
    assert saved["results"]["tiny_choice"]["acc,none"] == row["tiny_choice/acc"]
    assert "tiny_generation/exact_match" in row
    assert (folder / "results_1_tiny_choice_tiny_generation.md").is_file()

    # The same tasks on the checkpoint, from its folder.
    lm = DanubeLM(pretrained=str(workdir), dtype="float32")
    with load_tasks(select(TASKS.split(",")), include_path=str(tasks)) as (loaded, _):
        results = run_tasks(lm, loaded, limit=4)
    for name, key in (("tiny_choice", "acc"), ("tiny_choice", "acc_norm")):
        assert results["results"][name][f"{key},none"] == row[f"{name}/{key}"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    curve = board.Scalars("benchmark/tiny_choice/acc")
    assert [point.step for point in curve] == [1, 2]

    # A stop before the last evaluation: a row is missing, and made up for.
    before = (workdir / "metrics.jsonl").read_text()
    kept = [
        line for line in before.splitlines() if '"benchmark"' not in line or '"step": 1,' in line
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    with StopRequest() as stop:
        assert train(tiny_config(corpus, tasks), workdir, stop) == 0
    again = read_rows(workdir, "benchmark")
    assert [row["step"] for row in again] == [1, 2]
    assert again[-1] == row


def test_tasks_that_cannot_run_stop_before_training(corpus, tasks, tmp_path):
    run = tiny_config(corpus, tasks, tasks="danube,piqa")
    with StopRequest() as stop, pytest.raises(UserError, match="'danube' stands alone"):
        train(run, tmp_path / "run", stop)
    run = tiny_config(corpus, tasks, chat=True)
    with StopRequest() as stop, pytest.raises(UserError, match="has no chat template"):
        train(run, tmp_path / "run", stop)
    assert not (tmp_path / "run").exists()
