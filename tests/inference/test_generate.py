"""Generation against the full forward pass, a published model, and its own guarantees."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_mapping import params_from_hf

from danube_jax.config import ModelConfig
from danube_jax.errors import UserError
from danube_jax.inference.generate import generate, sample
from danube_jax.models.decoder import Decoder, init_params

CONFIG = ModelConfig(
    vocab_size=41,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=6,
    initializer_range=0.5,
)
DECODER = Decoder(CONFIG)
PROMPTS = [[3, 14, 15, 9, 2], [6], [5, 35, 8]]
STORIES = pathlib.Path(__file__).parents[3] / "shared" / "data" / "stories260k"


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(params):
    return generate(DECODER, params, PROMPTS, max_tokens=12)


def test_greedy_is_the_argmax_of_the_full_forward_pass(params, greedy):
    assert [len(row) for row in greedy] == [12, 12, 12]
    forward = jax.jit(lambda params, tokens: DECODER.apply({"params": params}, tokens))
    for prompt, continuation in zip(PROMPTS, greedy, strict=True):
        # Padding on the right is invisible to what comes before it.
        padded = np.zeros((1, 20), int)
        padded[0, : len(prompt) + 12] = prompt + continuation
        logits = forward(params, padded)[0, : len(prompt) + 12]
        predicted = np.argmax(logits, axis=-1)[len(prompt) - 1 : -1]
        assert continuation == predicted.tolist()


def test_eos_ends_a_row_and_only_that_row(params, greedy):
    eos_id = next(token for token in greedy[0] if token not in greedy[1])
    stopped = generate(DECODER, params, PROMPTS, max_tokens=12, eos_id=eos_id)
    assert stopped[0] == greedy[0][: greedy[0].index(eos_id)]
    assert stopped[1] == greedy[1]


def test_rows_do_not_depend_on_their_neighbours(params):
    options = {"max_tokens": 12, "temperature": 1.0, "top_k": 20, "key": jax.random.key(5)}
    together = generate(DECODER, params, PROMPTS, **options)
    others = generate(DECODER, params, [PROMPTS[0], [1] * 7, [2]], **options)
    assert together[0] == others[0]
    assert together[1] != others[1]
    same = generate(DECODER, params, [[6]] * 3, **options)
    assert same[0] != same[1]  # rows draw with keys of their own
    assert together == generate(DECODER, params, PROMPTS, **options)


def test_sampling_frequencies():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    draws = 20_000
    logits = jnp.tile(jnp.log(p), (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    draw = jax.jit(sample, static_argnames="filtered")

    def frequencies(temperature=1.0, top_k=4, top_p=1.0):
        tokens = draw(logits, keys, temperature, top_k, top_p, filtered=top_k < 4 or top_p < 1)
        return np.bincount(tokens, minlength=4) / draws

    # The standard deviation of a frequency is at most 0.0036.
    tolerance = {"atol": 0.015}
    np.testing.assert_allclose(frequencies(), p, **tolerance)
    cooled = p**2 / np.sum(p**2)
    np.testing.assert_allclose(frequencies(temperature=0.5), cooled, **tolerance)
    np.testing.assert_allclose(frequencies(top_k=2), [4 / 7, 3 / 7, 0, 0], **tolerance)
    # The nucleus of 0.75 needs the third token to reach it.
    nucleus = [4 / 9, 3 / 9, 2 / 9, 0]
    np.testing.assert_allclose(frequencies(top_p=0.75), nucleus, **tolerance)
    # Of the two likeliest, renormalised, the first alone holds a half.
    np.testing.assert_allclose(frequencies(top_k=2, top_p=0.5), [1, 0, 0, 0], **tolerance)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [41]], {}, "prompt 1 holds token 41"),
        ([[1] * 60], {}, "exceed the model's context of 64"),
        ([[1]], {"temperature": 1.0}, "needs a random key"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_refusals(params, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(DECODER, params, prompts, max_tokens=5, **options)


def test_nothing_to_do(params):
    assert generate(DECODER, params, [], max_tokens=5) == []
    assert generate(DECODER, params, PROMPTS, max_tokens=0) == [[], [], []]


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260k model")
def test_stories260k_tells_its_published_story():
    tokenizers = pytest.importorskip("tokenizers")
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    fields = json.loads((STORIES / "config.json").read_text())
    names = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in fields.items() if name in names})
    state = safetensors_numpy.load_file(STORIES / "model.safetensors")
    params = params_from_hf(state, config)
    (story,) = generate(Decoder(config), params, [[fields["bos_token_id"]]], max_tokens=205)
    text = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json")).decode(story)
    assert text.startswith((STORIES / "golden_greedy.txt").read_text())
