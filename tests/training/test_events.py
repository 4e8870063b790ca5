"""Events: what happened to a run stands in metrics.jsonl, and its page is written at every end."""

import json
import re
from pathlib import Path

import pytest
from helpers import command, read_rows

from danube_jax.errors import EXIT_INTERRUPTED
from danube_jax.training.events import FINISHED, PHASE, RESUME, SKIPPED, START, STOPPED, event_row
from danube_jax.training.metrics import MetricsWriter
from danube_jax.training.rounds import is_finished

INTERRUPT = str(Path(__file__).parent / "interrupt_at.py")


def events(workdir):
    """(event, step) of every event."""
    return [(row["event"], row["step"]) for row in read_rows(workdir, "event")]


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """A run that was stopped at step 13 or 14, lost that checkpoint, and went on to step 26."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    arguments = (f"--config={corpus.config}", f"--workdir={workdir}")
    result = command("13", "SIGTERM", *arguments, module=INTERRUPT)
    assert result.returncode == EXIT_INTERRUPTED, result.stderr
    assert (workdir / "report.html").is_file()
    early = (workdir / "report.html").read_text()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    state = workdir / "checkpoints" / str(saved) / "state"
    largest = max((f for f in state.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    result = command(*arguments, "--config.training.max_steps=26")
    assert result.returncode == 0, result.stderr
    return workdir, saved, early, result.stderr


def test_steps_that_were_compiled_have_no_speed(stopped):
    rows = read_rows(stopped[0], "train")
    assert [row["step"] for row in rows] == list(range(1, 27))
    without = [row["step"] for row in rows if row["tokens_per_second"] is None]
    assert without == [1, 11, 25]  # the start, the resume at step 10, and the phase from step 24 on


def test_a_run_tells_what_happened_to_it(stopped):
    workdir, saved, _, _ = stopped
    assert events(workdir) == [
        (START, 0),
        (STOPPED, saved),
        (RESUME, 10),
        ("restored_older", 10),
        (PHASE, 24),
        (FINISHED, 26),
    ]
    rows = {row["event"]: row for row in read_rows(workdir, "event")}
    assert rows["restored_older"]["damaged"] == [saved]
    assert rows[RESUME]["lost_steps"] == saved - 10
    assert rows[RESUME]["last_step"] == 26
    assert rows[PHASE]["context"] == 64
    assert rows[FINISHED]["unigram"].keys() == {"first", "second"}
    start = rows[START]
    assert start["devices"] == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", start["versions"]["jax"])
    # V·D twice, two blocks of (4 matrices of attention, 3 of the MLP, 2 norms), and a norm
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert start["parameters"] == start["trained_parameters"] == 2 * 400 * 32 + 2 * block + 32
    times = [row["time"] for row in read_rows(workdir, "event")]
    assert times == sorted(times)


def test_the_page_is_written_at_every_end(stopped):
    workdir, saved, early, output = stopped
    assert f"stopped, step {saved} of 60" in early
    late = (workdir / "report.html").read_text()
    assert "finished, step 26 of 26" in late
    assert f"Checkpoint {saved} was damaged" in late
    assert str(workdir / "report.html") in output.replace("\n", "")


def test_a_run_that_diverges_says_so(corpus, tmp_path):
    workdir = tmp_path / "diverged"
    result = command(
        f"--config={corpus.config}",
        f"--workdir={workdir}",
        "--config.optimizer.learning_rate=1e38",
        "--config.optimizer.final_learning_rate=1e37",
        "--config.optimizer.warmup_tokens=0",
        "--config.training.max_skipped_steps=2",
    )
    assert result.returncode == 1, result.stderr
    found = events(workdir)
    assert found[0] == (START, 0)
    assert [event for event, _ in found[1:]] == [SKIPPED, SKIPPED, "diverged"]
    assert "diverged, step" in (workdir / "report.html").read_text()


def test_history_stays_and_events_of_lost_steps_go(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step, event in ((0, START), (24, PHASE), (30, SKIPPED), (35, STOPPED), (60, FINISHED)):
        writer.write(event_row(event, step, 512 * step, {"detail": step or None}))
    writer.write({"kind": "train", "step": 33, "loss": 1.0})
    writer.close()
    writer = MetricsWriter(tmp_path, 24)
    writer.close()
    assert events(tmp_path) == [(START, 0), (PHASE, 24), (STOPPED, 35)]
    assert writer.lost_steps == 9
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "detail" not in rows[0]
    assert rows[1]["detail"] == 24


def test_a_round_is_finished_once_its_end_is_recorded(tmp_path):
    def record(event):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event_row(event, 8, 512, {})) + "\n")

    assert not is_finished(tmp_path, 8)
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    record(STOPPED)  # within the evaluation of the last step
    assert not is_finished(tmp_path, 8)
    record(FINISHED)
    assert is_finished(tmp_path, 8)
    assert not is_finished(tmp_path, 9)
