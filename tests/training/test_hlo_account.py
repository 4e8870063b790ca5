"""The account of a program, of an HLO text written by hand."""

import pytest

from danube_jax.training.hlo_account import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    BF16_MATMUL,
    COLLECTIVE,
    COPY,
    ELEMENTWISE,
    FP8_MATMUL,
    QUANTIZE,
    SMALL,
    UPDATE,
    Account,
    Rates,
    count,
    weight_gradients,
)
from danube_jax.training.hlo_program import Program, collectives, elements, num_bytes

# A step of a loop over 3 micro-batches: 4,096 tokens, 2,560 features, 3,840 outputs, 8 devices.
TEXT = """
HloModule jit_step, is_scheduled=true

%fused_quantize (p0: bf16[4096,2560], p1: f32[]) -> (f8e4m3fn[4096,2560], f8e4m3fn[2560,4096]) {
  %p0 = bf16[4096,2560]{1,0} parameter(0)
  %p1 = f32[] parameter(1)
  %p1b = f32[4096,2560]{1,0} broadcast(%p1), dimensions={}
  %f.1 = f32[4096,2560]{1,0} convert(%p0)
  %m.1 = f32[4096,2560]{1,0} multiply(%f.1, %p1b)
  %c.1 = f8e4m3fn[4096,2560]{1,0} convert(%m.1), metadata={op_name="jit(step)/jvp(f)/convert"}
  %t.1 = f8e4m3fn[2560,4096]{1,0} transpose(%c.1), dimensions={1,0}
  ROOT %tuple.1 = (f8e4m3fn[4096,2560]{1,0}, f8e4m3fn[2560,4096]{1,0}) tuple(%c.1, %t.1)
}

%fused_slice (p2: bf16[8,4096,2560], p3: s32[]) -> bf16[4096,2560] {
  %p2 = bf16[8,4096,2560]{2,1,0} parameter(0)
  %p3 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ds = bf16[1,4096,2560]{2,1,0} dynamic-slice(%p2, %p3, %zero, %zero), dynamic_slice_sizes={1,4096,2560}
  ROOT %b = bf16[4096,2560]{1,0} bitcast(%ds)
}

%fused_put (p4: bf16[8,4096,2560], p5: bf16[1,4096,2560], p6: s32[]) -> bf16[8,4096,2560] {
  %p4 = bf16[8,4096,2560]{2,1,0} parameter(0)
  %p5 = bf16[1,4096,2560]{2,1,0} parameter(1)
  %p6 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dus = bf16[8,4096,2560]{2,1,0} dynamic-update-slice(%p4, %p5, %p6, %zero.1, %zero.1), metadata={op_name="jit(step)/jvp(f)/put"}
}

%fused_adam (p7: f32[2560,3840], p8: f32[2560,3840]) -> f32[2560,3840] {
  %p7 = f32[2560,3840]{1,0} parameter(0)
  %p8 = f32[2560,3840]{1,0} parameter(1)
  ROOT %s = f32[2560,3840]{1,0} subtract(%p7, %p8), metadata={op_name="jit(step)/sub"}
}

%body (state: (s32[], f32[2560,3840], bf16[8,4096,2560])) -> (s32[], f32[2560,3840], bf16[8,4096,2560]) {
  %state = (s32[], f32[2560,3840]{1,0}, bf16[8,4096,2560]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %acc = f32[2560,3840]{1,0} get-tuple-element(%state), index=1
  %xs = bf16[8,4096,2560]{2,1,0} get-tuple-element(%state), index=2
  %scale = f32[] constant(1)
  %w = f8e4m3fn[3840,2560]{1,0} constant({...})
  %x = bf16[4096,2560]{1,0} fusion(%xs, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(step)/jvp(f)/slice"}
  %q = (f8e4m3fn[4096,2560]{1,0}, f8e4m3fn[2560,4096]{1,0}) fusion(%x, %scale), kind=kInput, calls=%fused_quantize, metadata={op_name="jit(step)/jvp(f)/convert"}
  %q.0 = f8e4m3fn[4096,2560]{1,0} get-tuple-element(%q), index=0
  %q.1 = f8e4m3fn[2560,4096]{1,0} get-tuple-element(%q), index=1
  %y = (bf16[4096,3840]{1,0}, s8[4194304]{0}) custom-call(%q.0, %w, %scale, %scale), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %y.0 = bf16[4096,3840]{1,0} get-tuple-element(%y), index=0
  %y4 = bf16[2,2048,48,80]{3,2,1,0} bitcast(%y.0)
  %a = (bf16[2,32,2048,80]{3,1,2,0}, f32[2,32,2048]{2,1,0}, u8[0]{0}) custom-call(%y4, %y4, %y4), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "32", "2048", "2048"]}, "mask_type": "CAUSAL", "sliding_window_length": 512}}
  %dq = (bf16[2,32,2048,80]{3,1,2,0}, u8[0]{0}) custom-call(%y4, %y4), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["2", "32", "2048", "2048"]}, "mask_type": "CAUSAL", "sliding_window_length": 0}}
  %dw = (f32[2560,3840]{1,0}, s8[4194304]{0}) custom-call(%q.1, %w, %acc, %scale), custom_call_target="__cublas$lt$matmul$f8", output_to_operand_aliasing={{0}: (2, {})}, backend_config={"gemm_backend_config":{"beta":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %dw.0 = f32[2560,3840]{1,0} get-tuple-element(%dw), index=0
  %x3 = bf16[1,4096,2560]{2,1,0} bitcast(%x)
  %ys = bf16[8,4096,2560]{2,1,0} fusion(%xs, %x3, %i), kind=kCustom, calls=%fused_put, metadata={op_name="jit(step)/jvp(f)/put"}
  ROOT %next = (s32[], f32[2560,3840]{1,0}, bf16[8,4096,2560]{2,1,0}) tuple(%i, %dw.0, %ys)
}

%condition (state.1: (s32[], f32[2560,3840], bf16[8,4096,2560])) -> pred[] {
  %state.1 = (s32[], f32[2560,3840]{1,0}, bf16[8,4096,2560]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (w32: f32[2560,3840], xs.1: bf16[8,4096,2560]) -> f32[2560,3840] {
  %w32 = f32[2560,3840]{1,0} parameter(0)
  %xs.1 = bf16[8,4096,2560]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %copy.1 = f32[2560,3840]{1,0} copy(%w32)
  %init = (s32[], f32[2560,3840]{1,0}, bf16[8,4096,2560]{2,1,0}) tuple(%start, %copy.1, %xs.1)
  %while.1 = (s32[], f32[2560,3840]{1,0}, bf16[8,4096,2560]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[2560,3840]{1,0} get-tuple-element(%while.1), index=1
  %rs = ((f32[2560,3840]{1,0}), f32[320,3840]{1,0}) reduce-scatter-start(%g), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %copy.2 = f32[2560,3840]{1,0} copy(%w32)
  %rs.1 = f32[320,3840]{1,0} reduce-scatter-done(%rs)
  %shard = u8[320,3840]{1,0} constant({...})
  %ag = (u8[320,3840]{1,0}, u8[2560,3840]{1,0}) all-gather-start(%shard), channel_id=2, replica_groups=[2,16]<=[32], dimensions={0}
  %ag.1 = u8[2560,3840]{1,0} all-gather-done(%ag)
  ROOT %new = f32[2560,3840]{1,0} fusion(%w32, %g), kind=kLoop, calls=%fused_adam
}
"""  # noqa: E501
TOKENS, INPUTS, OUTPUTS = 4_096, 2_560, 3_840
FLOPS = 2 * TOKENS * INPUTS * OUTPUTS


