"""Bad input through the command line: one clear line, exit status 2, nothing half-written."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from helpers import command, read_unsealed


def flip_byte(path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    """Cuts a file to half its size."""
    os.truncate(path, path.stat().st_size // 2)


def empty_store(store):
    """Leaves a store of no tokens."""
    manifest = read_unsealed(store / "store.json")
    manifest |= {"shards": [], "tokens": 0, "documents": 0, "bytes": 0}
    (store / "store.json").write_text(json.dumps(manifest))


# How the copy of the corpus is broken, what is asked for, and what the one line must say.
CASES = {
    "unknown key": (None, ["--config.model.hidden_sizes=3"], r"hidden_size"),
    "wrong type": (None, ["--config.model.hidden_size=abc"], "hidden_size"),
    "impossible value": (None, ["--config.model.num_key_value_heads=3"], "num_key_value_heads: 3"),
    "batch that is no multiple": (None, ["--config.training.batch_tokens=500"], "batch_tokens"),
    "micro-batch that does not divide": (
        None,
        ["--config.training.microbatch_tokens=192"],
        "microbatch_tokens",
    ),
    "unknown flag": (None, ["--wrokdir=x"], "wrokdir"),
    "stray word": (None, ["please"], "unexpected argument 'please'"),
    "vocabulary smaller than the tokenizer's": (
        None,
        ["--config.model.vocab_size=100"],
        "config.model.vocab_size: 100",
    ),
    "repeated too often": (
        None,
        ["--config.data.sources.second.max_epochs=0.01"],
        "config.data.sources.second.max_epochs",
    ),
    "missing store": (lambda c: shutil.rmtree(c / "first" / "train"), [], "first/train"),
    "unfinished store": (
        lambda c: (c / "first" / "train" / "store.json").unlink(),
        [],
        "not finished",
    ),
    "flipped byte": (
        lambda c: flip_byte(c / "second" / "train" / "tokens-00000.npy"),
        [],
        "second/train/tokens-00000.npy",
    ),
    "truncated shard": (
        lambda c: truncate(c / "second" / "heldout" / "tokens-00000.npy"),
        [],
        "second/heldout/tokens-00000.npy",
    ),
    "empty store": (lambda c: empty_store(c / "first" / "train"), [], "empty"),
    "missing tokenizer": (
        lambda c: (c / "tokenizer.model").unlink(),
        [],
        "tokenizer.model",
    ),
    "corrupt tokenizer": (
        lambda c: (c / "tokenizer.model").write_bytes(b"not a model"),
        [],
        "tokenizer.model",
    ),
}


def assert_one_line(result, fragment):
    """The command failed as a user's mistake does."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert fragment in errors[0], errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", CASES)
def test_training_command_refuses(name, corpus, tmp_path):
    damage, arguments, fragment = CASES[name]
    copy = shutil.copytree(corpus.path, tmp_path / "corpus")
    config = copy / "tiny.py"
    config.write_text(config.read_text().replace(str(corpus.path), str(copy)))
    if damage is not None:
        damage(copy)
    workdir = tmp_path / "run"
    result = command(f"--config={config}", f"--workdir={workdir}", *arguments)
    assert_one_line(result, fragment)
    assert not workdir.exists()


def test_config_file_missing_or_broken(tmp_path):
    result = command("--config=configs/nothing.py")
    assert_one_line(result, "configs/nothing.py")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    assert_one_line(command(f"--config={broken}"), "broken.py")
    broken.write_text('def get_config():\n    return {}["mu"]\n')
    assert_one_line(command(f"--config={broken}"), "the config file raised KeyError")
    assert_one_line(command(), "--config is needed")


def test_workdir_that_is_not_ours(corpus, tmp_path):
    base = (f"--config={corpus.config}",)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    assert_one_line(command(*base, f"--workdir={tmp_path / 'notes'}"), "diary.txt")
    assert_one_line(command(*base, f"--workdir={tmp_path / 'notes' / 'diary.txt'}"), "diary.txt")
    assert_one_line(command(*base, "--workdir=/proc/danube"), "/proc/danube")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["diary.txt"]


def test_workdir_of_another_run_or_on_other_data(corpus, tmp_path):
    copy = shutil.copytree(corpus.path, tmp_path / "corpus")
    config = copy / "tiny.py"
    config.write_text(config.read_text().replace(str(corpus.path), str(copy)))
    base = (f"--config={config}", f"--workdir={tmp_path / 'run'}")
    first = command(*base, "--config.training.max_steps=2", "--config.evaluation.every_steps=0")
    assert first.returncode == 0, first.stderr
    assert "training.max_steps=2 ends the run in phase 'short'" in first.stderr
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))

    result = command(*base, "--config.model.hidden_size=64")
    assert_one_line(result, "config.model.hidden_size is 32 there and 64 here")

    shutil.rmtree(copy / "first" / "train")
    shutil.copytree(copy / "second" / "train", copy / "first" / "train")
    assert_one_line(command(*base), "source first changed")
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before

    result = command(
        *base, "--config.checkpoint.allow_data_change=True", "--config.training.max_steps=3"
    )
    assert result.returncode == 0, result.stderr
    assert "resuming on changed data: source first changed" in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_checkpoint(corpus, small_disk):
    workdir = small_disk / "run"
    base = (f"--config={corpus.config}", f"--workdir={workdir}")
    result = command(*base, "--config.checkpoint.keep_last=50", "--config.checkpoint.every_steps=1")
    assert_one_line(result, "No space left on device")
    whole = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert whole, "at least one checkpoint fitted"
    # Room again: the run goes on from what is whole.
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    result = command(*base)
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {max(whole)}" in result.stderr


def test_stores_are_read_only_by_training(corpus, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in corpus.path.rglob("*")}
    result = command(
        f"--config={corpus.config}",
        f"--workdir={tmp_path / 'run'}",
        "--config.training.max_steps=1",
    )
    assert result.returncode == 0, result.stderr
    assert before == {p: p.stat().st_mtime_ns for p in corpus.path.rglob("*")}


def test_help_shows_an_example():
    result = command("--help", fresh=True)
    assert result.returncode == 0
    assert "python -m danube_jax.train --config=configs/demo.py" in result.stdout
    assert "--workdir" in result.stdout


def test_losses_fall_and_are_finite(corpus, tmp_path):
    """The tiny run learns: far below the entropy of guessing among 400 pieces (5.99 nats)."""
    workdir = tmp_path / "run"
    result = command(f"--config={corpus.config}", f"--workdir={workdir}", fresh=True)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == 60
    assert np.mean(losses[:3]) > 5.7
    assert np.mean(losses[-10:]) < 5.0
