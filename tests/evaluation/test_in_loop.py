"""Benchmarks while training: scores as of the checkpoint, curves, and what a stop leaves undone."""

import dataclasses
import importlib.util
import json

import pytest
from evaluation_models import write_tasks
from helpers import read_rows

pytest.importorskip("lm_eval")

from danube_jax.config import parse_config
from danube_jax.errors import EXIT_INTERRUPTED, UserError
from danube_jax.evaluation.harness import DanubeLM
from danube_jax.evaluation.in_loop import Benchmarks
from danube_jax.evaluation.run import run_tasks
from danube_jax.evaluation.tasks import load_tasks, select
from danube_jax.training.run import train
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


@pytest.fixture(scope="module")
def whole(corpus, tasks, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with StopRequest() as stop:
        assert train(tiny_config(corpus, tasks), workdir, stop) == 0
    return workdir


def test_scores_are_those_of_the_checkpoint(whole, tasks):
    workdir = whole
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


def test_what_a_stop_leaves_undone_runs_after_resume(corpus, tasks, whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    run = tiny_config(corpus, tasks)
    run = dataclasses.replace(
        run, checkpoint=dataclasses.replace(run.checkpoint, every_steps=1_000)
    )

    def session(stops_within=lambda rows: False):
        """Trains; a signal arrives within benchmarks where `stops_within(their rows)` says so."""
        with StopRequest() as stop, monkeypatch.context() as patch:
            evaluate = Benchmarks._evaluate

            def signal_then_evaluate(benchmarks, params, stopped):
                stop.requested = stops_within(read_rows(workdir, "benchmark"))
                return evaluate(benchmarks, params, stopped)

            patch.setattr(Benchmarks, "_evaluate", signal_then_evaluate)
            return train(run, workdir, stop)

    def events():
        return [row["event"] for row in read_rows(workdir, "event")]

    expected = read_rows(whole, "benchmark")
    assert session(stops_within=lambda rows: not rows) == EXIT_INTERRUPTED
    assert read_rows(workdir, "benchmark") == []
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]  # saved for that
    # Step 1 is made up for; the evaluation of the last step is stopped, too.
    assert session(stops_within=bool) == EXIT_INTERRUPTED
    assert read_rows(workdir, "benchmark") == expected[:1]
    assert "finished" not in events()
    # The run is complete but for that.
    assert session() == 0
    assert read_rows(workdir, "benchmark") == expected
    assert events().count("finished") == 1


def test_tasks_that_cannot_run_stop_before_training(corpus, tasks, tmp_path):
    run = tiny_config(corpus, tasks, tasks="danube,piqa")
    with StopRequest() as stop, pytest.raises(UserError, match="'danube' stands alone"):
        train(run, tmp_path / "run", stop)
    run = tiny_config(corpus, tasks, chat=True)
    with StopRequest() as stop, pytest.raises(UserError, match="has no chat template"):
        train(run, tmp_path / "run", stop)
    assert not (tmp_path / "run").exists()
