"""Processing of logits against transformers' processors, and the draws themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.errors import UserError
from danube_jax.inference.sampling import (
    SamplingConfig,
    SamplingPlan,
    SamplingValues,
    draw_tokens,
    process_logits,
)

VOCABULARY = 300


def distribution(config, logits, seen=None):
    plan, values = SamplingPlan.of(config), SamplingValues.of(config)
    process = jax.jit(process_logits, static_argnums=0)
    return np.asarray(jax.nn.softmax(process(plan, values, jnp.asarray(logits), seen), axis=-1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 1_000},
        {"top_p": 0.8},
        {"top_p": 0.001},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8},
        {
            "temperature": 1.3,
            "top_k": 50,
            "top_p": 0.9,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
        },
    ],
    ids=lambda options: "-".join(options) or "nothing",
)
def test_distributions_equal_those_of_transformers(options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(5, VOCABULARY))).astype(np.float32)
    history = rng.integers(0, VOCABULARY, (5, 40))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = distribution(SamplingConfig(**{"temperature": 1.0, **options}), logits, seen)

    generation = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    # The list, and its order, that `generate` would make of these settings.
    make = transformers.LlamaForCausalLM._get_logits_processor
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    processors = make(model, generation)
    scores = processors(torch.from_numpy(history), torch.from_numpy(logits.copy()))
    theirs = torch.softmax(scores, dim=-1).numpy()
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_extreme_and_equal_logits():
    logits = np.array([[1.0, 1.0, 0.0, -1.0], [-np.inf, 5e4, -5e4, 0.0]], np.float32)
    top_1 = distribution(SamplingConfig(temperature=1.0, top_k=1), logits)
    np.testing.assert_allclose(top_1, [[0.5, 0.5, 0, 0], [0, 1, 0, 0]])  # equals stay
    nucleus = distribution(SamplingConfig(temperature=1.0, top_p=0.3), logits)
    np.testing.assert_allclose(nucleus, [[0.5, 0.5, 0, 0], [0, 1, 0, 0]])


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen = np.array([[True, False, False]])
    config = SamplingConfig(repetition_penalty=1.1)
    plan, values = SamplingPlan.of(config), SamplingValues.of(config)
    processed = process_logits(plan, values, jnp.asarray(logits), seen)
    assert draw_tokens(plan, processed, None).tolist() == [1]


def test_draws_follow_the_distribution():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    draws = 20_000
    config = SamplingConfig(temperature=0.5, top_k=3)
    plan, values = SamplingPlan.of(config), SamplingValues.of(config)
    logits = process_logits(plan, values, jnp.tile(jnp.log(p), (draws, 1)), None)
    tokens = draw_tokens(plan, logits, jax.random.split(jax.random.key(0), draws))
    expected = np.array([16, 9, 4, 0]) / 29
    # The standard deviation of a frequency is at most 0.0036.
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / draws, expected, atol=0.015)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("num_samples", 0),
        ("logprobs", 101),
        ("stop_tokens", ("a",)),
        ("stop_strings", "word"),
        ("stop_strings", ("",)),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field}"):
        SamplingConfig(**{field: value})


def test_only_what_changes_the_program_is_static():
    one = SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, seed=1, stop_tokens=(3,))
    other = SamplingConfig(temperature=1.1, top_k=50, top_p=0.5, seed=2, max_tokens=7)
    assert SamplingPlan.of(one) == SamplingPlan.of(other)
    greedy = dataclasses.replace(one, temperature=0.0)
    assert SamplingPlan.of(greedy) == SamplingPlan.of(SamplingConfig())
