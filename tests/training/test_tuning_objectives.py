"""SFT, DPO and LoRA against one-by-one computation, transformers, PEFT and TRL's formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.config import DpoConfig, ModelConfig
from danube_jax.data.chat_examples import Example, ExamplePair
from danube_jax.data.packing import Packed, pack_examples, pack_pairs
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.models.lora import (
    COLLECTION,
    LoraConfig,
    adapter_collection,
    init_adapters,
    merge,
)
from danube_jax.training.objectives import language_modeling, preference_optimization

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=9,
    initializer_range=0.2,
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj"))
CHUNK = 16


@pytest.fixture(scope="module")
def decoder():
    return Decoder(MODEL, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def random_adapters(seed=3):
    """Adapters that do something: B is not zero."""
    adapters = init_adapters(LORA, MODEL, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)


def random_example(rng, length, prompt):
    """Random ids; all after the prompt are trained on."""
    mask = np.arange(length) >= prompt
    return Example(rng.integers(0, MODEL.vocab_size, length).astype(np.int32), mask)


def random_pair(rng):
    """A shared prompt and two answers of different length."""
    prompt = rng.integers(0, MODEL.vocab_size, rng.integers(2, 6))
    sides = []
    for _ in range(2):
        ids = np.concatenate([prompt, rng.integers(0, MODEL.vocab_size, rng.integers(2, 9))])
        sides.append(Example(ids.astype(np.int32), np.arange(len(ids)) >= len(prompt)))
    return ExamplePair(*sides)


def value_and_gradients(objective, weights, batch, frozen=None):
    """The sum of losses, its gradients, and the metric sums."""
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    function = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, sums), grads = function(weights, batch, frozen)
    return float(loss), jax.device_get(grads), jax.device_get(sums)


def assert_same(found, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_packed_examples_have_the_loss_and_gradients_they_have_alone(decoder, params, what):
    rng = np.random.default_rng(0)
    examples = [random_example(rng, int(n), int(n) // 3 + 1) for n in rng.integers(4, 20, 9)]
    packed = Packed.build([e.length for e in examples], 32, "best_fit")
    assert packed.items > 1
    batch = pack_examples([[examples[i] for i in row] for row in packed.rows], 32, 0)
    lora = LORA if what == "lora" else None
    weights, frozen = (random_adapters(), params) if lora else (params, None)
    objective = language_modeling(decoder, z_loss=1e-3, chunk_tokens=CHUNK, lora=lora)
    loss, grads, _ = value_and_gradients(objective, weights, batch, frozen)
    total, summed = 0.0, jax.tree.map(np.zeros_like, grads)
    for example in examples:
        alone = {
            "tokens": example.ids[None, :-1],
            "targets": example.ids[None, 1:],
            "weights": example.mask[None, 1:].astype(np.float32),
        }
        alone = {
            key: np.pad(value, ((0, 0), (0, 20 - value.shape[1]))) for key, value in alone.items()
        }
        one, gradient, _ = value_and_gradients(objective, weights, alone, frozen)
        total += one
        summed = jax.tree.map(np.add, summed, gradient)
    # float32 sums in another order; gradients of this size reach 30
    np.testing.assert_allclose(loss, total, rtol=2e-6)
    assert_same(grads, summed, atol=2e-4)


def test_rows_of_one_example_need_no_mask(decoder, params):
    rng = np.random.default_rng(6)
    batch = pack_examples([[random_example(rng, n, 2)] for n in (5, 17)], 20, 0)
    results = [
        value_and_gradients(
            language_modeling(decoder, z_loss=0.0, chunk_tokens=0, mask_segments=masked),
            params,
            batch,
        )
        for masked in (True, False)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert_same(results[0][1], results[1][1], atol=1e-5)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_dpo_begins_at_ln_2(decoder, params, what):
    rng = np.random.default_rng(1)
    batch = pack_pairs([[random_pair(rng), random_pair(rng)], [random_pair(rng)]], 48, 2, 0)
    lora = LORA if what == "lora" else None
    weights = init_adapters(LORA, MODEL, jax.random.key(1)) if lora else params
    objective = preference_optimization(decoder, DpoConfig(beta=0.2), chunk_tokens=CHUNK, lora=lora)
    loss, _, sums = value_and_gradients(objective, weights, batch, params)
    # Policy and reference are compiled apart, so their log-probabilities may differ by rounding:
    # the margin, of which -log sigmoid(margin) takes a half (its slope at 0).
    assert abs(sums["margin"]) < 1e-5
    assert (loss + sums["margin"] / 2) / 3 == pytest.approx(math.log(2), abs=1e-7)
    assert sums["accuracy"] == 1.5  # three ties, a half each


CASES = {
    "sigmoid": DpoConfig(beta=0.3),
    "smoothed": DpoConfig(beta=0.3, label_smoothing=0.1),
    "ipo": DpoConfig(beta=0.3, loss="ipo"),
    "ipo, averaged": DpoConfig(beta=0.3, loss="ipo", average_log_probs=True),
}


@pytest.fixture(scope="module")
def peft_model():
    """PEFT's adapters on a model of transformers, float64; and our trees of the same values."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from hf_models import random_model

    base, params = random_model(MODEL)
    config = peft.LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets), lora_dropout=0.0
    )
    model = peft.get_peft_model(base, config).double()
    adapters = random_adapters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                array = np.asarray(adapter_of(adapters, name), np.float64)
                parameter.copy_(torch.from_numpy(array.T.copy()))
    return model, params, adapters


