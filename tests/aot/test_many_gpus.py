"""The training step of Danube2, compiled for one and for two hosts of eight H100s."""

import collections

import pytest
from aot_steps import compiled, needs_compiler

from danube_jax.training.hlo_account import COLLECTIVE, COPY, FP8_MATMUL, Rates, count
from danube_jax.training.hlo_program import collectives, elements

pytestmark = needs_compiler

WHOLE, FEW = 24, 2  # layers
MICROBATCH_TOKENS = {8: 16_384, 16: 24_576}  # by devices; the batch divides by both
EIGHT, SIXTEEN = (
    [(devices, FEW), pytest.param((devices, WHOLE), marks=pytest.mark.slow)] for devices in (8, 16)
)
STEPS = EIGHT + SIXTEEN

GIB = 2**30


def step_of(key):
    """The step in FP8 for some devices and layers."""
    devices, layers = key
    tokens = MICROBATCH_TOKENS[devices]
    return compiled(
        "danube2", context=8_192, devices=devices, layers=layers, microbatch_tokens=tokens
    )


def matrices(layers):
    """Shapes of the parameters that are matrices, and how many there are of each."""
    blocks = [(2_560, 3_840), (2_560, 2_560), (2_560, 13_824), (6_912, 2_560)]
    ends = [(32_000, 2_560), (2_560, 32_000)]
    return collections.Counter(blocks * layers + ends)


def gathered(program):
    """The results of all gathers."""
    # The result of an asynchronous gather lists its operands first.
    gathers = collectives(program.entry, "all-gather")
    return [array for x in gathers for array in x.results if array not in x.operands]


@pytest.mark.parametrize("key", STEPS)
def test_micro_batches_communicate_with_nobody(key):
    step, layers = step_of(key), key[1]
    assert step.account.micro_batches() == step.micro_batches - 1 > 0
    assert not collectives(step.account.program.loops)
    assert count(step.account.micro_step(), FP8_MATMUL) == 12 * layers
    assert count(step.account.micro_step(), COLLECTIVE, COPY) == 0


@pytest.mark.parametrize("key", STEPS)
def test_fp8_weights_are_gathered_as_bytes_and_gradients_scattered_once_a_step(key):
    step, layers = step_of(key), key[1]
    program = step.account.program
    arrays = gathered(program)
    assert collections.Counter(shape for _, shape in arrays) == matrices(layers)
    # Embedding and head stay in bfloat16.
    assert collections.Counter(dtype for dtype, _ in arrays) == {"u8": 4 * layers, "bf16": 2}

    scatters = collectives(program.entry, "reduce-scatter")
    scattered = [array for x in scatters for array in x.operands]
    assert collections.Counter(shape for _, shape in scattered) == matrices(layers)
    assert {dtype for dtype, _ in scattered} == {"f32"}

    reduces = collectives(program.entry, "all-reduce")
    # Gradients of the norm scales; beside them magnitudes and norms of matrices, and metrics.
    vectors, scalars = (2 * layers + 1) * 2_560, 5 * matrices(layers).total()
    reduced = elements(array for x in reduces for array in x.operands)
    assert vectors <= reduced <= vectors + scalars
    others = len(collectives(program.entry)) - len(scatters) - len(reduces)
    assert others == len(collectives(program.entry, "all-gather"))


@pytest.mark.parametrize("key", EIGHT + SIXTEEN[1:])
def test_collectives_take_a_fiftieth_of_a_step_at_most(key):
    step = step_of(key)
    totals = step.account.totals(Rates())
    communication = sum(total.seconds for total in totals if total.kind == COLLECTIVE)
    assert 0 < communication < 0.02 * sum(total.seconds for total in totals)


@pytest.mark.parametrize("key", STEPS)
def test_state_is_sharded_and_updated_in_place(key):
    devices, layers = key
    memory = step_of(key).memory
    assert memory.updated_in_place == memory.state
    parameters = 69_473_280 * layers + 2 * 81_920_000
    assert memory.state == pytest.approx(12 * parameters / devices, rel=2e-3)


@pytest.mark.parametrize("key", EIGHT)
def test_memory_is_within_budget(key):
    memory = step_of(key).memory
    # The scheduler that hides communication must not keep what magnitudes are taken of.
    assert memory.temporary < (2.8 + 1.55 * key[1]) * GIB  # 40 GiB in all
    assert memory.needed < 72 * GIB


def test_bfloat16_weights_are_gathered_and_gradients_scattered_once_a_step():
    step = compiled("danube2", context=8_192, devices=8, layers=FEW, linear="bfloat16")
    program = step.account.program
    assert not collectives(program.loops)
    arrays = gathered(program)
    assert collections.Counter(shape for _, shape in arrays) == matrices(FEW)
    assert {dtype for dtype, _ in arrays} == {"bf16"}
    scatters = collectives(program.entry, "reduce-scatter")
    scattered = [array for x in scatters for array in x.operands]
    assert collections.Counter(shape for _, shape in scattered) == matrices(FEW)
    assert {dtype for dtype, _ in scattered} == {"f32"}
