"""Damage to what a run reads: found, named, nothing overwritten, and never a wrong result."""

import collections
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from commands import TO_HF, TRAIN
from run_damage import KINDS, damage, damaged
from small_runs import arguments, checkpoint_arrays, rows, tree_bytes

LAST = 9  # of the run that is damaged: its checkpoints are 6 and 9
UNTOLD = ("report.html",)  # written anew at every end


def flags(corpus, workdir: Path, last: int = LAST) -> list[str]:
    """Of the short run."""
    return arguments(corpus.config, workdir, f"--config.training.max_steps={last}")


@pytest.fixture(scope="module")
def base(corpus, server, tmp_path_factory) -> Path:
    """The run before any damage, complete up to `LAST`."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    ended = server.run(TRAIN, *flags(corpus, workdir))
    assert ended.status == 0, ended.err
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["6", "9"]
    return workdir


def files_under(*folders: Path) -> list[Path]:
    """Every file that is not empty."""
    return sorted(p for f in folders for p in f.rglob("*") if p.is_file() and p.stat().st_size)


def draw(rng: np.random.Generator, paths: list[Path], count: int) -> list[tuple[Path, str]]:
    """Files and kinds of damage; every file once before one comes again."""
    order = [i for _ in range(count // len(paths) + 1) for i in rng.permutation(len(paths))]
    return [(paths[i], str(rng.choice(KINDS))) for i in order[:count]]


class Campaign:
    """Counts what came of the damages of one kind of file."""

    def __init__(self, name, figures):
        self._name, self._figures = name, figures
        self.outcomes, self._begin = collections.Counter(), time.monotonic()

    def note(self, outcome: str) -> None:
        """One more."""
        self.outcomes[outcome] += 1

    def end(self) -> None:
        """Writes the figures."""
        self._figures(
            f"damage of {self._name}",
            damages=self.outcomes.total(),
            outcomes=dict(self.outcomes),
            seconds=round(time.monotonic() - self._begin),
            processors=os.cpu_count(),
        )


def test_stores_tokenizer_and_config_file(corpus, server, base, full, figures):
    """Before anything is computed; the workdir stays as it is, to the byte."""
    rng, before = np.random.default_rng(1), tree_bytes(base, UNTOLD)
    stores = [corpus.path / name for name in ("first", "second")]
    kinds = {
        "arrays of a TokenStore": [p for p in files_under(*stores) if p.suffix == ".npy"],
        "manifest of a TokenStore": [p for p in files_under(*stores) if p.suffix == ".json"],
        "tokenizer": [corpus.path / "tokenizer.model"],
        "config file of the command": [corpus.config],
        "config.json of a run": [base / "config.json"],
    }
    counts = (90, 90, 40, 40, 60) if full else (2, 3, 1, 1, 1)
    for (name, paths), count in zip(kinds.items(), counts, strict=True):
        campaign = Campaign(name, figures)
        for path, kind in draw(rng, paths, count):
            with damaged(path, kind, rng) as what:
                if path.exists() and path.parent == base:
                    kept = path.read_bytes()
                ended = server.run(TRAIN, *flags(corpus, base))
                ended.assert_clear()
                if path.parent == base and ended.status and kind != "delete":
                    assert path.read_bytes() == kept, what  # not overwritten
            if ended.status == 0:  # a comment or a path to the same, say
                assert path.suffix == ".py", what
                assert "this run is complete; nothing was trained" in ended.err, what
                campaign.note("no effect")
            else:
                assert ended.status == 2, (what, ended.err)
                named = str(path) in ended.err or path.suffix == ".py"
                named |= path.name == "tokenizer.model" and "tokenizer" in ended.err
                named |= kind == "delete" and path.parent == base  # "not the folder of a run"
                assert named, (what, ended.err)
                campaign.note("refused")
            assert tree_bytes(base, UNTOLD) == before, what
        campaign.end()


def test_checkpoints(corpus, server, base, full, tmp_path, figures):
    """The newest is damaged: the one before is used, and the result is the same to the bit."""
    rng, expected = np.random.default_rng(2), checkpoint_arrays(base, LAST)
    campaign = Campaign("newest checkpoint", figures)
    names = [p.relative_to(base) for p in files_under(base / "checkpoints" / str(LAST))]
    for i, (name, kind) in enumerate(draw(rng, names, 130 if full else 3)):
        workdir = tmp_path / f"run{i}"
        shutil.copytree(base, workdir)
        what = damage(workdir / name, kind, rng)
        left = tree_bytes(workdir / "checkpoints" / str(LAST))
        ended = server.run(TRAIN, *flags(corpus, workdir))
        ended.assert_clear()
        assert ended.status == 0, (what, ended.err)
        if "nothing was trained" in ended.err:
            assert "cannot be used" not in ended.err
            assert tree_bytes(workdir / "checkpoints" / str(LAST)) == left
            campaign.note("no effect")
        else:
            lines = ended.err.splitlines()
            loud = [line for line in lines if "warning:" in line and "cannot be used" in line]
            assert len(loud) == 1, (what, ended.err)
            assert f"checkpoints/{LAST}:" in loud[0]
            assert "resuming at step 6 of 9" in ended.err
            assert tree_bytes(workdir / "damaged" / str(LAST)) == left, what
            campaign.note("the one before was used")
        found = checkpoint_arrays(workdir, LAST)
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in expected.items()
        }, what
        assert rows(workdir, "train") == rows(base, "train")
        shutil.rmtree(workdir)
    campaign.end()


def test_all_checkpoints_damaged_stops_and_changes_nothing(
    corpus, server, base, full, tmp_path, figures
):
    rng, campaign = np.random.default_rng(3), Campaign("all checkpoints", figures)
    arrays = [p for p in files_under(base / "checkpoints") if p.stat().st_size > 10_000]
    for i in range(20 if full else 1):
        workdir = tmp_path / f"run{i}"
        shutil.copytree(base, workdir)
        for step in ("6", "9"):
            own = [p for p in arrays if step in p.relative_to(base).parts]
            largest = max(own, key=lambda p: p.stat().st_size)
            data = bytearray((workdir / largest.relative_to(base)).read_bytes())
            begin = int(rng.integers(0, len(data) // 2))
            data[begin : begin + 512] = rng.bytes(512)
            (workdir / largest.relative_to(base)).write_bytes(data)
        before = tree_bytes(workdir, UNTOLD)
        ended = server.run(TRAIN, *flags(corpus, workdir))
        ended.assert_clear()
        assert ended.status == 2
        assert "none of the checkpoints [6, 9] can be read" in ended.errors[0]
        assert ended.err.count("cannot be used") == 2
        assert tree_bytes(workdir, UNTOLD) == before
        campaign.note("refused")
        shutil.rmtree(workdir)
    campaign.end()


def test_metrics(corpus, server, base, full, tmp_path, figures):
    """A row that is no row is named; a torn last line is what a kill leaves."""
    rng, campaign = np.random.default_rng(4), Campaign("metrics.jsonl", figures)
    for i in range(40 if full else 1):
        workdir = tmp_path / f"run{i}"
        shutil.copytree(base, workdir)
        path = workdir / "metrics.jsonl"
        what = damage(path, str(rng.choice(("flip", "flip", "zeros", "truncate"))), rng)
        before = path.read_bytes()
        ended = server.run(TRAIN, *flags(corpus, workdir))
        ended.assert_clear()
        if ended.status:
            assert f"{path}, line " in ended.errors[0], what
            assert path.read_bytes() == before
            campaign.note("refused")
        else:
            campaign.note("a row's figures, or the last row")
        shutil.rmtree(workdir)
    campaign.end()


def test_what_a_finished_run_is_used_from(corpus, server, base, full, tmp_path, figures):
    """Its config.json and its copy of the tokenizer, by another command."""
    rng, before = np.random.default_rng(5), tree_bytes(base, UNTOLD)
    kinds = {
        "config.json, on export": ([base / "config.json"], 40),
        "tokenizer, on export": (files_under(base / "tokenizer"), 40),
    }
    for name, (paths, count) in kinds.items():
        campaign = Campaign(name, figures)
        for path, kind in draw(rng, paths, count if full else 1):
            output = tmp_path / "out"
            with damaged(path, kind, rng) as what:
                ended = server.run(TO_HF, f"--model={base}", f"--output={output}", "--noverify")
            ended.assert_clear()
            if path.name == "SHA256SUMS" and kind == "delete":
                assert ended.status == 0
                campaign.note("no effect")
            else:
                assert ended.status == 2, what
                assert str(path.parent) in ended.err, (what, ended.err)
                assert not output.exists()
                campaign.note("refused")
            shutil.rmtree(output, ignore_errors=True)
        assert tree_bytes(base, UNTOLD) == before
        campaign.end()
