"""A disk that is full, slow, or cannot be written: a clear line, and nothing lost."""

import numpy as np
import pytest
from commands import FROM_HF, TO_HF, TRAIN
from small_disk import fill, read_only, small_disk
from small_runs import Outcome, arguments, tree_bytes
from test_signals import go, start, steps_of
from tiny_folder import write_tiny_folder

CHECKPOINT_BYTES = 500_000  # about what one of the small runs takes
CONVERTED_BYTES = 120_000  # less than a conversion of the tiny model takes, in blocks of the disk
TIMED_OF_IMPORT = ("_CHECKPOINT_METADATA", "commit_success.txt")  # they hold the time of day


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


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.faults)])
def test_slow_disk(corpus, server, undisturbed, asynchronous, tmp_path):
    """Every rename and every stage of a save takes a fifth of a second longer."""
    expected, _ = undisturbed
    workdir, log = tmp_path / "run", tmp_path / "log"
    more = ("--config.checkpoint.every_steps=8", f"--config.checkpoint.asynchronous={asynchronous}")
    command = arguments(corpus.config, workdir, *more)
    ended = server.run(TRAIN, *command, log=log, delay=0.2)
    assert ended.status == 0, ended.err
    Outcome.read(workdir, log=log).assert_same(expected)


@pytest.fixture(scope="module")
def conversions(server, tmp_path_factory):
    """Import and export: the commands without their outputs, and what these are to be."""
    folder = tmp_path_factory.mktemp("conversions")
    model, ours = write_tiny_folder(folder / "model"), folder / "ours"
    cases = {
        "import": (FROM_HF, [f"--model={model}"], ours),
        "export": (TO_HF, [f"--model={ours}", "--noverify"], folder / "theirs"),
    }
    out = {}
    for name, (program, arguments_of, output) in cases.items():
        ended = server.run(program, *arguments_of, f"--output={output}")
        assert ended.status == 0, ended.err
        out[name] = (program, arguments_of, tree_bytes(output, TIMED_OF_IMPORT))
    return out


def assert_not_converted(ended, reason, output):
    """One line that names the output, the cause and the remedy."""
    ended.assert_clear()
    assert ended.status == 2, ended.err
    assert ended.errors[0].startswith(f"error: {output}: ")
    assert reason in ended.errors[0]


@pytest.mark.parametrize("name", ["import", "export"])
def test_full_disk_under_a_conversion(server, conversions, full, name, tmp_path, figures):
    """Whole or absent, an older output stays, and with room there is the same."""
    program, command, expected = conversions[name]
    rng = np.random.default_rng(8)
    levels = rng.integers(0, CONVERTED_BYTES, 12 if full else 1)
    with small_disk(tmp_path / "disk", 4) as disk:
        output = disk / "out"
        command = [*command, f"--output={output}", "--overwrite"]
        for i, level in enumerate(levels):
            if i == len(levels) // 2:
                output.mkdir()
                (output / "older").write_text("kept")
            before = tree_bytes(disk)
            filler = fill(disk, int(level))
            ended = server.run(program, *command)
            filler.unlink()
            assert_not_converted(ended, "cannot be", output)
            assert "No space left on device" in ended.errors[0]
            assert tree_bytes(disk) == before
        ended = server.run(program, *command)
        assert ended.status == 0, ended.err
        assert tree_bytes(output, TIMED_OF_IMPORT) == expected
        assert [path.name for path in disk.iterdir()] == ["out"]
    figures(f"full disk under {name}", stops=len(levels))


@pytest.mark.parametrize("name", ["import", "export"])
def test_conversion_to_a_folder_that_cannot_be_written(server, conversions, name, tmp_path):
    """A read-only disk, and a file that may not grow."""
    program, command, _ = conversions[name]
    output = tmp_path / "out"
    ended = server.run(
        program, *command, f"--output={output}", limits={"RLIMIT_FSIZE": CONVERTED_BYTES // 8}
    )
    assert_not_converted(ended, "File too large", output)
    assert list(tmp_path.iterdir()) == []
    with small_disk(tmp_path / "disk", 4) as disk, read_only(disk):
        ended = server.run(program, *command, f"--output={disk / 'out'}")
        assert_not_converted(ended, "Read-only file system", disk / "out")
        assert list(disk.iterdir()) == []
