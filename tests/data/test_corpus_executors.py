"""Executors by name: Ray for real where it is installed, Slurm up to the job script."""

import os
import stat
import time

import pytest
from corpus_config import make, write_jsonl
from test_corpus_pipeline import TEXTS, tree
from test_corpus_tools import CONFIG, run

from danube_jax.data.corpus import executors
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


# A scheduler of one machine: it does an array's tasks before it returns, each as a job of its own.
CLUSTER = {
    "sbatch": """#!/bin/bash
for script; do :; done
cp "$script" "$CLUSTER_LOG/$(date +%s%N).sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
out=$(sed -n 's/^#SBATCH --output=//p' "$script")
export SLURM_JOB_ID=7 SLURM_NODELIST=node
for i in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$i bash "$script" > "${out/\\%A_\\%a/7_$i}" 2>&1
done
echo "Submitted batch job 7"
""",
    "srun": """#!/bin/bash
while [[ "$1" == -* || "$1" == 1 ]]; do shift; done
exec "$@"
""",
    "scontrol": "#!/bin/bash\necho node\n",
    "squeue": "#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n",
    "merge_stats": "#!/bin/bash\n",
}


@pytest.mark.slow
def test_the_command_line_on_slurm(tmp_path, monkeypatch):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, script in CLUSTER.items():
        (binaries / name).write_text(script)
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER_LOG", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:40])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[40:70])
    (tmp_path / "config.py").write_text(CONFIG)
    changes = ("--config=config.py", "--config.steps.minhash.buckets=2")
    slurm = ("--config.executor.kind=slurm", "--config.executor.partition=cpu")
    done = run(tmp_path, "prepare_data.py", *changes, "--config.output=local")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "prepare_data.py", *changes, *slurm, "--config.output=slurm")
    assert done.returncode == 0, done.stderr
    local, cluster = tree(tmp_path / "local"), tree(tmp_path / "slurm")
    assert local.keys() == cluster.keys()
    assert [name for name in local if local[name] != cluster[name]] == []
    scripts = [path.read_text() for path in tmp_path.glob("*.sh")]
    assert sum("launch_pickled_pipeline" in script for script in scripts) == 7  # stages
    # Bad input in a job stops the command like bad input on this machine.
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"no\n')
    done = run(tmp_path, "prepare_data.py", *changes, *slurm, "--config.output=broken")
    assert done.returncode == 2, done.stderr
    assert "b.jsonl, line 2: is not JSON" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "queued"),
    [
        ("echo '  7_0 cpu danube R'", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
        (None, True),
    ],
)
def test_a_job_that_left_the_queue_is_not_waited_for(tmp_path, monkeypatch, answer, queued):
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer is not None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "squeue").chmod(0o755)
    assert executors._is_queued("7") == queued


def test_progress_tells_rates_and_the_time_left(tmp_path):
    folder = tmp_path / "progress"
    folder.mkdir()
    progress = executors._Progress("clean", tmp_path, 2, 4_000_000)
    progress._begin, progress._start = time.monotonic() - 10, (0, 0, 0, 0)
    assert progress._line() == "0%"
    (folder / "00000.json").write_text("[600000, 500, 3000000]")
    (folder / "00001.json").write_text("[400000, 300, 1000000]")
    share, documents, rate, megabytes, left = progress._line().split(", ")
    assert (share, documents, rate) == ("25%", "800 documents", "80 documents/s")
    assert (megabytes, left) == ("0.4 MB/s", "30 s left")


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
