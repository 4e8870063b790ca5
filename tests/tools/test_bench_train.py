"""The benchmark of the train step: what it measures, sums up and refuses."""

import importlib
import json
import os
import sys

import pytest
from helpers import ROOT, command

MODULE = "tools/bench_train.py"
TINY = ["--model=tiny", "--layers=1", "--steps=1", "--repeats=1"]


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of tools/ by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    return importlib.import_module


def run(tmp_path, *flags):
    """The report of a call that must succeed, and what it printed."""
    output = tmp_path / "bench.json"
    result = command(*TINY, *flags, f"--json={output}", module=MODULE)
    assert result.returncode == 0, result.stderr
    return json.loads(output.read_text()), result.stdout


def test_ours_and_the_peer_take_turns(tmp_path):
    report, _ = run(tmp_path, "--batch=2", "--context=16,32")
    assert report["parameters"] == 2 * 512 * 64 + 3 * 64 * 192 + 3 * 64 * 64 + 2 * 64 + 64
    ours, *others = [row for row in report["results"] if row["context"] == 32]
    assert ours["candidate"] == "danube_jax"
    assert len(report["results"]) == 2 * (1 + len(others))
    assert ours["tokens_per_second"] == pytest.approx(2 * 32 / (ours["ms_per_step"] / 1e3))
    # 6 a matmul parameter; attention 12 * width * 16 keys.
    flops = 6 * (512 * 64 + 3 * 64 * 192 + 3 * 64 * 64) + 12 * 64 * 16
    assert ours["gflops_per_token"] == pytest.approx(flops / 1e9)
    if "torch" in report["versions"]:
        peer = others[0]["tokens_per_second"]
        assert ours["speed_over_pytorch"] == pytest.approx(ours["tokens_per_second"] / peer)


def test_precisions_in_one_call_with_accumulation_and_traces(tmp_path):
    report, printed = run(
        tmp_path,
        "--precision=bfloat16,fp8",
        "--context=16",
        "--batch_tokens=128",
        "--microbatch_tokens=64",
        "--peer=none",
        f"--profile={tmp_path / 'traces'}",
    )
    assert [row["precision"] for row in report["results"]] == ["bfloat16", "fp8"]
    for row in report["results"]:
        assert (row["accumulation"], row["rows"]) == (2, 4)
        assert row["tokens_per_second"] == pytest.approx(128 / (row["ms_per_step"] / 1e3))
        trace = tmp_path / "traces" / f"{row['precision']}-16"
        assert row["profile"]["trace"] == str(trace)
        assert list(trace.glob("plugins/profile/*/*.xplane.pb"))
        launches = {kind["name"]: kind["launches"] for kind in row["profile"]["classes"]}
        # Three matmuls of each of four linear layers, in each of two micro-batches.
        assert launches.get("matmul", 0) + launches.get("FP8 matmul", 0) >= 2 * 3 * 4
        assert 0 < row["profile"]["busy_seconds"] <= row["profile"]["seconds"]
    assert printed.count("kernels of a step") == 2


def test_every_case_can_have_a_process_of_its_own(tmp_path):
    pytest.importorskip("torch")
    report, printed = run(
        tmp_path, "--batch=1", "--context=16", "--isolate", "--peer_attention=nothing"
    )
    ours, peer = report["results"]
    assert ours["tokens_per_second"] > 0
    assert ours["peak_memory_bytes"] > 2**20
    assert "speed_over_pytorch" not in ours
    assert peer["error"].startswith("--peer_attention=nothing")
    assert peer["error"] in printed


def test_roofline_has_all_matmuls_of_a_layer_in_both_modes(tmp_path):
    report, printed = run(
        tmp_path,
        "--roofline",
        "--precision=bfloat16,fp8",
        "--context=16,32",
        "--microbatch_tokens=32",
        "--sliding_window=24",
    )
    rows = report["matmuls"]
    assert len(rows) == 4 * 3 * 2 * 2
    assert (
        len({(r["layer"], r["kind"], r["precision"], r["fast_accumulation"]) for r in rows}) == 48
    )
    shapes = {row["layer"]: row["shape"] for row in rows}
    assert shapes == {
        "qkv_proj": [32, 64, 128],
        "o_proj": [32, 64, 64],
        "gate_up_proj": [32, 64, 384],
        "down_proj": [32, 192, 64],
    }
    row = rows[0]
    assert row["tflops"] == pytest.approx(2 * 32 * 64 * 128 / row["microseconds"] / 1e6)
    windows = [(row["context"], row["window"], row["rows"]) for row in report["attention"]]
    assert windows == [(16, None, 2), (32, None, 1), (32, 24, 1)]
    assert {"fp8_tflops", "bf16_tflops", "memory_gbps"} <= report["rates"].keys()
    assert "as tools/plan.py takes them: --fp8_tflops=" in printed


