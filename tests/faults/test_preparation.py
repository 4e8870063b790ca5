"""Preparation on disks that fill, killed at its last renames, and with processes that are lost."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import PREPARE, Ended, Forks, Running, forks
from helpers import ROOT
from small_disk import fill, read_only, small_disk
from small_runs import tree_bytes
from small_work import write_preparation
from staged import read_stage

pytest.importorskip("datatrove")

# What of a preparation holds the time of day or how long something took.
TIMED = ("statistics.json", "report.html", ".lock")
DISK_MEGABYTES = 16
END_SECONDS = 10.0  # in which a process without work must end, on a busy machine
# Room beyond what is already there, each of which stops the preparation in another stage.
SHORT_ROOMS = (0, 150_000, 400_000, 120_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with preparation's imports alone, and JAX, which a fork configures."""
    libraries = ("jax", "danube_jax.data.corpus.pipeline", "danube_jax.data.corpus.html")
    with forks(tmp_path_factory.mktemp("commands"), libraries) as started:
        yield started


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_preparation(tmp_path_factory.mktemp("work") / "texts")


@pytest.fixture(scope="module")
def expected(server, config, tmp_path_factory):
    """Every file of a preparation that nothing disturbed."""
    output = tmp_path_factory.mktemp("expected") / "out"
    ended = server.run(PREPARE, *arguments(config, output, 1))
    assert ended.status == 0, ended.err
    return tree_bytes(output, TIMED)


def arguments(config: Path, output: Path, workers: int) -> list[str]:
    return [
        f"--config={config}",
        f"--config.output={output}",
        f"--config.executor.workers={workers}",
        "--config.steps.minhash.buckets=4",  # a task each
    ]


def assert_same(output: Path, expected: dict[str, bytes]) -> None:
    """The output is there, and nothing else."""
    found = tree_bytes(output, TIMED)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert all((output / name).is_file() for name in TIMED)


def assert_refused(ended: Ended, reason: str, folder: Path) -> None:
    """One line that names the cause, and the folder or a file in it."""
    ended.assert_clear()
    assert ended.status == 2, ended.err
    assert reason in ended.errors[0]
    assert str(folder) in ended.errors[0]
    assert ".tmp" not in ended.errors[0]
    assert "run the same command again" in ended.errors[0]


def stage_of(output: Path) -> str:
    """The stage that a stopped preparation was in."""
    if (output / "documents").is_dir():
        return "finish"
    stages = (output / "work").iterdir() if (output / "work").is_dir() else ()
    return max(stages, key=lambda path: path.stat().st_ctime_ns).name if stages else "none"


def assert_whole_stores(output: Path, expected: dict[str, bytes]) -> None:
    """Every store that says that it is finished is whole."""
    for manifest in output.glob("stores/*/*/store.json"):
        for path in manifest.parent.glob("*.npy"):
            assert path.read_bytes() == expected[str(path.relative_to(output))]


def test_full_disk(server, config, expected, full, tmp_path, figures):
    """A little more room each time, until there is enough."""
    rng, stages = np.random.default_rng(7), []
    if full:
        rooms = [(int(rng.integers(0, 200_000)), 1 + int(rng.integers(2))) for _ in range(25)]
    else:
        rooms = [(room, 1) for room in SHORT_ROOMS]
    with small_disk(tmp_path / "disk", DISK_MEGABYTES) as disk:
        output = disk / "out"
        for room, workers in rooms:
            filler = fill(disk, room)
            ended = server.run(PREPARE, *arguments(config, output, workers))
            filler.unlink()
            if ended.status == 0:
                break
            assert_refused(ended, "No space left on device", disk)
            assert_whole_stores(output, expected)
            assert not (output / "statistics.json").exists()
            stages.append(stage_of(output))
        assert len(set(stages)) >= (4 if full else 3), stages
        ended = server.run(PREPARE, *arguments(config, output, 1))
        assert ended.status == 0, ended.err
        assert_same(output, expected)
    figures("full disk under preparation", stops=len(stages), stages=stages)


def test_files_may_not_grow(server, config, expected, tmp_path):
    """A failing file layer where nothing can be mounted; workers have the limit, too."""
    output, limits = tmp_path / "out", {"RLIMIT_FSIZE": 15_000}
    ended = server.run(PREPARE, *arguments(config, output, 2), limits=limits)
    assert_refused(ended, "File too large", output)
    assert stage_of(output) != "none"
    ended = server.run(PREPARE, *arguments(config, output, 1))
    assert ended.status == 0, ended.err
    assert_same(output, expected)


def test_read_only_folder(server, config, expected, tmp_path):
    """Before the beginning and after the end; a finished preparation can be read there."""
    with small_disk(tmp_path / "disk", DISK_MEGABYTES) as disk:
        output = disk / "out"
        command = arguments(config, output, 1)
        with read_only(disk):
            ended = server.run(PREPARE, *command)
            assert_refused(ended, "Read-only file system", output)
        assert list(disk.iterdir()) == []
        assert server.run(PREPARE, *command).status == 0
        (output / "statistics.json").rename(output / "kept")  # as one that was stopped
        with read_only(disk):
            before = tree_bytes(output)
            ended = server.run(PREPARE, *command)
            assert_refused(ended, "Read-only file system", output)
            assert tree_bytes(output) == before
        (output / "kept").rename(output / "statistics.json")
        with read_only(disk):
            ended = server.run(PREPARE, *command)
            assert ended.status == 0, ended.err
            assert "already prepared" in ended.err
        assert_same(output, expected)


