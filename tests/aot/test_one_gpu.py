"""The training step of Danube and Danube2, compiled for one H100. Nothing runs: see aot.py."""

import collections

import pytest
from aot_steps import compiled, make_run, needs_compiler

from danube_jax.models.decoder import flops_per_token
from danube_jax.training import hlo_account
from danube_jax.training.hlo_account import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    BF16_MATMUL,
    COPY,
    ELEMENTWISE,
    F32_MATMUL,
    FP8_MATMUL,
    QUANTIZE,
    SMALL,
    UPDATE,
    count,
    weight_gradients,
)
from danube_jax.training.hlo_program import collectives

pytestmark = needs_compiler

GIB = 2**30
TOKENS = 16_384
WHOLE, FEW = 24, 2  # layers: all that the models have, or enough to say what each takes
# Config and context: the window that XLA passes to cuDNN, 0 where no row is longer than it.
WINDOWS = {
    ("danube", 2_048): 0,
    ("danube", 4_096): 0,
    ("danube", 8_192): 4_096,
    ("danube", 16_384): 4_096,
    ("danube2", 8_192): 0,
}
QUICK = [("danube", 2_048), ("danube", 16_384), ("danube2", 8_192)]  # no window, one, another model


def parameter(name, context, layers):
    """A step to compile; the whole models take minutes in all."""
    slow = layers == WHOLE or (name, context) not in QUICK
    marks = [pytest.mark.slow] if slow else []
    return pytest.param((name, context, layers), marks=marks, id=f"{name}-{context}-{layers}")


STEPS = [parameter(*key, layers) for layers in (FEW, WHOLE) for key in WINDOWS]
# What a micro-batch may move in kernels beside matmuls and attention, a token, how many kernels it
# may take, and how many of these may be tiny; and what a step needs beside its state. Each beside
# the layers and for each of them: what it was when this was written and a little more.
BYTES_PER_TOKEN, KERNELS, TINY_KERNELS = (0.45e6, 0.29e6), (62, 41.5), (30, 4.5)
TEMPORARY_GIB = (2.5, 1.395)


def budget(of, layers):
    """What so many layers may take."""
    beside, each = of
    return beside + each * layers


def step_of(key, **changes):
    """The compiled step of a key of `STEPS`."""
    name, context, layers = key
    return compiled(name, context=context, layers=layers, **changes)


def passes(step):
    """The kernels of the first micro-batch, which measures magnitudes, and of the others."""
    return step.account.once(), step.account.micro_step()


@pytest.mark.parametrize("key", STEPS)
def test_every_linear_layer_is_in_fp8_and_nothing_else(key):
    layers = key[2]
    step = step_of(key)
    assert step.account.micro_batches() == step.micro_batches - 1
    for kernels in passes(step):
        # Four linear layers; each forward, backward to the input, backward to the weight.
        assert count(kernels, FP8_MATMUL) == 12 * layers
        assert count(kernels, F32_MATMUL) == 0
        others = [k for k in kernels if k.kind == BF16_MATMUL]
        assert len(others) == 3  # of the head
        for kernel in others:
            arrays = (*kernel.instruction.operands, *kernel.instruction.results)
            assert any(32_000 in shape for _, shape in arrays), kernel.instruction.text


@pytest.mark.parametrize("key", STEPS)
def test_weight_gradients_are_summed_in_float32_in_place(key):
    layers = key[2]
    step = step_of(key)
    sums = weight_gradients(step.account.micro_step())
    assert count(sums, FP8_MATMUL) == 4 * layers
    assert count(sums, BF16_MATMUL) == 1
    assert all(kernel.adds_in_place for kernel in sums)
    in_fp8 = [k for k in step.account.kernels if k.kind == FP8_MATMUL]
    for kernel in in_fp8:  # tensor cores add up with all bits where the sum is longest
        full = '"operand_precision":["HIGHEST","HIGHEST"]' in kernel.instruction.text
        assert full == (kernel.instruction.results[0][0] == "f32")
    # An accumulator that could not be updated in place would be copied in every micro-batch.
    assert count(step.account.micro_step(), COPY) == 0