def test_roofline_matmuls_compute_what_the_layer_does(tool):
    import jax.numpy as jnp
    import numpy as np

    roofline = tool("bench_roofline")
    one, sizes, tokens = jnp.float32(1), (32, 48), 64
    for precision in ("float32", "fp8"):
        for kind in roofline.KINDS:
            left, right = roofline.operands(kind, precision, tokens, sizes)
            a, b = (np.asarray(x).astype(np.float64) for x in (left, right))
            if precision == "fp8":  # the contracted dimension is the last one of both
                expected = a @ b.T
            elif kind == "output":
                expected = a @ b
            else:
                expected = a @ b.T if kind == "input gradient" else a.T @ b
            step = roofline.matmul(kind, precision, fast=True)
            total = [jnp.ones(sizes)] if kind == "weight gradient" else []
            found = np.asarray(step(*total, left, right, one)).astype(np.float64) - len(total)
            shape = {"output": (64, 48), "input gradient": (64, 32)}.get(kind, sizes)
            assert found.shape == shape
            # float32 sums, or one rounding to bfloat16.
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found / scale, expected / scale, atol=2**-8)


HLO = """HloModule jit_train_step, entry_computation_layout={()->f32[]}

%fused_dot (p.0: f8e4m3fn[64,64], p.1: f8e5m2[64,64]) -> f32[64,64] {
  %p.0 = f8e4m3fn[64,64]{1,0} parameter(0)
  %p.1 = f8e5m2[64,64]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,64]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}
}

%body (t: (f32[64])) -> (f32[64]) {
  %fusion.7 = bf16[64]{0} fusion(%t), kind=kLoop, calls=%fused_add
  %triton.1 = f32[64,64]{1,0} fusion(%t), kind=kCustom, calls=%fused_dot
  %cublas.1 = (bf16[64,64]{1,0}) custom-call(%t), custom_call_target="__cublas$lt$matmul$f8"
  %cublas.2 = (bf16[64,64]{1,0}) custom-call(%t), custom_call_target="__cublas$lt$matmul"
  %cudnn.1 = (bf16[64,64]{1,0}) custom-call(%t), custom_call_target="__cudnn$fmhaSoftmaxBackward"
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %while.2 = (f32[64]) while(%tuple), condition=%cond, body=%body
  %copy-start.3 = f32[64]{0} copy-start(%x)
  %all-gather-start.1 = f32[64]{0} all-gather-start(%x), dimensions={0}
  ROOT %reduce.4 = f32[64]{0} reduce(%x), dimensions={0}, to_apply=%add
}
"""


def test_instructions_have_classes(tool):
    classes = tool("bench_profile").instruction_classes(HLO)
    expected = {
        "fusion.7": "elementwise",
        "triton.1": "FP8 matmul",
        "cublas.1": "FP8 matmul",
        "cublas.2": "matmul",
        "cudnn.1": "attention",
        "while.2": None,
        "copy-start.3": "copy",
        "all-gather-start.1": "collective",
        "reduce.4": "elementwise",
    }
    assert {name: classes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x128", "FP8 matmul"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("loop_convert_fusion_12", "elementwise"),
        ("MemcpyD2D", "copy"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "collective"),
        ("unheard_of", "other"),
    ],
)
def test_kernels_without_an_instruction_go_by_name(tool, kernel, kind):
    assert tool("bench_profile").class_of_name(kernel) == kind