def adapter_of(tree, name):
    """The array of our tree that PEFT's parameter is the transpose of."""
    parts = name.split(".")
    at = parts.index("layers")
    side = {"lora_A": "a", "lora_B": "b"}[parts[at + 4]]
    return tree[f"layers_{parts[at + 1]}"][parts[at + 2]][parts[at + 3]][side]


def answer_log_prob(model, example):
    """The summed log-probability of what is trained on, in float64."""
    import torch

    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    logits = model(ids[:, :-1]).logits[0]
    logp = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    return (logp * torch.from_numpy(example.mask[1:].astype(np.float64))).sum()


@pytest.mark.parametrize("name", CASES)
def test_dpo_equals_transformers_and_peft_in_float64(decoder, peft_model, name):
    import torch

    model, params, adapters = peft_model
    config, rng = CASES[name], np.random.default_rng(2)
    pairs = [random_pair(rng) for _ in range(4)]
    packed = Packed.build([pair.length for pair in pairs], 48, "best_fit")
    rows = [[pairs[i] for i in row] for row in packed.rows]
    batch = pack_pairs(rows, 48, packed.items, 0)
    objective = preference_optimization(decoder, config, chunk_tokens=CHUNK, lora=LORA)
    loss, grads, sums = value_and_gradients(objective, adapters, batch, params)

    model.zero_grad()
    total, margins = 0.0, 0.0
    for pair in pairs:
        policy = [answer_log_prob(model, s) for s in (pair.chosen, pair.rejected)]
        with torch.no_grad(), model.disable_adapter():
            reference = [answer_log_prob(model, s) for s in (pair.chosen, pair.rejected)]
        ratios = [p - r for p, r in zip(policy, reference, strict=True)]
        margins += config.beta * float((ratios[0] - ratios[1]).detach())
        if config.average_log_probs:
            sizes = (pair.chosen.trained, pair.rejected.trained)
            ratios = [ratio / size for ratio, size in zip(ratios, sizes, strict=True)]
        h = ratios[0] - ratios[1]
        if config.loss == "ipo":
            total = total + (h - 1 / (2 * config.beta)) ** 2
        else:
            smooth = config.label_smoothing
            right = torch.nn.functional.logsigmoid(config.beta * h)
            wrong = torch.nn.functional.logsigmoid(-config.beta * h)
            total = total - (1 - smooth) * right - smooth * wrong
    total.backward()
    # float32 against float64 through two layers, log-probabilities of about -30
    np.testing.assert_allclose(loss, total.item(), rtol=3e-5)
    np.testing.assert_allclose(sums["margin"], margins, rtol=1e-4, atol=1e-5)
    compared = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = parameter.grad.numpy().T
            ours = adapter_of(grads, parameter_name)
            scale = max(1e-3, np.abs(expected).max())
            np.testing.assert_allclose(ours / scale, expected / scale, atol=2e-4)
            compared += 1
    assert compared == len(jax.tree.leaves(adapters))