@pytest.mark.parametrize("key", STEPS)
def test_every_layer_attends_with_one_fused_call_and_its_window(key):
    layers, window = key[2], WINDOWS[key[:2]]
    for kernels in passes(step_of(key)):
        calls = [k for k in kernels if k.kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD)]
        assert collections.Counter(k.kind for k in calls) == {
            ATTENTION_FORWARD: layers,
            ATTENTION_BACKWARD: layers,
        }
        for call in calls:
            text = call.instruction.text.replace(" ", "")
            assert f'"sliding_window_length":{window}' in text
            assert '"mask_type":"CAUSAL"' in text
            assert call.instruction.operands[1][1][2] == 8  # KV heads, not expanded to 32


@pytest.mark.parametrize("key", STEPS)
def test_weights_are_quantised_once_a_step_in_both_layouts(key):
    layers = key[2]
    once, micro = passes(step_of(key))
    shapes = {(2_560, 3_840), (2_560, 2_560), (2_560, 13_824), (6_912, 2_560)}
    shapes |= {shape[::-1] for shape in shapes}

    def quantised(kernels):
        made = (a for k in kernels if k.kind == QUANTIZE for a in k.instruction.results)
        return collections.Counter(shape for dtype, shape in made if dtype == "f8e4m3fn")

    assert not shapes & set(quantised(micro))
    both = sum(number for shape, number in quantised(once).items() if shape in shapes)
    assert both == 2 * 4 * layers


@pytest.mark.parametrize("key", STEPS)
def test_one_device_communicates_with_nobody(key):
    program = step_of(key).account.program
    assert not collectives(program.entry + program.loops)


@pytest.mark.parametrize("key", STEPS)
def test_state_is_updated_in_place(key):
    memory = step_of(key).memory
    assert memory.updated_in_place == memory.state


@pytest.mark.parametrize("key", STEPS)
def test_memory_is_within_budget(key):
    step, layers = step_of(key), key[2]
    assert step.tokens == TOKENS
    # Of 24 layers 35.7 GiB: float32 gradient sums are 6.8 of them, FP8 weights in two layouts 3.1.
    assert step.memory.temporary < budget(TEMPORARY_GIB, layers) * GIB
    assert step.memory.needed < 72 * GIB


@pytest.mark.parametrize("key", STEPS)
def test_traffic_and_kernels_of_a_micro_batch_are_within_budget(key):
    layers = key[2]
    account = step_of(key).account
    kernels = account.micro_step()
    runs = account.micro_batches()
    moved = sum(k.times * k.bytes for k in kernels if k.kind in (QUANTIZE, ELEMENTWISE, UPDATE))
    assert moved / runs / TOKENS < budget(BYTES_PER_TOKEN, layers)
    assert sum(k.times for k in kernels) / runs < budget(KERNELS, layers)
    tiny = sum(k.times for k in kernels if k.kind == SMALL)
    assert tiny / runs < budget(TINY_KERNELS, layers)


def test_bfloat16_sums_gradients_in_float32_in_place_too():
    account = compiled("danube2", context=8_192, layers=FEW, linear="bfloat16").account
    kernels = account.micro_step()
    assert count(kernels, BF16_MATMUL) == 12 * FEW + 3
    assert count(kernels, FP8_MATMUL, F32_MATMUL, COPY) == 0
    sums = weight_gradients(kernels)
    assert len(sums) == 4 * FEW + 1
    assert all(kernel.adds_in_place for kernel in sums)


def test_remat_does_not_run_attention_again():
    step = compiled("danube2", context=8_192, layers=FEW, linear="bfloat16", remat="attention")
    assert count(step.account.micro_step(), ATTENTION_FORWARD) == FEW
    plain = compiled("danube2", context=8_192, layers=FEW, linear="bfloat16")
    assert step.memory.temporary < plain.memory.temporary


def test_account_counts_the_flops_of_the_model():
    step = step_of(("danube", 2_048, FEW))
    kernels = step.account.micro_step()
    matmuls = sum(k.times * k.flops for k in kernels if k.kind in hlo_account.MATMULS)
    attention = sum(
        k.times * k.flops * (1 if k.kind == ATTENTION_FORWARD else 2 / 2.5)
        for k in kernels
        if k.kind in (ATTENTION_FORWARD, ATTENTION_BACKWARD)
    )
    found = (matmuls + attention) / step.account.micro_batches() / TOKENS
    run = make_run("danube", num_hidden_layers=FEW)
    assert found == pytest.approx(flops_per_token(run.model, 2_048), rel=1e-6)