@pytest.fixture(scope="module")
def account():
    return Account(TEXT)


def kernel(account, name):
    """The kernel of this instruction."""
    return next(k for k in account.kernels if k.instruction.name == name)


def test_kernels_run_as_often_as_their_loop(account):
    assert account.micro_loop == "while.1"
    assert account.micro_batches() == 3
    names = [k.instruction.name for k in account.micro_step()]
    assert names == ["lt", "x", "q", "y", "a", "dq", "dw", "ys"]
    assert [k.instruction.name for k in account.once()] == ["copy.1", "rs", "copy.2", "ag", "new"]
    assert {k.times for k in account.micro_step()} == {3}


def test_kinds(account):
    kinds = {k.instruction.name: k.kind for k in account.kernels}
    assert kinds == {
        "lt": SMALL,
        "x": ELEMENTWISE,
        "q": QUANTIZE,
        "y": FP8_MATMUL,
        "a": ATTENTION_FORWARD,
        "dq": ATTENTION_BACKWARD,
        "dw": FP8_MATMUL,
        "ys": ELEMENTWISE,
        "copy.1": COPY,
        "copy.2": COPY,
        "rs": COLLECTIVE,
        "ag": COLLECTIVE,
        "new": UPDATE,
    }
    assert count(account.kernels, FP8_MATMUL, COPY) == 4
    assert count(account.kernels, BF16_MATMUL) == 0