def test_no_room_for_temporary_files(tmp_path):
    """Python looks for a folder of temporary files by writing to each that it knows."""
    program = (
        "import resource, tempfile\n"
        "from danube_jax.errors import exit_on_user_error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with exit_on_user_error():\n"
        "    tempfile.mkdtemp()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    ended.assert_clear()
    assert ended.status == 2
    assert "No usable temporary directory" in ended.errors[0]


@pytest.mark.parametrize("stage", ["statistics", "page"])
def test_killed_at_its_end(server, config, expected, stage, tmp_path):
    """After the last rename but before the statistics; and after these."""
    output, log = tmp_path / "out", tmp_path / "log"
    command = arguments(config, output, 1)
    running = server.start(PREPARE, *command, log=log, hold=f"preparation: {stage}")
    wait_for(lambda: read_stage(log) == f"preparation: {stage}", running)
    assert running.kill(group=True).status == -signal.SIGKILL
    # Exactly there: everything has its last place but what says that it is so.
    assert (output / "documents").is_dir()
    assert (output / "statistics.json").exists() == (stage == "page")
    assert (output / "work").exists() == (stage != "page")
    assert not (output / "report.html").exists()
    left = {name: data for name, data in tree_bytes(output, TIMED).items() if "work/" not in name}
    assert left == expected
    (output / ".statistics.json.999999.tmp").write_text("{")  # a kill while it is written
    ended = server.run(PREPARE, *command)
    assert ended.status == 0, ended.err
    assert_same(output, expected)


def wait_for(
    condition: Callable[[], bool], running: Running | None = None, seconds: float = 120.0
) -> None:
    """Waits until something holds, which must come before a command ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert running is None or running.poll(0.01) is None, "ended before"
        assert time.monotonic() < deadline, "did not come"
        time.sleep(0.002)


def group_of(group: int) -> dict[int, int]:
    """Process → its parent, of a process group, dead ones that nobody has waited for left out."""
    out = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            out[int(path.parent.name)] = int(parent)
    return out


def start_with_workers(server: Forks, config: Path, output: Path) -> tuple[Running, list[int]]:
    """A preparation amid the tasks of its first stage, and the processes of its workers."""
    running = server.start(PREPARE, *arguments(config, output, 2))

    def workers() -> list[int]:
        """They are forked from a server, which is the command's child."""
        parents = group_of(running.pid)
        return [p for p, parent in parents.items() if parents.get(parent) == running.pid]

    progress = output / "work" / "clean" / "progress"
    wait_for(lambda: any(progress.glob("*.json")) and workers(), running)
    return running, workers()


@contextlib.contextmanager
def stopped(process: int, group: int) -> Iterator[None]:
    """A process that does nothing within the block, as if it were deep in a call that takes long.

    The kernel wakes stopped processes of a group in which nobody has a parent outside of it, which
    becomes so when a command is killed. A process of ours in the group prevents that.
    """
    ours = subprocess.Popen(["sleep", "600"], process_group=group)
    try:
        os.kill(process, signal.SIGSTOP)
        yield
        os.kill(process, signal.SIGCONT)
    finally:
        ours.kill()
        ours.wait()


def test_workers_end_with_a_killed_preparation(server, config, expected, tmp_path):
    """The kernel kills one process alone; a worker that cannot end at once keeps the lock."""
    output = tmp_path / "out"
    command = arguments(config, output, 1)
    running, workers = start_with_workers(server, config, output)
    with stopped(workers[0], running.pid):
        running.signal(signal.SIGKILL)
        assert server.ask({"wait": running.pid, "timeout": 60.0})["status"] == -signal.SIGKILL
        wait_for(lambda: not set(workers[1:]) & set(group_of(running.pid)), seconds=END_SECONDS)
        before = tree_bytes(output)
        ended = server.run(PREPARE, *command)
        ended.assert_clear()
        assert ended.status == 2, ended.err
        assert f"{output}: another process is preparing this corpus" in ended.errors[0]
        assert tree_bytes(output) == before
    ended = server.run(PREPARE, *command)  # which waits for what is about to end
    assert ended.status == 0, ended.err
    assert_same(output, expected)
    wait_for(lambda: not group_of(running.pid), seconds=END_SECONDS)


def test_a_killed_worker_stops_the_preparation(server, config, expected, tmp_path):
    """As where memory runs out: the command says so, and ends with its other workers."""
    output = tmp_path / "out"
    running, workers = start_with_workers(server, config, output)
    os.kill(workers[0], signal.SIGKILL)
    status = server.ask({"wait": running.pid, "timeout": 60.0})["status"]
    ended = Ended(status, "", running.shown())
    ended.assert_clear()
    assert ended.status == 1
    assert "a worker of the stage clean was killed" in ended.errors[0]
    wait_for(lambda: not group_of(running.pid), seconds=END_SECONDS)
    ended = server.run(PREPARE, *arguments(config, output, 1))
    assert ended.status == 0, ended.err
    assert_same(output, expected)
