"""Bad numbers and dead workers: skipped and counted, or a stop that says why."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import HANG_SECONDS
from helpers import read_rows
from small_runs import STEPS, Outcome, arguments, rows
from test_signals import go, start, steps_of

from danube_jax.data import loader

PLANTED = str(Path(__file__).parent / "planted.py")
GUARD = ("--config.training.spike_guard=6.0", "--config.training.spike_guard_window=20")


def run(server, corpus, workdir, planted, *more):
    """Trains with planted faults."""
    return server.run((PLANTED, json.dumps(planted)), *arguments(corpus.config, workdir, *more))


def skips(workdir):
    """(step, whether the guard did it) of every skipped update."""
    events = [row for row in read_rows(workdir, "event") if row["event"] == "skipped"]
    return [(row["step"], "loss_bound" in row or "grad_norm_bound" in row) for row in events]


def test_bad_batches_are_skipped_and_a_stop_changes_no_bit(corpus, server, full, tmp_path):
    """Two that are not finite and, with the guard, one whose loss is a spike."""
    planted = {"nan": [5, 6], "spike": [15]}
    ended = run(server, corpus, tmp_path / "whole", planted, *GUARD)
    assert ended.status == 0, ended.err
    assert skips(tmp_path / "whole") == [(5, False), (6, False), (15, True)]
    assert "step 5: loss nan" in ended.err
    assert "the loss is not finite: update skipped (1 in a row, 1 in all)" in ended.err
    assert "the loss is a spike (the spike guard's bound is" in ended.err
    bad = [row["step"] for row in rows(tmp_path / "whole", "train") if row["skipped_in_a_row"]]
    assert bad == [5, 6, 15]
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "whole", "train")}
    assert losses[15] > 1e4
    assert losses[16] < losses[14] + 0.5

    # The checkpoint of step 12 lies within the guard's window, that of 15 after the spike.
    for last in (12, 16, STEPS) if full else (16, STEPS):
        more = (*GUARD, f"--config.training.max_steps={last}")
        ended = run(server, corpus, tmp_path / "parts", planted, *more)
        assert ended.status == 0, ended.err
    Outcome.read(tmp_path / "parts").assert_same(Outcome.read(tmp_path / "whole"))


@pytest.mark.faults
def test_without_the_guard_a_spike_does_harm(corpus, server, undisturbed, tmp_path):
    """The planted batch is one that the option is for: Adam's second moments stay too large."""
    ended = run(
        server, corpus, tmp_path / "run", {"spike": [15]}, "--config.optimizer.clip_norm=0.0"
    )
    assert ended.status == 0, ended.err
    assert skips(tmp_path / "run") == []
    loss, expected = (
        out[-1]["loss"] for out in (rows(tmp_path / "run", "train"), undisturbed[0].train)
    )
    assert loss > expected + 0.03


def test_too_many_in_a_row_stop_with_the_reason(corpus, server, tmp_path):
    planted = {"nan": list(range(8, 25))}
    ended = run(server, corpus, tmp_path, planted, "--config.training.max_skipped_steps=3")
    ended.assert_clear()
    assert ended.status == 1
    assert "3 updates in a row were skipped, at step 10" in ended.errors[0]
    assert "since the loss is not finite" in ended.errors[0]
    assert f"the last checkpoint is step {steps_of(tmp_path)[-1]}" in ended.errors[0]
    assert read_rows(tmp_path, "event")[-1]["event"] == "diverged"


def workers_of(process):
    """Processes of the loader that a training process started."""
    out = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == process and "spawn_main" in (path.parent / "cmdline").read_text():
                out.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return out


def is_alive(process):
    """Whether it exists and is more than an entry that nobody has read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_worker_is_replaced(corpus, server, undisturbed, tmp_path):
    """By SIGKILL, as the kernel's when memory runs out; and none outlives the command."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    running = start(
        server, corpus, workdir, log, "evaluation", more=("--config.data.num_workers=1",)
    )
    workers = workers_of(running.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    go(log).touch()
    ended = running.wait()
    assert ended.status == 0, ended.err
    assert "a data loader worker died (exit code -9)" in ended.err
    Outcome.read(workdir, log=log).assert_same(expected)

    # A killed command takes its workers along.
    running = start(
        server, corpus, tmp_path / "two", log, "steps", more=("--config.data.num_workers=1",)
    )
    workers = workers_of(running.pid)
    assert workers
    running.signal(signal.SIGKILL)
    deadline = time.monotonic() + HANG_SECONDS
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    running.wait()


class Dying:
    """A loader whose worker dies before every batch after the first `good`."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._batches)
        if batch == "dead":
            raise RuntimeError(
                "Worker process was terminated unexpectedly with exit code -9. Search the logs"
            )
        return batch

    def close(self):
        """As Grain's."""


@pytest.fixture
def dying(monkeypatch):
    """Makes loaders that die before given batches, once each time that these are reached."""

    def prepare(deaths):
        left = list(deaths)

        def make(source, begin, stop, **_):
            batches = []
            for step in range(begin, stop):
                if step in left:
                    left.remove(step)
                    batches.append("dead")
                    break
                batches.append(step)
            return Dying(batches)

        monkeypatch.setattr(loader, "make_loader", make)

    return prepare


def test_workers_that_die_again_and_again_stop_with_the_reason(dying):
    dying([5, 5, 9])
    assert list(loader.read_batches(None, 0, 20)) == list(range(20))
    dying([3, 3, 4, 4])
    found = loader.read_batches(None, 0, 20)
    assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(
        loader.WorkersDied, match=r"died for the 4th time \(exit code -9\), at batch 5"
    ):
        list(found)
    dying([10, 2_000, 4_000, 6_000, 8_000])  # one a day is no reason to stop
    assert len(list(loader.read_batches(None, 0, 9_000))) == 9_000
    dying([7])
    assert list(loader.read_batches(None, 0, 20, stopping=lambda: True)) == list(range(7))
