"""A disk that is full, slow, or cannot be written: a clear line, and nothing lost."""

import numpy as np
import pytest
from commands import TRAIN
from small_disk import fill, read_only, small_disk
from small_runs import Outcome, arguments, tree_bytes
from test_signals import go, start, steps_of

CHECKPOINT_BYTES = 500_000  # about what one of the small runs takes


def test_full_disk(corpus, server, undisturbed, full, tmp_path, figures):
    """Training stops with the last good checkpoint, and goes on when there is room."""
    expected, _ = undisturbed
    rng, stopped = np.random.default_rng(6), 0
    with small_disk(tmp_path / "disk", 16) as disk:
        workdir, log = disk / "run", tmp_path / "log"
        command = arguments(corpus.config, workdir)
        first = server.run(TRAIN, *command, "--config.training.max_steps=4", log=log)
        assert first.status == 0, first.err
        levels = [0, *rng.integers(0, int(1.5 * CHECKPOINT_BYTES), 9 if full else 1)]
        for level in levels:
            before = steps_of(workdir)
            filler = fill(disk, int(level))
            ended = server.run(TRAIN, *command, log=log)
            filler.unlink()
            ended.assert_clear()
            if ended.status == 0:
                break
            stopped += 1
            assert ended.status == 2, ended.err
            assert "No space left on device" in ended.errors[0]
            assert "run the same command again" in ended.errors[0]
            assert steps_of(workdir)[-1] >= before[-1]
        assert stopped
        ended = server.run(TRAIN, *command, log=log)
        assert ended.status == 0, ended.err
        assert "cannot be used" not in ended.err
        Outcome.read(workdir, log=log).assert_same(expected)
    figures("full disk", stops=stopped)


def test_files_may_not_grow(corpus, server, undisturbed, tmp_path):
    """A failing file layer where nothing can be mounted: writes beyond a size fail."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    command = arguments(corpus.config, workdir)
    limits = {"RLIMIT_FSIZE": CHECKPOINT_BYTES // 8}
    ended = server.run(TRAIN, *command, log=log, limits=limits)
    ended.assert_clear()
    assert ended.status == 2, ended.err
    assert "File too large" in ended.errors[0]
    assert steps_of(workdir) == []
    ended = server.run(TRAIN, *command, log=log)
    assert ended.status == 0, ended.err
    Outcome.read(workdir, log=log).assert_same(expected)


def test_read_only_folder(corpus, server, undisturbed, tmp_path):
    """From the start, and from the middle of a run on."""
    expected, _ = undisturbed
    with small_disk(tmp_path / "disk", 16) as disk:
        workdir, log = disk / "run", tmp_path / "log"
        command = arguments(corpus.config, workdir)
        with read_only(disk):
            ended = server.run(TRAIN, *command)
            ended.assert_clear()
            assert ended.status == 2
            assert "Read-only file system" in ended.errors[0]
        assert list(disk.iterdir()) == []
        running = start(server, corpus, workdir, log, "evaluation")
        held = None
        while held is None or steps_of(workdir) != held:  # a save may be under way
            held = steps_of(workdir)
            running.poll(0.5)
        # Files that are open for writing keep a disk from being remounted; a full one is as good.
        filler = fill(disk, 0)
        go(log).touch()
        ended = running.wait()
        ended.assert_clear()
        assert ended.status == 2
        filler.unlink()
        with read_only(disk):
            before = tree_bytes(workdir)
            ended = server.run(TRAIN, *command)
            ended.assert_clear()
            assert ended.status == 2
            assert "Read-only file system" in ended.errors[0]
            assert tree_bytes(workdir) == before
        ended = server.run(TRAIN, *command, log=log)
        assert ended.status == 0, ended.err
        Outcome.read(workdir, log=log).assert_same(expected)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_slow_disk(corpus, server, undisturbed, asynchronous, tmp_path):
    """Every rename and every stage of a save takes a third of a second longer."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    more = ("--config.checkpoint.every_steps=8", f"--config.checkpoint.asynchronous={asynchronous}")
    command = arguments(corpus.config, workdir, *more)
    ended = server.run(TRAIN, *command, log=log, delay=0.3)
    assert ended.status == 0, ended.err
    Outcome.read(workdir, log=log).assert_same(expected)
