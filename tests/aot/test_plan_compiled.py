"""The plan of a run from steps compiled for H100s, through the command line and beside it."""

import json

import pytest
from aot_steps import make_run, needs_compiler
from helpers import command

from danube_jax.data.phases import PhaseSchedule
from danube_jax.training import aot
from danube_jax.training.compiled_plan import largest_microbatch, plan_compiled
from danube_jax.training.hlo_account import ATTENTION_FORWARD, FP8_MATMUL, Rates

pytestmark = needs_compiler

LAYERS, DEVICES = 1, 8
FEW_LAYERS = f"--config.model.num_hidden_layers={LAYERS}"


def test_plan_from_the_command_line(tmp_path):
    output = tmp_path / "plan.json"
    result = command(
        "--config=configs/danube2.py",
        "--config.precision.linear=fp8",
        FEW_LAYERS,
        "--target=h100",
        f"--devices={DEVICES}",
        "--memory_gbps=2000",
        f"--json={output}",
        module="tools/plan.py",
        environment={"JAX_PLATFORMS": ""},  # as where a user has set nothing
    )
    assert result.returncode == 0, result.stderr
    assert "compiling the step of context 8,192 (1 of 1)" in result.stderr
    assert "FP8 quantisation" in result.stdout
    assert "--memory_gbps=2000" in result.stdout
    assert "at the static roofline's rate" in result.stdout

    plan = json.loads(output.read_text())
    assert plan["rates"]["memory_gbps"] == 2_000
    (step,) = plan["compiled"]
    assert step["phases"] == ["stage1", "stage2", "stage3"]
    assert (step["context_length"], step["microbatch_tokens"]) == (8_192, 16_384)
    counts = step["counts"]
    assert counts["fp8_matmuls"] == 12 * LAYERS
    # The head: three for each of two chunks of the loss.
    assert counts["bfloat16_matmuls"] == 6
    assert counts["attention_forward"] == counts["attention_backward"] == LAYERS
    assert counts["collectives"] == 0
    totals = {total["kind"]: total for total in step["kernels"]}
    assert totals[FP8_MATMUL]["runs"] == 9 * 12 * LAYERS
    assert totals[ATTENTION_FORWARD]["runs"] == 9 * LAYERS
    assert sum(total["seconds"] for total in totals.values()) == pytest.approx(step["step_seconds"])
    # 1,179,648 tokens a step; the run's time follows from its rate.
    assert step["tokens_per_second"] == pytest.approx(1_179_648 / step["step_seconds"])
    assert plan["days"] == pytest.approx(2e12 / step["tokens_per_second"] / 86_400, rel=1e-3)
    assert step["fits"]
    assert step["largest_microbatch_tokens"] == 144 // DEVICES * 8_192  # the whole batch at once


@pytest.mark.slow
def test_memory_grows_as_planned():
    run = make_run("danube2", num_hidden_layers=LAYERS)
    limit, lines = 12 * 10**9, []
    (step,) = plan_compiled(
        run, devices=1, rates=Rates(), memory_limit=limit, progress=lines.append
    )
    assert len(lines) == 2
    assert step.fits
    phase = PhaseSchedule.from_config(run).phases[0]
    larger = largest_microbatch(phase, 1, step.largest_microbatch_tokens * 3)
    needed = [
        aot.compile_phase(run, phase, 1, tokens).memory.needed
        for tokens in (step.largest_microbatch_tokens, larger)
    ]
    # Buffers share memory a little differently at each size.
    assert needed[0] < 1.02 * limit
    assert needed[1] > 0.98 * limit


def test_largest_micro_batch_divides_the_batch():
    phase = PhaseSchedule.from_config(make_run("danube2")).phases[0]
    assert phase.sequences == 144
    assert largest_microbatch(phase, 8, 8_191) is None
    assert largest_microbatch(phase, 8, 8_192 * 5.9) == 8_192 * 3  # of 18 sequences a device
    assert largest_microbatch(phase, 8, 1e9) == 8_192 * 18