def test_flops(account):
    assert kernel(account, "y").flops == FLOPS
    assert kernel(account, "dw").flops == FLOPS
    # Mean number of keys: T / 2 without a window, W - W^2 / (2 T) with one.
    scores = 2 * 32 * 2_048 * 4 * 80
    assert kernel(account, "a").flops == scores * (512 - 512**2 / (2 * 2_048))
    assert kernel(account, "dq").flops == 2.5 * scores * 2_048 / 2


def test_bytes(account):
    x = TOKENS * INPUTS * 2
    quantize = kernel(account, "q")
    assert (quantize.bytes_read, quantize.bytes_written) == (x + 4, x)  # 2 x 1 byte
    # Only the slice that is taken, or replaced, counts.
    assert (kernel(account, "x").bytes_read, kernel(account, "x").bytes_written) == (x + 4, x)
    assert (kernel(account, "ys").bytes_read, kernel(account, "ys").bytes_written) == (x + 4, x)
    w = INPUTS * OUTPUTS
    dw = kernel(account, "dw")
    assert (dw.bytes_read, dw.bytes_written) == (TOKENS * INPUTS + w + 4 * w + 4, 4 * w)


def test_collectives(account):
    scatter, gather = kernel(account, "rs"), kernel(account, "ag")
    assert (scatter.devices, gather.devices) == (8, 16)
    w = INPUTS * OUTPUTS
    assert scatter.bytes_read == 4 * w * 7 / 8  # its own shards of the other seven
    assert gather.bytes_read == w // 8 * 15  # a ring hands on all shards but one
    rates = Rates(link_gbps=100.0, network_gbps=5.0, kernel_us=0.0)
    assert scatter.seconds(rates) == pytest.approx(scatter.bytes_read / 100e9)
    assert gather.seconds(rates) == pytest.approx(gather.bytes_read / 40e9)


def test_weight_gradients_are_what_is_added_in_place(account):
    (gradient,) = weight_gradients(account.kernels)
    assert gradient.instruction.name == "dw"
    assert gradient.adds_in_place
    assert not kernel(account, "y").adds_in_place


def test_time_is_a_roofline(account):
    fast = Rates(fp8_tflops=1.0, memory_gbps=1e9, kernel_us=0.0)
    assert kernel(account, "y").seconds(fast) == pytest.approx(FLOPS / 1e12)
    slow = Rates(fp8_tflops=1e9, memory_gbps=1.0, kernel_us=0.0)
    assert kernel(account, "y").seconds(slow) == pytest.approx(kernel(account, "y").bytes / 1e9)
    assert kernel(account, "lt").seconds(Rates(kernel_us=5.0)) == 5e-6

    rates = Rates()
    totals = account.totals(rates)
    assert sum(t.seconds for t in totals) == pytest.approx(account.seconds(rates))
    fp8 = next(t for t in totals if t.kind == FP8_MATMUL)
    assert (fp8.kernels, fp8.runs, fp8.flops) == (2, 6, 6 * FLOPS)


def test_what_runs_beside_a_collective_hides_it(account):
    rates = Rates(link_gbps=100.0, network_gbps=5.0, kernel_us=0.0)
    scatter, gather, copy = (kernel(account, name) for name in ("rs", "ag", "copy.2"))
    hidden = copy.seconds(rates)
    assert 0 < hidden < scatter.seconds(rates)
    exposed = scatter.seconds(rates) - hidden + gather.seconds(rates)
    assert account.exposed_seconds(rates) == pytest.approx(exposed)


def test_program_tells_loops_from_the_rest():
    program = Program(TEXT)
    assert "dw" in {x.name for x in program.loops}
    assert "c.1" in {x.name for x in program.loops}  # inside a fusion that the loop calls
    assert {"copy.1", "s"} <= {x.name for x in program.entry}
    assert not collectives(program.loops)
    assert [x.name for x in collectives(program.entry)] == ["rs", "ag"]
    assert [x.name for x in collectives(program.entry, "all-gather")] == ["ag"]


def test_sizes():
    arrays = (("bf16", (2, 3)), ("f8e4m3fn", (4,)), ("pred", ()), ("f32", (0, 5)))
    assert elements(arrays) == 11
    assert num_bytes(arrays) == 12 + 4 + 1


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule empty")
