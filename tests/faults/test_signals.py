"""SIGTERM and SIGINT at any moment of training: saved, status 75, and nothing lost."""

import signal
import time
from pathlib import Path

import pytest
from commands import HANG_SECONDS, TRAIN
from small_runs import Outcome, arguments
from staged import read_stage

from danube_jax.errors import EXIT_INTERRUPTED

# Where there is something to save, and where nothing is lost by stopping at once.
SAVING = ("steps", "begin of a save", "asynchronous save", "commit", "evaluation", "samples")
AT_ONCE = ("set-up", "restoring")
NOTHING_TO_SAVE = "stopped before the first step"
# Of tests that need not have both in the short form.
NUMBERS = [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)]


def steps_of(workdir):
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def start(server, corpus, workdir, log, hold, more=(), **options):
    """Starts the run, which waits for `release` where it first enters a stage."""
    for path in (log, go(log)):
        path.unlink(missing_ok=True)
    command = arguments(corpus.config, workdir, *more)
    running = server.start(TRAIN, *command, log=log, hold=hold, **options)
    deadline = time.monotonic() + HANG_SECONDS
    while hold and read_stage(log) != hold:
        assert running.poll(0.005) is None, f"ended before {hold}"
        assert time.monotonic() < deadline, f"never in {hold}"
    return running


def go(log):
    """The file that a held stage waits for."""
    return log.with_name(f"{log.name}.go")


def interrupt(server, corpus, workdir, log, stage, number, group=False):
    """Runs until `stage`, sends a signal, and returns how it ended."""
    running = start(server, corpus, workdir, log, stage)
    running.signal(number, group=group)
    time.sleep(0.05)  # a thread that does not get the signal would go on first
    go(log).touch()
    return running.wait()


def test_training_saves_and_goes_on(corpus, server, undisturbed, full, tmp_path, figures):
    expected, _ = undisturbed
    count = 0
    numbers = (signal.SIGTERM, signal.SIGINT)
    chosen = SAVING + AT_ONCE if full else ("steps", "evaluation", "restoring")
    for number in numbers if full else numbers[:1]:
        workdir, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        for i, stage in enumerate(chosen):
            before = steps_of(workdir)
            ended = interrupt(server, corpus, workdir, log, stage, number, group=bool(i % 2))
            count += 1
            assert ended.status == EXIT_INTERRUPTED, (stage, ended.err)
            assert "Traceback" not in ended.err
            assert signal.Signals(number).name in ended.err
            # What an earlier stop left out is made up for before the first step.
            made_up = stage in ("evaluation", "samples") and NOTHING_TO_SAVE in ended.err
            if stage in SAVING and not made_up:
                assert f"saved at step {steps_of(workdir)[-1]};" in ended.err
                assert not before or steps_of(workdir)[-1] >= before[-1]
            else:
                assert NOTHING_TO_SAVE in ended.err
                assert steps_of(workdir) == before
        assert server.run(TRAIN, *arguments(corpus.config, workdir), log=log).status == 0
        Outcome.read(workdir, log=log).assert_same(expected)
    figures("signals to training", signals=count)


@pytest.mark.parametrize("number", NUMBERS)
def test_second_signal_ends_at_once_and_a_short_notice_keeps_what_was_there(
    corpus, server, undisturbed, number, tmp_path
):
    """While the save that the first signal asked for takes seconds."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    running = start(server, corpus, workdir, log, "removal of old ones")
    running.kill(group=True)
    before = steps_of(workdir)
    assert before
    for last in (number, signal.SIGKILL):
        running = start(server, corpus, workdir, log, "steps")
        running.signal(number)
        go(log).touch()
        deadline = time.monotonic() + HANG_SECONDS
        while "saving after this step" not in running.shown():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.signal(last)
        sent = time.monotonic()
        ended = running.wait()
        assert ended.status == (-signal.SIGKILL if last == signal.SIGKILL else 128 + last)
        assert time.monotonic() - sent < 10  # at once, on a machine however busy
        assert "Traceback" not in ended.err
        assert steps_of(workdir)[-1] >= before[-1]
    ended = server.run(TRAIN, *arguments(corpus.config, workdir), log=log)
    assert ended.status == 0, ended.err
    assert "cannot be used" not in ended.err
    Outcome.read(workdir, log=log).assert_same(expected)


@pytest.mark.parametrize("number", NUMBERS)
def test_while_the_interpreter_imports(corpus, server, number, tmp_path):
    workdir = tmp_path / "run"
    running = server.start(TRAIN, *arguments(corpus.config, workdir), fresh=True)
    process = Path(f"/proc/{running.pid}")
    deadline = time.monotonic() + 120
    while (
        "fork_server" in (process / "cmdline").read_text()
        or "jaxlib" not in (process / "maps").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.signal(number)
    ended = running.wait()
    assert ended.status == EXIT_INTERRUPTED, ended.err
    assert "Traceback" not in ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"{signal.Signals(number).name}: stopped"), ended.err
    assert "step 1/" not in ended.err
    assert not steps_of(workdir)


def test_while_jax_sets_up_its_backend_and_makes_the_weights(corpus, server, full, tmp_path):
    """The end of the interpreter is not a segmentation fault."""
    for i, seconds in enumerate((0.3, 0.5, 0.8, 1.2) if full else (0.5,)):
        running = server.start(TRAIN, *arguments(corpus.config, tmp_path / f"run{i}"), fresh=True)
        deadline = time.monotonic() + HANG_SECONDS
        while "no accelerator found" not in running.shown():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        running.signal(signal.SIGTERM)
        ended = running.wait()
        assert ended.status == EXIT_INTERRUPTED, ended.err
        assert "Traceback" not in ended.err