def test_a_cached_reference_gives_the_same_loss(decoder, params):
    from danube_jax.training.objectives import Policy, answer_log_probs

    rng = np.random.default_rng(4)
    batch = pack_pairs([[random_pair(rng)] for _ in range(3)], 32, 1, 0)
    objective = preference_optimization(decoder, DpoConfig(), chunk_tokens=CHUNK, lora=LORA)
    adapters = random_adapters()
    loss, grads, _ = value_and_gradients(objective, adapters, batch, params)

    @jax.jit
    def reference(params, batch):
        hidden_BTD = Policy(decoder).plain_states(params, batch)
        return answer_log_probs(hidden_BTD, params["lm_head"]["kernel"], batch, CHUNK)

    batch["reference"] = np.asarray(reference(params, batch))
    again, grads_again, _ = value_and_gradients(objective, adapters, batch, params)
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    assert_same(grads, grads_again, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_beside_the_kernels_compute_what_merged_ones_do(decoder, params, rslora):
    lora = dataclasses.replace(LORA, rslora=rslora)
    adapters = random_adapters()
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 20))
    variables = {"params": params, COLLECTION: adapter_collection(adapters, lora, jnp.float32)}
    beside = decoder.apply(variables, tokens)
    merged = decoder.apply({"params": merge(params, adapters, lora, MODEL)}, tokens)
    plain = decoder.apply({"params": params}, tokens)
    assert np.abs(beside - plain).max() > 0.1
    np.testing.assert_allclose(beside, merged, atol=2e-4)  # float32: the product before or after


def test_dropout_is_a_function_of_the_row_and_keeps_the_mean(decoder, params):
    lora = dataclasses.replace(LORA, dropout=0.3)
    adapters = random_adapters()
    rng = np.random.default_rng(5)
    examples = [random_example(rng, 20, 3) for _ in range(4)]
    batch = pack_examples([[e] for e in examples], 24, 0) | {"sequence": np.arange(4) + 70}
    objective = language_modeling(decoder, z_loss=0.0, chunk_tokens=0, lora=lora, seed=1)

    def loss(batch, objective=objective):
        batch = {key: jnp.asarray(value) for key, value in batch.items()}
        return float(jax.jit(objective)(adapters, batch, params)[0])

    whole = loss(batch)
    assert whole == loss(batch)
    halves = [{key: value[part] for key, value in batch.items()} for part in ([0, 2], [3, 1])]
    np.testing.assert_allclose(whole, sum(map(loss, halves)), rtol=1e-6)
    other = language_modeling(decoder, z_loss=0.0, chunk_tokens=0, lora=lora, seed=2)
    assert abs(loss(batch, other) - whole) > 1e-3
    # Scaled by 1 / keep: adapters that act linearly on a constant input keep their mean.
    from danube_jax.models.lora import _dropout

    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    x = jnp.ones((3, 40, 50))
    dropped = np.asarray(_dropout(x, keys, jnp.float32(0.7)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    # 6000 draws of variance 0.3 / 0.7: six standard errors
    assert dropped.mean() == pytest.approx(1.0, abs=6 * math.sqrt(0.3 / 0.7 / 6000))
    assert not np.array_equal(dropped[0], dropped[1])