def test_kernels_are_summed_up_once_where_they_overlap(tool):
    profile = tool("bench_profile")

    Event = profile.KernelEvent
    events = [
        Event("while.2", "while.2", 0.0, 9.0),  # its body's events are there, too
        Event("a", "cublas.1", 0.0, 2.0),
        Event("a", "cublas.1", 4.0, 2.0),
        Event("b", "fusion.7", 1.0, 2.0),
        Event("nvjet_tst", "", 7.0, 1.0),
    ]
    result = profile.sum_up(events, profile.instruction_classes(HLO), seconds=5.0, steps=2)
    found = [(kind.name, kind.seconds, kind.launches) for kind in result.classes]
    assert found == [("FP8 matmul", 2.0, 1.0), ("elementwise", 1.0, 0.5), ("matmul", 0.5, 0.5)]
    assert result.busy_seconds == pytest.approx((3 + 2 + 1) / 2)
    assert result.largest[0] == ("a", "FP8 matmul", 2.0, 1.0)


TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "nvjet_qqtst_64x32" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines {
    name: "Stream #13(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000 }
    events {
      metadata_id: 2 offset_ps: 3000000 duration_ps: 1000000
      stats { metadata_id: 1 str_value: "add.1" }
    }
  }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 9000000 } }
}
planes { name: "/device:GPU:1" lines { name: "Stream #13(Compute)" events { metadata_id: 1 } } }
planes { name: "/host:CPU" }
"""


def test_a_gpus_trace_is_read_from_its_streams(tool):
    from jax.profiler import ProfileData

    profile = tool("bench_profile")
    events = list(profile.kernel_events(ProfileData.from_text_proto(TRACE)))
    assert [(e.name, e.instruction) for e in events] == [
        ("nvjet_qqtst_64x32", ""),
        ("loop_add_fusion", "add.1"),
    ]
    assert [e.seconds for e in events] == pytest.approx([2e-6, 1e-6])
    assert events[1].start - events[0].start == pytest.approx(3e-6)


GPU_HLO = """HloModule jit_step, entry_computation_layout={()->f32[2048,1024]}

ENTRY %main (x: f8e4m3fn[2048,4096], w: f8e4m3fn[1024,4096]) -> bf16[2048,1024] {
  %x = f8e4m3fn[2048,4096]{1,0} parameter(0)
  %w = f8e4m3fn[1024,4096]{1,0} parameter(1)
  ROOT %cublas.5 = bf16[2048,1024]{1,0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
}
"""  # noqa: E501


def test_the_static_account_names_classes_and_estimates_time(tool, monkeypatch):
    pytest.importorskip("danube_jax.training.hlo_account")
    profile = tool("bench_profile")
    assert profile.static_account(GPU_HLO) is None  # this process has a CPU
    monkeypatch.setattr(profile.jax, "default_backend", lambda: "gpu")
    kinds, estimate = profile.static_account(GPU_HLO)
    assert kinds == {"cublas.5": "FP8 matmul"}
    seconds = 2 * 2048 * 4096 * 1024 / 1_250e12  # at the assumed rate
    assert estimate == {"FP8 matmul": pytest.approx(seconds)}


REFUSED = {  # flags → a part of the one line
    ("--batch=0",): "--batch=0",
    ("--precision=fp8,int4",): "--precision=int4: expected one of float32, bfloat16, fp8",
    ("--context=512,one",): "--context=one",
    ("--context=48", "--batch_tokens=64"): "--batch_tokens=64: expected a whole number",
    (
        "--context=16",
        "--batch_tokens=96",
        "--microbatch_tokens=64",
    ): "--microbatch_tokens=64: expected whole sequences",
    (
        "--precision=fp8",
        "--intermediate_size=200",
    ): "intermediate_size 200 is not possible; FP8 matmuls need multiples of 16",
    ("--fp8_fast_accumulation=yes",): "--fp8_fast_accumulation=yes",
    ("--attention_backend=cudnn", "--peer=none"): "'cudnn' needs an NVIDIA GPU",
}
IN_ONE_PROCESS = """
import json, sys
from absl.testing import flagsaver
import bench_train
from danube_jax.errors import UserError
for flags in json.loads(sys.argv[1]):
    with flagsaver.flagsaver():
        try:
            bench_train.main(["bench_train.py", *flags])
        except UserError as error:
            print(f"refused: {error}")
"""


def test_what_cannot_be_is_refused(tmp_path):
    script = tmp_path / "refuse.py"
    script.write_text(IN_ONE_PROCESS)
    result = command(
        json.dumps([[*TINY, *flags] for flags in REFUSED]),
        module=str(script),
        environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(REFUSED)
    for line, fragment in zip(lines, REFUSED.values(), strict=True):
        assert line.startswith("refused: ")
        assert fragment in line
