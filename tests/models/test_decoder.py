"""The decoder against transformers, against itself with a cache, and against known sizes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.config import ATTENTION_BACKENDS, ModelConfig
from danube_jax.interop.hf_weights import params_from_hf
from danube_jax.models import decoder as decoder_lib
from danube_jax.models.decoder import Decoder
from danube_jax.models.kv_cache import init_cache
from danube_jax.models.lora import COLLECTION, LoraConfig, adapter_collection, init_adapters

SMALL = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,  # larger than in training, so that attention is far from uniform
)
DANUBE = ModelConfig(sliding_window=4_096)
DANUBE3_500M = ModelConfig(
    hidden_size=1_536, intermediate_size=4_096, num_hidden_layers=16, num_attention_heads=16
)
DANUBE3_4B = ModelConfig(hidden_size=3_840, intermediate_size=10_240)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(decoder, params, *inputs, method="__call__"):
    return decoder.apply({"params": params}, *inputs, method=method)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def random_tokens(config, batch=2, length=19):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))


def transformers_model(config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    dropped = (
        "model_type",
        "attention_backend",
        "remat",
        "scan_layers",
        "sliding_window",
        "head_dim",
    )
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in dropped}
    fields |= {"head_dim": config.head_size, "attn_implementation": "eager"}
    torch.manual_seed(0)
    if config.model_type == "mistral":
        hf_config = transformers.MistralConfig(**fields, sliding_window=config.sliding_window)
        model = transformers.MistralForCausalLM(hf_config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    with torch.no_grad():  # fresh models have norm scales of one, which would hide a lost scale
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return torch, model


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(sliding_window=5),
        small(num_key_value_heads=4, tie_word_embeddings=True),
        small(num_key_value_heads=4, sliding_window=5, attention_backend="xla"),
        small(tie_word_embeddings=True, sliding_window=5),
        small(model_type="llama", head_dim=12, rope_theta=100_000.0),
    ],
    ids=["gqa", "window", "mha-tied", "mha-window", "tied-window", "llama-head_dim-theta"],
)
def test_logits_and_gradients_equal_those_of_transformers(config):
    torch, model = transformers_model(config)
    tokens = random_tokens(config)
    torch_logits = model(torch.from_numpy(tokens)).logits
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    params = params_from_hf(state, config)
    weights = np.random.default_rng(1).normal(size=torch_logits.shape).astype(np.float32)

    @jax.jit
    def logits_and_gradients(params):
        decoder = Decoder(config)
        logits, pullback = jax.vjp(lambda p: decoder.apply({"params": p}, tokens), params)
        return logits, pullback(jnp.asarray(weights))[0]

    logits, gradients = logits_and_gradients(params)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, torch_logits.detach().numpy(), atol=1e-4)

    (torch_logits * torch.from_numpy(weights)).sum().backward()
    torch_gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    expected = params_from_hf(torch_gradients, config)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        # float32 rounding, relative to the largest entry of the tensor
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DANUBE, 1_831_201_280),  # published: 3.66 GB in bfloat16
        (DANUBE3_500M, 513_590_784),
        (DANUBE3_4B, 3_961_839_360),  # published: 3.96 B
        (dataclasses.replace(DANUBE, tie_word_embeddings=True), 1_831_201_280 - 32_000 * 2_560),
    ],
)
def test_parameter_count(config, count):
    assert decoder_lib.param_count(config) == count


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_parameters_do_not_depend_on_the_attention_backend(backend):
    config = small(attention_backend=backend)  # cudnn too, which runs neither here nor in float32
    for a, b in zip(
        jax.tree.leaves(decoder_lib.init_params(config, jax.random.key(0))),
        jax.tree.leaves(decoder_lib.init_params(SMALL, jax.random.key(0))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_tree(tied):
    config = small(num_hidden_layers=1, tie_word_embeddings=tied, head_dim=12)
    params = decoder_lib.init_params(config, jax.random.key(0))
    shapes = {
        "/".join(str(key.key) for key in path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    expected = {
        "embed_tokens/embedding": (67, 32),
        "layers_0/input_layernorm/scale": (32,),
        "layers_0/self_attn/qkv_proj/kernel": (32, 8 * 12),
        "layers_0/self_attn/o_proj/kernel": (48, 32),
        "layers_0/post_attention_layernorm/scale": (32,),
        "layers_0/mlp/gate_up_proj/kernel": (32, 88),
        "layers_0/mlp/down_proj/kernel": (44, 32),
        "norm/scale": (32,),
    }
    if not tied:
        expected["lm_head/kernel"] = (32, 67)
    assert shapes == {name: (shape, jnp.float32) for name, shape in expected.items()}
    kernel = params["layers_0"]["self_attn"]["qkv_proj"]["kernel"]
    # 3,072 draws: their standard deviation is within 10 % of the true one (8 sigma).
    np.testing.assert_allclose(np.std(kernel), config.initializer_range, rtol=0.1)
    assert decoder_lib.head_kernel(params).shape == (32, 67)


@pytest.mark.parametrize(
    ("context", "gflops"), [(2_048, 11.25), (4_096, 12.00), (8_192, 12.76), (16_384, 13.14)]
)
def test_flops_per_token_of_danube(context, gflops):
    assert decoder_lib.flops_per_token(DANUBE, context) / 1e9 == pytest.approx(gflops, abs=0.005)


def test_flops_of_causal_attention_are_half():
    full = dataclasses.replace(DANUBE, sliding_window=None)
    matmuls = 6 * (decoder_lib.param_count(full) - 32_000 * 2_560 - 49 * 2_560)
    causal, dense = (decoder_lib.flops_per_token(full, 2_048, causal=c) for c in (True, False))
    assert dense - matmuls == 2 * (causal - matmuls) == 12 * 24 * 2_560 * 2_048


@pytest.mark.parametrize(
    ("remat", "backend"),
    [("full", "blocked"), ("dots", "blocked"), ("attention", "blocked"), ("attention", "xla")],
)
def test_remat_changes_nothing_but_what_is_saved(remat, backend):
    tokens = random_tokens(SMALL)
    params = decoder_lib.init_params(SMALL, jax.random.key(0))

    def loss_and_gradients(remat):
        decoder = Decoder(small(remat=remat, attention_backend=backend))

        def loss(params):
            return jnp.sum(jax.nn.logsumexp(decoder.apply({"params": params}, tokens), axis=-1))

        return loss, jax.jit(jax.value_and_grad(loss))(params)

    plain, (value, gradients) = loss_and_gradients("none")
    rematted, (remat_value, remat_gradients) = loss_and_gradients(remat)
    np.testing.assert_allclose(remat_value, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(remat_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    def count_exp(loss):
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count(" exp ")

    # The softmax runs again, except where attention is saved and can be used from what is saved.
    runs_again = remat != "attention" or backend == "xla"
    assert (count_exp(rematted) > count_exp(plain)) == runs_again


@pytest.mark.parametrize("with_adapters", [False, True])
def test_scanning_the_layers_changes_nothing(with_adapters):
    tokens = random_tokens(SMALL)
    segments = (np.arange(tokens.shape[1]) > 7).astype(np.int32)[None].repeat(len(tokens), 0)
    params = decoder_lib.init_params(SMALL, jax.random.key(0))
    variables = {"params": params}
    if with_adapters:
        lora = LoraConfig(rank=2)
        adapters = init_adapters(lora, SMALL, jax.random.key(1))
        adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)  # fresh ones add nothing
        variables[COLLECTION] = adapter_collection(adapters, lora, jnp.float32)

    def loss_and_gradients(**changes):
        decoder = Decoder(small(**changes))

        def loss(params):
            logits = decoder.apply({**variables, "params": params}, tokens, None, segments)
            return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradients = loss_and_gradients()
    scanned, scanned_gradients = loss_and_gradients(scan_layers=True)
    np.testing.assert_allclose(scanned, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(scanned_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_parameters_may_come_in_bfloat16():
    tokens = random_tokens(SMALL)
    params = decoder_lib.init_params(SMALL, jax.random.key(0))
    decoder = Decoder(SMALL, jnp.bfloat16)
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = apply(decoder, params, tokens)
    out_cast = apply(decoder, cast, tokens)
    assert out_cast.dtype == jnp.float32
    np.testing.assert_array_equal(out, out_cast)  # scales are one, exact in bfloat16
    h = apply(decoder, cast, tokens, method="hidden_states")
    assert h.dtype == jnp.bfloat16


def test_segments_and_positions_make_packed_documents_independent():
    params = decoder_lib.init_params(SMALL, jax.random.key(0))
    decoder = Decoder(SMALL)
    first, second = random_tokens(SMALL, 1, 7), random_tokens(SMALL, 1, 12)
    packed = apply(
        decoder,
        params,
        np.concatenate([first, second], axis=1),
        np.concatenate([np.arange(7), np.arange(12)])[None],
        np.repeat([1, 2], [7, 12])[None],
    )
    alone = [apply(decoder, params, tokens) for tokens in (first, second)]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), atol=1e-5)


@functools.partial(jax.jit, static_argnums=0, static_argnames="fresh")
def decode(decoder, params, *inputs, fresh=False):
    def states_and_logits(decoder):
        h, cache = decoder.decode_states(*inputs, fresh=fresh)
        return decoder.logits(h), cache

    return nn.apply(states_and_logits, decoder)({"params": params})


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("window", "slots"), [(None, 24), (4, 24), (4, 8)])
def test_cached_decoding_equals_the_full_forward_pass(window, slots, ragged):
    """A fresh chunk, a chunk on top of it that is padded on the right, then single tokens."""
    config = small(sliding_window=window)
    decoder = Decoder(config)
    params = decoder_lib.init_params(config, jax.random.key(0))
    chunk, length = 5, 18
    padding = np.array([0, 3]) if ragged else np.array([0, 0])
    tokens = random_tokens(config, 2, length)
    full = [
        apply(decoder, params, row[None, start:])
        for row, start in zip(tokens, padding, strict=True)
    ]

    cache = init_cache(config, 2, slots, jnp.float32)
    passed = padding if ragged else None
    time, found = 0, []
    for width, new in ((chunk, chunk), (chunk, 3), *[(1, 1)] * 10):
        fed = tokens[:, time : time + width].copy()
        fed[:, new:] = 66  # padding, which must stay invisible
        logits, cache = decode(decoder, params, fed, cache, time, passed, fresh=time == 0)
        found.append(logits[:, :new])
        time += new
    assert time == length
    found = np.concatenate(found, axis=1)
    for row, start in enumerate(padding):
        np.testing.assert_allclose(found[row, start:], full[row][0], atol=1e-5)


def test_gradients_of_a_frequent_token_are_summed_in_float32():
    tokens_BT = jnp.zeros((4, 1_024), jnp.int32).at[:, ::7].set(3)
    dx_BTD = 1.0 + jax.random.normal(jax.random.key(0), (4, 1_024, 8))
    dx_BTD = dx_BTD.astype(jnp.bfloat16)
    _, pullback = jax.vjp(
        lambda e: decoder_lib.embed(e, tokens_BT), jnp.zeros((5, 8), jnp.bfloat16)
    )
    (found_VD,) = pullback(dx_BTD)
    assert found_VD.dtype == jnp.bfloat16
    exact_VD = np.zeros((5, 8))
    np.add.at(exact_VD, np.asarray(tokens_BT), np.asarray(dx_BTD, np.float64))
    # one rounding to bfloat16 at the end; sums kept in bfloat16 are off by tens of per cent
    np.testing.assert_allclose(np.asarray(found_VD, np.float64), exact_VD, rtol=2**-8)
