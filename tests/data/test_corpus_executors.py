"""Executors by name: Ray for real where it is installed, Slurm up to the job script."""

import os
import stat

import pytest
from corpus_config import make, write_jsonl
from test_corpus_pipeline import TEXTS, tree

from danube_jax.data.corpus.config import ExecutorConfig, parse_corpus_config
from danube_jax.data.corpus.executors import Runner
from danube_jax.data.corpus.pipeline import prepare
from danube_jax.errors import UserError

# A scheduler that keeps the first job's script, its last argument; the second adds up statistics.
SBATCH = """#!/bin/sh
for script; do :; done
[ -e "{folder}/job.sh" ] || cp "$script" "{folder}/job.sh"
echo "Submitted batch job 1"
"""


class _Step:
    """A block that says which tasks ran."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, data, rank, world_size):
        (self.folder / f"ran{rank}").touch()


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="needs ray")
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:30])
    for kind in ("local", "ray"):
        corpus = make(
            tmp_path / kind,
            {"a": path},
            task_bytes=20_000,
            heldout_fraction=0.2,
            steps__minhash__buckets=2,
            executor__kind=kind,
            executor__workers=2,
            executor__memory_gb=1,
        )
        prepare(corpus)
    local, ray = tree(tmp_path / "local"), tree(tmp_path / "ray")
    assert local.keys() == ray.keys()
    assert [name for name in local if local[name] != ray[name]] == []


def test_slurm_gets_the_tasks_that_are_left(tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH.format(folder=tmp_path))
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    config = ExecutorConfig(
        kind="slurm", partition="cpu", time="01:00:00", memory_gb=3, options={"account": "me"}
    )
    runner = Runner(config, tmp_path / "work")
    executor = runner._executor("clean", [_Step(tmp_path)], 3, tmp_path / "work" / "clean")
    executor.mark_rank_as_completed(1)
    executor.run()
    script = (tmp_path / "job.sh").read_text()
    for expected in ("--partition=cpu", "--time=01:00:00", "--mem-per-cpu=3G", "--account=me"):
        assert f"#SBATCH {expected}" in script
    assert "launch_pickled_pipeline" in script
    assert executor.get_incomplete_ranks() == [0, 2]
    # What a job does with its pickled pipeline, told by Slurm's variables.
    for name in ("SLURM_NODELIST", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datatrove.executor.slurm.expand_slurm_nodelist", lambda nodes: ["node"])
    for rank in executor.get_incomplete_ranks():
        executor._run_for_rank(rank)
    assert {path.name for path in tmp_path.glob("ran*")} == {"ran0", "ran2"}
    assert executor.get_incomplete_ranks() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor__kind": "slurm"}, r"executor\.partition: '' is not possible"),
        ({"executor__kind": "cloud"}, r"executor\.kind: 'cloud' is not possible"),
        ({"folder": "s3://bucket/x"}, r"config\.output: 's3://bucket/x' is not possible"),
        ({"steps__quality__enabled": True}, r"steps\.quality\.model: '' is not possible"),
        ({"steps__quality__buckets": ("a", "b")}, "exactly one of thresholds and shares"),
        ({"heldout_fraction": 1.5}, r"config\.heldout_fraction: 1\.5 is not possible"),
    ],
)
def test_impossible_values_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(changes.pop("folder", tmp_path), {"a": "a.jsonl"}, **changes)


def test_unknown_keys_are_named():
    with pytest.raises(UserError, match=r"config\.steps\.minhash\.bands: unknown key"):
        parse_corpus_config({"steps": {"minhash": {"bands": 3}}})
