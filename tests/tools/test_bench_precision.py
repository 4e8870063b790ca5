"""The comparison of precisions: which runs it trains, and what it makes of their losses."""

import importlib.util
import json

import numpy as np
import pytest
from helpers import command, read_rows

from danube_jax.config import parse_config
from danube_jax.training.workdir import claim_workdir

MODULE = "tools/bench_precision.py"
STEPS = 2
TOKENS = {"first": 300.0, "second": 100.0}
LOSSES = {  # precision, seed → source → held-out loss
    ("bfloat16", 0): {"first": 4.0, "second": 5.0},
    ("fp8", 0): {"first": 4.1, "second": 5.1},
    ("bfloat16", 1): {"first": 4.2, "second": 5.2},
}


def write_finished_run(corpus, workdir, precision, seed, losses):
    """A folder as a run of two steps leaves it, with these held-out losses."""
    spec = importlib.util.spec_from_file_location("tiny_config", corpus.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.precision.linear, config.precision.compute = precision, "bfloat16"
    config.training.seed, config.training.max_steps = seed, STEPS
    folder = workdir / f"{precision}-seed{seed}"
    claim_workdir(folder, parse_config(config))
    rows = [
        {"kind": "train", "step": i, "tokens": i * 512, "loss": 6.0 + (precision == "fp8") * 0.06}
        for i in (1, 2)
    ]
    values = {f"loss/{k}": v for k, v in losses.items()} | {
        f"tokens/{k}": v for k, v in TOKENS.items()
    }
    rows.append({"kind": "evaluation", "step": STEPS, "tokens": STEPS * 512} | values)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory):
    """The folder of a comparison of which one run was missing, and what the tool printed."""
    workdir = tmp_path_factory.mktemp("precision") / "runs"
    for (precision, seed), losses in LOSSES.items():
        write_finished_run(corpus, workdir, precision, seed, losses)
    result = command(
        f"--config={corpus.config}",
        f"--workdir={workdir}",
        "--seeds=0,1",
        f"--config.training.max_steps={STEPS}",
        module=MODULE,
    )
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_only_the_missing_run_is_trained(compared):
    workdir, result = compared
    assert result.stderr.count(": complete") == len(LOSSES)
    config = json.loads((workdir / "fp8-seed1" / "config.json").read_text())["config"]
    assert config["precision"]["linear"] == "fp8"
    assert config["precision"]["compute"] == "bfloat16"
    assert config["training"]["seed"] == 1
    assert [row["step"] for row in read_rows(workdir / "fp8-seed1", "train")] == [1, 2]
    assert "fp8-seed1" in (workdir / "comparison.html").read_text()


def test_losses_are_compared_seed_by_seed(compared):
    workdir, result = compared
    report = json.loads((workdir / "precision.json").read_text())
    evaluation = read_rows(workdir / "fp8-seed1", "evaluation")[-1]
    runs = {(precision, seed): (losses, TOKENS) for (precision, seed), losses in LOSSES.items()} | {
        ("fp8", 1): tuple(
            {name: evaluation[f"{key}/{name}"] for name in TOKENS} for key in ("loss", "tokens")
        )
    }
    means = {  # over the tokens of both sources
        key: sum(losses[n] * tokens[n] for n in tokens) / sum(tokens.values())
        for key, (losses, tokens) in runs.items()
    }
    for run in report["runs"]:
        assert run["losses"] == pytest.approx([means[run["precision"], run["seed"]]])
    ratios = [means["fp8", seed] / means["bfloat16", seed] - 1 for seed in (0, 1)]
    assert ratios[0] == pytest.approx(0.1 / 4.25)
    (row,) = report["comparison"]
    assert row["final"] == pytest.approx(ratios)
    assert row["mean"] == pytest.approx(np.mean(ratios))
    assert row["spread"] == pytest.approx(abs(ratios[0] - ratios[1]) / np.sqrt(2))
    assert "| seed 0 | 4.2500 | 4.3500 | +2.35% |" in result.stdout


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--precisions=fp8"], "--precisions: expected at least two"),
        (["--config.model.hidden_size=40"], "hidden_size: 40 is not possible"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_written(corpus, tmp_path, flags, fragment):
    workdir = tmp_path / "runs"
    result = command(f"--config={corpus.config}", f"--workdir={workdir}", *flags, module=MODULE)
    assert result.returncode == 2
    assert fragment in result.stderr
    assert result.stderr.count("\n") == 1
    assert not workdir.exists()
