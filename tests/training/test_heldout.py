"""Held-out loss against logits and NumPy; bits a byte; the unigram yardstick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from danube_jax.config import ModelConfig
from danube_jax.data.loader import heldout_batches
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.training.heldout import evaluate_source, make_eval_step, unigram_loss
from danube_jax.training.mesh import DATA_AXIS
from danube_jax.training.objectives import language_modeling
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import init_state, state_specs

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture
def store(tmp_path):
    """A store of 1,001 random tokens below 64."""
    rng = np.random.default_rng(0)
    with TokenStoreWriter(
        tmp_path / "store", vocab_size=64, tokenizer="t", provenance={}
    ) as writer:
        for size in (400, 300, 301):
            writer.add(rng.integers(0, 64, size), size)
        return writer.finish()


@pytest.mark.parametrize("devices", [1, 4])
def test_loss_and_bits_per_byte_are_those_of_the_logits(store, devices):
    from danube_jax.config import OptimizerConfig

    params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0))
    decoder = Decoder(MODEL, dtype=jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:devices]), (DATA_AXIS,))
    state = init_state(params, make_optimizer(OptimizerConfig()))
    eval_step = make_eval_step(
        language_modeling(decoder, z_loss=0.0, chunk_tokens=48),
        mesh=mesh,
        specs=state_specs(state, devices, zero1=True),
        compute_dtype=jnp.float32,
    )
    bytes_V = np.arange(64, dtype=np.float32) % 7
    result = evaluate_source(
        eval_step,
        params,
        heldout_batches(store, context=16, batch_rows=8, tokens=10**6),
        mesh=mesh,
        bytes_V=bytes_V,
    )

    tokens = store.read(np.zeros(1, np.int64), store.tokens)[0].astype(np.int32)
    nll, size = 0.0, 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        logits = np.asarray(decoder.apply({"params": params}, window[None, :-1])[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= log_probabilities[np.arange(len(window) - 1), window[1:]].sum()
        size += bytes_V[window[1:]].sum()
    assert result["tokens"] == 1_000
    # float32 logits of a one-layer model
    assert result["loss"] == pytest.approx(nll / 1_000, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / np.log(2) / size, rel=1e-5)


def test_unigram_loss_of_uniform_tokens_is_near_log_of_the_vocabulary(store):
    # 1,001 uniform draws: the estimate from counts lies within a few per cent of log 64
    assert unigram_loss(store, store, 64) == pytest.approx(np.log(64), rel=0.03)
    tokens = store.read(np.zeros(1, np.int64), store.tokens)[0]
    counts = np.bincount(tokens, minlength=64)
    expected = -sum(c * np.log((c + 1) / (len(tokens) + 64)) for c in counts) / len(tokens)
    assert unigram_loss(store, store, 64) == pytest.approx(expected, rel=1e-12)
