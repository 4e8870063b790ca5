"""A run that was stopped and continued is the run that was never stopped, to the bit."""

import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import command, read_rows

from danube_jax.errors import EXIT_INTERRUPTED

INTERRUPT = str(Path(__file__).parent / "interrupt_at.py")


def checkpoint_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        tree = manager.restore(step, args=args)["state"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every logged training step."""
    return [(row["step"], row["loss"]) for row in read_rows(workdir, "train")]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> Path:
    """The workdir of a run of 60 steps at once."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    result = command(f"--config={corpus.config}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    return workdir


def test_three_stops_change_no_bit(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    arguments = (f"--config={corpus.config}", f"--workdir={workdir}")

    result = command("13", "SIGTERM", *arguments, module=INTERRUPT)
    assert result.returncode == EXIT_INTERRUPTED, result.stderr
    assert "saved at step" in result.stderr

    result = command(*arguments, "--config.training.max_steps=24")  # the phase boundary
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stderr

    result = command("37", "SIGKILL", *arguments, module=INTERRUPT)
    assert result.returncode == -signal.SIGKILL, result.stderr

    result = command(*arguments)
    assert result.returncode == 0, result.stderr

    assert losses(workdir) == losses(uninterrupted)
    assert [step for step, _ in losses(workdir)] == list(range(1, 61))
    ours, theirs = checkpoint_arrays(workdir, 60), checkpoint_arrays(uninterrupted, 60)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    evaluations = [
        {key: value for key, value in row.items() if key.startswith(("loss/", "bits"))}
        for row in read_rows(workdir, "evaluation")
        if row["step"] in (30, 60)
    ]
    expected = [
        {key: value for key, value in row.items() if key.startswith(("loss/", "bits"))}
        for row in read_rows(uninterrupted, "evaluation")
    ]
    assert evaluations == expected


def test_complete_run_says_so_and_changes_nothing(corpus, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    result = command(f"--config={corpus.config}", f"--workdir={uninterrupted}")
    assert result.returncode == 0, result.stderr
    assert "this run is complete" in result.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_other_device_counts_go_on_with_the_same_data(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "elastic"
    arguments = (f"--config={corpus.config}", f"--workdir={workdir}")
    result = command(*arguments, "--config.training.max_steps=20", devices=2)
    assert result.returncode == 0, result.stderr
    result = command(*arguments, "--config.training.max_steps=40", devices=8)
    assert result.returncode == 0, result.stderr
    assert "written with 2 devices and this run has 8" in result.stderr
    found = losses(workdir)
    assert [step for step, _ in found] == list(range(1, 41))
    # float32 sums in another order, over 40 steps of a model whose losses are near 5
    expected = np.array([loss for _, loss in losses(uninterrupted)[:40]])
    np.testing.assert_allclose([loss for _, loss in found], expected, rtol=2e-4)


def test_damaged_checkpoint_is_named_and_the_one_before_used(corpus, tmp_path):
    workdir = tmp_path / "damaged"
    arguments = (f"--config={corpus.config}", f"--workdir={workdir}")
    result = command(*arguments, "--config.training.max_steps=20")
    assert result.returncode == 0, result.stderr
    files = [f for f in (workdir / "checkpoints" / "20" / "state").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    result = command(*arguments, "--config.training.max_steps=22")
    assert result.returncode == 0, result.stderr
    assert "checkpoints/20: checkpoint cannot be used" in result.stderr.replace("\n", "")
    assert "resuming at step 10" in result.stderr
    assert (workdir / "damaged" / "20").is_dir()
    assert [step for step, _ in losses(workdir)] == list(range(1, 23))
