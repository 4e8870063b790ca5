"""Properties of chat masks, sampling filters and converters, against references of their own."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from properties import holds_for
from safetensors.numpy import load_file, save_file
from tokenizer_models import byte_level_folder, train_sentencepiece

from danube_jax.config import ModelConfig
from danube_jax.data import chat
from danube_jax.data.chat_examples import TOKENIZATIONS, ChatEncoder
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError
from danube_jax.inference.sampling import (
    SamplingConfig,
    SamplingPlan,
    SamplingValues,
    process_logits,
)
from danube_jax.interop import hf_config, safetensors_file
from danube_jax.interop.export_hf import ExportOptions, export_model
from danube_jax.interop.hf_weights import layout, params_from_hf, params_to_hf
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model


@functools.cache
def tokenizer(kind: str):
    folder = Path(tempfile.mkdtemp(prefix="danube_jax_properties_"))
    try:
        if kind == "sentencepiece":
            train_sentencepiece(folder / "tokenizer.model")
        else:
            byte_level_folder(folder, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
        return open_tokenizer(folder)
    finally:
        shutil.rmtree(folder)


# Words, marks of the formats, names of control tokens, and what is hard to tokenise.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6).filter(lambda text: text.isprintable()),
        st.sampled_from(
            ("Hi", " the", "\n", "  ", "</s>", "<|answer|>", "<|prompt|>", "<|im_end|>", "<s>", "é")
        ),
    ),
    min_size=1,
    max_size=6,
).map("".join)
NOT_EMPTY = TEXTS.filter(lambda text: text.strip())


@st.composite
def formats(draw):
    """(template, what opens an answer, what ends it): Danube's three, and random ones."""
    name = draw(st.sampled_from((*chat.TEMPLATES, "random")))
    if name != "random":
        return chat.TEMPLATES[name], "<|answer|>", ""
    marks = st.sampled_from(("[Q]", "User: ", "<|user|>\n", "### ", "=="))
    ask, answer = draw(marks), draw(st.sampled_from(("[A]", "Bot:\n", "<|bot|>", "--> ")))
    after = draw(st.sampled_from(("", "\n", "\n\n")))
    source = (
        "{% for m in messages %}"
        f"{{{{ ({json.dumps(ask)} if m.role != 'assistant' else {json.dumps(answer)}) }}}}"
        f"{{{{ m.content + eos_token + {json.dumps(after)} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(answer)} }}}}{{% endif %}}"
    )
    return source, answer, after


@holds_for(
    20,
    kind=st.sampled_from(("sentencepiece", "byte level")),
    tokenization=st.sampled_from(TOKENIZATIONS),
    form=formats(),
    turns=st.lists(st.tuples(NOT_EMPTY, NOT_EMPTY), min_size=1, max_size=3),
)
def test_masks_cover_the_answers_and_what_ends_them(kind, tokenization, form, turns):
    template, opening, _ = form
    model = tokenizer(kind).with_chat_template(template)
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    example = ChatEncoder(model, tokenization=tokenization).encode(messages)
    # A message can spell no control token: one ends each turn, and there is no other.
    ends = np.isin(example.ids, [*model.special_ids])
    assert (example.ids[ends] == model.eos_id).all()
    assert ends.sum() == len(messages)
    assert (example.mask & ends).sum() == len(turns)
    if tokenization == "joint":
        assert example.ids.tolist() == model.encode_chat(messages, add_generation_prompt=False)
    runs = np.split(np.arange(len(example.ids)), np.flatnonzero(np.diff(example.mask)) + 1)
    runs = [run for run in runs if example.mask[run[0]]]
    assert len(runs) == len(turns)
    for run, (_, answer) in zip(runs, turns, strict=True):
        assert example.ids[run[-1]] == model.eos_id
        answer = answer.strip() if template == chat.TEMPLATES["danube3"] else answer
        text = _spelt(model, example.ids[run[:-1]])
        # The first token may have begun in the mark before the answer.
        spare = len(text.encode()) - len(answer.encode())
        assert f"{opening}{answer}".endswith(text) or text == f" {answer}"
        first = int(model.token_byte_lengths()[example.ids[run[0]]])
        assert 0 <= spare < max(first, 2)


def _spelt(model, ids) -> str:
    """The text of ids, with the space that SentencePiece's decoder takes from a beginning."""
    ids = [int(i) for i in ids]
    if not hasattr(model, "model"):
        return model.decode(ids)
    data = b""
    for i in ids:
        piece = model.piece(i)
        data += bytes([int(piece[3:5], 16)]) if model.model.is_byte(i) else piece.encode()
    return data.decode().replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


# Many ties, and no rounding; few sizes, since each is compiled.
LOGITS = st.sampled_from((2, 7, 24)).flatmap(
    lambda size: st.lists(st.integers(-40, 40).map(lambda x: x / 4), min_size=size, max_size=size)
)


@holds_for(
    12,
    logits=LOGITS,
    seen=st.lists(st.booleans(), min_size=24, max_size=24),
    temperature=st.sampled_from((0.25, 0.5, 1.0, 2.0)),
    penalty=st.sampled_from((1.0, 0.5, 2.0)),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_sampling_filters_are_those_of_numpy(
    logits, seen, temperature, penalty, top_k, top_p, min_p
):
    size = len(logits)
    seen_V = np.array(seen[:size])
    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    found = _processed(
        SamplingPlan.of(config),
        SamplingValues.of(config),
        jnp.array([logits], jnp.float32),
        jnp.array([seen_V]),
    )
    expected = _filtered(np.array(logits), seen_V, config)
    assume(expected is not None)  # a sum of probabilities too near to top_p to tell
    np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=1e-6)


