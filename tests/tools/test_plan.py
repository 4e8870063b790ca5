"""The plan of a run: exact counts through the command line, warnings, memory."""

import dataclasses
import json
import os

import pytest
from helpers import ROOT, command
from test_config import load

from danube_jax.config import parse_config
from danube_jax.errors import UserError
from danube_jax.training.plan import activation_bytes, make_plan, parameters_by_part

NO_STORES = {"web": None, "instruct": None, "curated": None}


# Read by Python at its start: hides the compiler for H100s where it is installed.
WITHOUT_COMPILER = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "jax_cuda13_plugin":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""


def test_danube2_from_the_command_line(tmp_path):
    output = tmp_path / "plan.json"
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_COMPILER)
    result = command(
        "--config=configs/danube2.py",
        f"--json={output}",
        module="tools/plan.py",
        environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert result.returncode == 0, result.stderr
    assert "compiling for H100 needs `pip install -e '.[aot]'`" in result.stdout
    assert "days at the Danube report's rate" in result.stdout
    for text in ("stage1", "stage2", "stage3", "1,000,000,585,728", "950,000,025,600"):
        assert text in result.stdout
    assert "50,000,560,128" in result.stdout
    assert "1,831,201,280 parameters" in result.stdout
    assert "source 'web' has no token store yet" in result.stdout
    plan = json.loads(output.read_text())
    assert plan["checkpoint_bytes"] == 12 * 1_831_201_280
    assert [phase["steps"] for phase in plan["phases"]] == [847_711, 805_325, 42_386]
    assert [phase["micro_batches"] for phase in plan["phases"]] == [9, 9, 9]
    assert plan["phases"][0]["flops_per_token"] == pytest.approx(13.51e9, rel=1e-3)
    # 412 TFLOP/s on each of 8 GPUs at 13.51 GFLOP a token
    assert plan["days"] == pytest.approx(2e12 / (8 * 412e12 / 13.51e9) / 86_400, rel=1e-3)
    web = next(source for source in plan["sources"] if source["name"] == "web")
    assert web["tokens_read"] == pytest.approx(0.845e12 + 0.728 * 0.95e12 + 0.555e12 / 20, rel=1e-4)


def test_bad_input_is_one_line():
    for arguments in (
        ("--target=tpu",),
        ("--devices=0",),
        ("--tokens_per_second=-1",),
        ("--fp8_tflops=0",),
    ):
        result = command("--config=configs/danube2.py", *arguments, module="tools/plan.py")
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_parameters_of_danube_by_part():
    parts = parameters_by_part(parse_config(load("danube")))
    assert parts["embedding"] == parts["head"] == 81_920_000
    assert parts["attention"] + parts["mlp"] == 1_667_235_840
    assert sum(parts.values()) == 1_831_201_280


def test_memory_follows_sharding_and_warns_where_it_does_not_fit():
    run = parse_config(load("danube3_4b"))
    count = 3_961_839_360
    on_eight = make_plan(run, devices=8, target="h100", available=NO_STORES)
    assert on_eight.memory["master parameters (float32)"] == 4 * count // 8
    assert on_eight.memory["AdamW moments (float32)"] == count
    assert on_eight.memory["weights (bfloat16)"] == 2 * count
    assert not [w for w in on_eight.warnings if "will not fit" in w]
    on_one = make_plan(run, devices=1, target="h100", available=NO_STORES)
    assert on_one.memory["AdamW moments (float32)"] == 8 * count
    assert [w for w in on_one.warnings if "will not fit" in w]


def test_remat_saves_activations():
    run = parse_config(load("danube3_500m"))
    sizes = {
        remat: activation_bytes(
            dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat)), 4 * 2_048
        )
        for remat in ("none", "attention", "dots", "full")
    }
    assert sizes["full"] < sizes["dots"] <= sizes["attention"] < sizes["none"]
    # with 'full', what a layer keeps is its input: bf16 [rows, context, hidden] for 16 layers
    inputs = 16 * 4 * 2_048 * 1_536 * 2
    assert inputs < sizes["full"] < 6 * inputs


def test_learning_rates_epochs_and_indivisible_batches():
    run = parse_config(load("danube2"))
    tokens = {"web": 2 * 10**12, "instruct": 10**9, "curated": 10**12}
    plan = make_plan(run, devices=7, target="h100", available=tokens, tokens_per_second=1e6)
    assert plan.phases[0].first_learning_rate == pytest.approx(2e-4 / 2_000, rel=1e-3)
    assert plan.phases[2].last_learning_rate == pytest.approx(1e-5, rel=1e-3)
    assert plan.days == pytest.approx(2e12 / 1e6 / 86_400, rel=1e-5)
    web = next(source for source in plan.sources if source.name == "web")
    assert web.epochs == pytest.approx(web.tokens_read / 2e12)
    assert [w for w in plan.warnings if "instruct" in w and "epochs" in w]
    assert [w for w in plan.warnings if "cannot be split over 7 devices" in w]


def test_unknown_target_is_refused():
    with pytest.raises(UserError, match=r"--target=tpu: expected one of h100"):
        make_plan(parse_config(load("danube2")), devices=8, target="tpu", available=NO_STORES)
