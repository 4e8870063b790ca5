"""The training step of Danube2, compiled for one and for two hosts of eight H100s."""

import collections

import pytest
from aot_steps import compiled, needs_compiler

from danube_jax.training.hlo_account import COLLECTIVE, COPY, FP8_MATMUL, Rates, count
from danube_jax.training.hlo_program import collectives, elements

pytestmark = needs_compiler

LAYERS, FEW = 24, 2
HOSTS = {8: 16_384, 16: 24_576}  # devices: tokens of a micro-batch; the batch divides by both


def whole(devices):
    """The whole model's step in FP8."""
    tokens = HOSTS[devices]
    return compiled("danube2", context=8_192, devices=devices, microbatch_tokens=tokens)


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


@pytest.mark.parametrize("devices", HOSTS)
def test_micro_batches_communicate_with_nobody(devices):
    step = whole(devices)
    assert step.account.micro_batches() == step.micro_batches - 1 > 0
    assert not collectives(step.account.program.loops)
    assert count(step.account.micro_step(), FP8_MATMUL) == 12 * LAYERS
    assert count(step.account.micro_step(), COLLECTIVE, COPY) == 0


@pytest.mark.parametrize("devices", HOSTS)
def test_fp8_weights_are_gathered_as_bytes_and_gradients_scattered_once_a_step(devices):
    step = whole(devices)
    program = step.account.program
    arrays = gathered(program)
    assert collections.Counter(shape for _, shape in arrays) == matrices(LAYERS)
    # Embedding and head stay in bfloat16.
    assert collections.Counter(dtype for dtype, _ in arrays) == {"u8": 4 * LAYERS, "bf16": 2}

    scatters = collectives(program.entry, "reduce-scatter")
    scattered = [array for x in scatters for array in x.operands]
    assert collections.Counter(shape for _, shape in scattered) == matrices(LAYERS)
    assert {dtype for dtype, _ in scattered} == {"f32"}

    reduces = collectives(program.entry, "all-reduce")
    # Gradients of the norm scales; beside them magnitudes and norms of matrices, and metrics.
    vectors, scalars = (2 * LAYERS + 1) * 2_560, 5 * matrices(LAYERS).total()
    reduced = elements(array for x in reduces for array in x.operands)
    assert vectors <= reduced <= vectors + scalars
    others = len(collectives(program.entry)) - len(scatters) - len(reduces)
    assert others == len(collectives(program.entry, "all-gather"))


@pytest.mark.parametrize("devices", HOSTS)
def test_collectives_take_a_fiftieth_of_a_step_at_most(devices):
    step = whole(devices)
    totals = step.account.totals(Rates())
    communication = sum(total.seconds for total in totals if total.kind == COLLECTIVE)
    assert 0 < communication < 0.02 * sum(total.seconds for total in totals)


@pytest.mark.parametrize("devices", HOSTS)
def test_state_is_sharded_and_updated_in_place(devices):
    memory = whole(devices).memory
    assert memory.updated_in_place == memory.state
    parameters = 1_831_201_280
    assert memory.state == pytest.approx(12 * parameters / devices, rel=1e-3)
    assert memory.needed < 72 * 2**30


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