_processed = jax.jit(process_logits, static_argnums=0)


def _filtered(x, seen, config: SamplingConfig):
    """transformers' logits processors in their order, in float64; ties stay together."""
    x = np.where(seen, np.where(x < 0, x * config.repetition_penalty, x / config.repetition_penalty), x)  # fmt: skip  # noqa: E501
    x = x / config.temperature
    if config.top_k:
        kept = np.sort(x)[::-1][: config.top_k]
        x = np.where(x < kept[-1], -np.inf, x)
    if config.top_p < 1:
        p = np.exp(x - x.max())
        p /= p.sum()
        values = np.unique(p[p > 0])[::-1]
        mass = np.array([p[p >= value].sum() for value in values])
        if np.abs(mass - config.top_p).min() < 1e-5:
            return None
        x = np.where(p >= values[np.argmax(mass >= config.top_p)], x, -np.inf)
    if config.min_p:
        p = np.exp(x - x.max())
        if np.abs(p - config.min_p).min() < 1e-5:
            return None
        x = np.where(p < config.min_p, -np.inf, x)
    return x


@st.composite
def models(draw):
    """A small model of any shape that the decoder takes."""
    key_value = draw(st.integers(1, 3))
    heads = key_value * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    explicit = draw(st.booleans())
    kind = draw(st.sampled_from(("llama", "mistral")))
    return ModelConfig(
        model_type=kind,
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=2 * draw(st.integers(1, 9)) if explicit else heads * head_dim,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        head_dim=head_dim if explicit else None,
        max_position_embeddings=draw(st.integers(1, 64)),
        sliding_window=draw(st.sampled_from((None, 5))) if kind == "mistral" else None,
        rope_theta=draw(st.sampled_from((10_000.0, 500_000.0, 12_345.5))),
        tie_word_embeddings=draw(st.booleans()),
    )


DTYPES = st.sampled_from((np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)))


def _random_tensors(config: ModelConfig, dtype: np.dtype, seed: int) -> dict[str, np.ndarray]:
    """Tensors of random bits, NaN and infinity among them."""
    random = np.random.default_rng(seed)
    return {
        tensor.name: random.integers(
            0, 2 ** (8 * dtype.itemsize), tensor.shape, f"u{dtype.itemsize}"
        ).view(dtype)
        for leaf in layout(config)
        for tensor in leaf.tensors
    }


@holds_for(25, config=models(), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_weights_come_back_to_the_bit(config, dtype, seed):
    tensors = _random_tensors(config, dtype, seed)
    back = dict(params_to_hf(params_from_hf(tensors, config), config))
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@holds_for(25, config=models(), dtype=st.sampled_from(("float32", "bfloat16")))
def test_a_config_comes_back_from_hugging_faces_form(config, dtype):
    content = hf_config.export_config(config, dtype=dtype, bos_id=1, eos_id=2, pad_id=None)
    back = hf_config.model_config(json.loads(json.dumps(content)), "here")
    expected = dataclasses.replace(config, model_type=hf_config.architecture(config))
    if back.head_dim is None or expected.head_dim is None:
        assert back.head_size == expected.head_size
        expected = dataclasses.replace(expected, head_dim=back.head_dim)
    assert back == expected


@holds_for(25, data=st.data())
def test_safetensors_are_those_of_the_library(data):
    names = data.draw(st.lists(st.text(min_size=1, max_size=9), unique=True, max_size=5))
    assume("__metadata__" not in names)
    tensors = {}
    for name in names:
        shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
        dtype = data.draw(DTYPES)
        bits = np.random.default_rng(len(tensors)).integers(
            0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8
        )
        tensors[name] = bits.view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "a", Path(folder) / "b"
        writer = safetensors_file.Writer(ours, [(n, a.dtype, a.shape) for n, a in tensors.items()])
        for name, array in tensors.items():
            writer.write(name, array)
        writer.close()
        save_file(tensors, theirs)
        for path in (ours, theirs):
            found = load_file(path)
            header = safetensors_file.read_header(path)
            assert found.keys() == header.keys() == tensors.keys()
            for name, array in tensors.items():
                out = np.empty(array.shape, array.dtype)
                safetensors_file.read_into(path, header[name], out)
                assert out.tobytes() == found[name].tobytes() == array.tobytes()


@holds_for(2, config=models(), dtype=DTYPES, seed=st.integers(0, 2**31))
def test_import_and_export_give_back_the_same_bytes(config, dtype, seed):
    pytest.importorskip("torch")
    config = dataclasses.replace(config, max_position_embeddings=64)
    tensors = {
        name: np.random.default_rng(seed).normal(0, 0.1, array.shape).astype(dtype)
        for name, array in _random_tensors(config, dtype, seed).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        source, ours, back = (Path(folder) / name for name in ("source", "ours", "back"))
        source.mkdir()
        name = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}[dtype.name]
        content = hf_config.export_config(config, dtype=name, bos_id=1, eos_id=2, pad_id=None)
        (source / "config.json").write_text(json.dumps(content))
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        import_model(source, ours)
        try:
            export_model(open_model(ours), back, ExportOptions(name, verify=False))
        except UserError as error:
            pytest.fail(str(error))
        found = load_file(back / "model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(found[n].tobytes() == array.tobytes() for n, array in tensors.items())
