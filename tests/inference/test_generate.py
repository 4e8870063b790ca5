"""The engine against transformers, a published model, and its own guarantees."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import greedy, random_model

from danube_jax.config import ModelConfig
from danube_jax.errors import UserError
from danube_jax.inference import programs
from danube_jax.inference.generate import Generator
from danube_jax.inference.sampling import SamplingConfig, SamplingPlan, SamplingValues
from danube_jax.interop.hf_weights import params_from_hf
from danube_jax.models.decoder import Decoder, init_params
from danube_jax.models.kv_cache import init_cache

CONFIG = ModelConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,  # larger than in training, so that texts do not settle on one token
)
STORIES = pathlib.Path(__file__).parents[3] / "shared" / "data" / "stories260k"


def changed(**changes):
    return dataclasses.replace(CONFIG, **changes)


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]


def tokens_of(completions):
    return [list(completion.tokens) for (completion,) in completions]


class Letters:
    """A tokenizer of one character a token; ids 60 to 66 are bytes of characters of several."""

    BYTES = "é€🙂".encode()[:7]

    def decode(self, ids):
        text = b"".join(
            self.BYTES[i - 60 : i - 59] if i >= 60 else chr(ord("A") + i).encode() for i in ids
        )
        return text.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def generator(params):
    return Generator(CONFIG, params, tokenizer=Letters(), chunk_tokens=32)


@pytest.mark.parametrize(
    ("config", "penalty"),
    [
        (changed(), 1.0),
        (changed(sliding_window=24), 1.0),
        (changed(sliding_window=24, num_key_value_heads=4, tie_word_embeddings=True), 1.3),
        (changed(model_type="llama", head_dim=12, rope_theta=1e5, tie_word_embeddings=True), 1.0),
        (changed(num_key_value_heads=1), 1.3),
    ],
    ids=["gqa", "window", "window-mha-tied-penalty", "llama-tied", "mqa-penalty"],
)
def test_greedy_text_equals_that_of_transformers(config, penalty):
    """One batch of prompts shorter and longer than chunk, window and ring, past the ring's end."""
    model, params = random_model(config)
    prompts, new_tokens = random_prompts(3, 40, 117), 50
    sampling = SamplingConfig(max_tokens=new_tokens, repetition_penalty=penalty)
    ours = Generator(config, params, chunk_tokens=32).generate(prompts, sampling)
    theirs = [greedy(model, p, new_tokens, repetition_penalty=penalty) for p in prompts]
    assert tokens_of(ours) == theirs
    assert all(len(set(row)) > 5 for row in theirs)  # the comparison says something
    assert {completion.finish_reason for (completion,) in ours} == {"length"}


def test_a_prompt_in_one_piece_or_in_many(params):
    prompts = random_prompts(100, 90)
    sampling = SamplingConfig(max_tokens=20)
    config = changed(sliding_window=24)
    one = Generator(config, params, chunk_tokens=512).generate(prompts, sampling)
    many = Generator(config, params, chunk_tokens=8).generate(prompts, sampling)
    assert tokens_of(one) == tokens_of(many)


def test_rows_do_not_depend_on_their_neighbours(generator):
    prompts = random_prompts(9, 3, 30, 5, 14)
    sampling = SamplingConfig(max_tokens=12, temperature=1.0, top_k=20, seed=5)
    together = tokens_of(generator.generate(prompts, sampling))
    others = [prompts[0], *random_prompts(50, seed=1), prompts[2], [1], [2]]
    mixed = tokens_of(generator.generate(others, sampling))
    assert together[0] == mixed[0]
    assert together[2] == mixed[2]
    assert together[1] != mixed[1]
    small_batches = Generator(CONFIG, generator._params, max_batch=2, chunk_tokens=32)
    assert tokens_of(small_batches.generate(prompts, sampling)) == together
    assert tokens_of(generator.generate(prompts, sampling)) == together
    other_seed = dataclasses.replace(sampling, seed=6)
    assert tokens_of(generator.generate(prompts, other_seed)) != together


def test_samples_share_a_prefill_and_draw_with_keys_of_their_own(generator, monkeypatch):
    fed = []
    prefill = programs.prefill

    def count(decoder, params, tokens_BT, *rest, **options):
        fed.append(tokens_BT.shape)
        return prefill(decoder, params, tokens_BT, *rest, **options)

    monkeypatch.setattr(programs, "prefill", count)
    prompts = random_prompts(4, 4)
    sampling = SamplingConfig(max_tokens=10, temperature=1.0, num_samples=3)
    samples = generator.generate(prompts, sampling)
    assert fed == [(2, 16)]
    assert [len(row) for row in samples] == [3, 3]
    assert len({sample.tokens for row in samples for sample in row}) == 6
    alone = generator.generate(prompts, dataclasses.replace(sampling, num_samples=1))
    assert [row[0] for row in alone] == [row[0] for row in samples]


def test_stop_tokens_end_a_row_and_only_that_row(generator):
    prompts = random_prompts(9, 3)
    free = tokens_of(generator.generate(prompts, SamplingConfig(max_tokens=30)))
    stops = [next(t for t in free[0][5:] if t not in free[1]), 66 if 66 not in free[1] else 65]
    sampling = SamplingConfig(max_tokens=30, stop_tokens=tuple(stops))
    (first,), (second,) = generator.generate(prompts, sampling)
    end = min(free[0].index(stop) for stop in stops if stop in free[0])
    assert (list(first.tokens), first.finish_reason) == (free[0][:end], "stop")
    assert second.finish_reason == ("stop" if stops[1] in free[1] else "length")
    # A stop token that comes right at the end is a stop, too.
    exact = SamplingConfig(max_tokens=end + 1, stop_tokens=tuple(stops))
    assert generator.generate(prompts[:1], exact)[0][0].finish_reason == "stop"
    short = SamplingConfig(max_tokens=end, stop_tokens=tuple(stops))
    assert generator.generate(prompts[:1], short)[0][0].finish_reason == "length"


def test_stop_strings_end_the_text_before_them(generator):
    prompts = random_prompts(9, 3)
    (free,), (other,) = generator.generate(prompts, SamplingConfig(max_tokens=40))
    text = Letters().decode(free.tokens)
    assert free.text == text
    strings = (text[20:23], "no such text")
    sampling = SamplingConfig(max_tokens=40, stop_strings=strings)
    (first,), (second,) = generator.generate(prompts, sampling)
    assert first.finish_reason == "stop"
    assert first.text == text[: text.index(strings[0])]
    assert Letters().decode(first.tokens).endswith(strings[0])
    assert strings[0] in other.text or second == other


@pytest.mark.parametrize("window", [None, 24])
def test_streams_give_the_same_and_reuse_their_beginning(params, window):
    config = changed(sliding_window=window)
    generator = Generator(config, params, tokenizer=Letters(), chunk_tokens=32)
    fresh = Generator(config, params, tokenizer=Letters(), chunk_tokens=32)
    prompt = random_prompts(70)[0]
    for turn, continuation in enumerate(random_prompts(5, 40, 1, 30)):
        sampling = SamplingConfig(max_tokens=30, logprobs=2)
        chunks = list(generator.stream(prompt, sampling))
        ((whole,),) = fresh.generate([prompt], sampling)
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert sum((chunk.tokens for chunk in chunks), ()) == whole.tokens
        found = np.concatenate([chunk.token_logprobs for chunk in chunks])
        np.testing.assert_allclose(found, whole.token_logprobs, atol=1e-4)
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        start, _ = generator._reuse(generator._kept, prompt + list(whole.tokens) + [1], 1)
        assert start == len(prompt) + 29  # all but the last token drawn, which never entered
        # The next turn goes on from here, from the middle, from a little earlier, and from here.
        prompt = (prompt + list(whole.tokens))[: [None, 20, -3, None][turn]] + continuation
    stream = generator.stream(prompt, SamplingConfig(max_tokens=100))
    begun = next(stream).tokens + next(stream).tokens
    stream.close()  # a reader that leaves early
    ((whole,),) = fresh.generate([prompt], SamplingConfig(max_tokens=100))
    assert whole.tokens[: len(begun)] == begun
    assert list(generator.stream(prompt, SamplingConfig(max_tokens=9)))[-1].finish_reason


def test_log_probabilities_and_scores_are_those_of_the_full_forward_pass(params, generator):
    prompts = random_prompts(9, 3, 40)
    options = {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2, "logprobs": 3}
    completions = generator.generate(prompts, SamplingConfig(max_tokens=12, **options))
    sequences = [[*p, *c.tokens] for p, (c,) in zip(prompts, completions, strict=True)]
    scores = generator.score(sequences)
    forward = jax.jit(lambda tokens: Decoder(CONFIG).apply({"params": params}, tokens))
    for prompt, sequence, (completion,), score in zip(
        prompts, sequences, completions, scores, strict=True
    ):
        padded = np.zeros((1, 64), np.int32)  # padding on the right is invisible
        padded[0, : len(sequence)] = sequence
        logits = np.asarray(forward(padded)[0, : len(sequence) - 1])
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        expected = logprobs[np.arange(len(sequence) - 1), sequence[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.likeliest.tolist() == (np.argmax(logits, axis=-1) == sequence[1:]).tolist()
        begin = len(prompt) - 1
        np.testing.assert_allclose(completion.token_logprobs, expected[begin:], atol=1e-4)
        for row, top in zip(logprobs[begin:], completion.top_logprobs, strict=True):
            assert [token for token, _ in top] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][:3], atol=1e-4)


def test_scores_of_many_rows_and_chunks(params, monkeypatch):
    generator = Generator(CONFIG, params, max_batch=3)
    sequences = random_prompts(1, 70, 5, 33, 18, 70)
    expected = generator.score(sequences)
    assert [len(score.logprobs) for score in expected] == [0, 69, 4, 32, 17, 69]
    for sequence, score in zip(sequences, expected, strict=True):
        (alone,) = generator.score([sequence])
        np.testing.assert_allclose(alone.logprobs, score.logprobs, atol=1e-5)
        assert np.all(score.logprobs < 0)


def test_few_compilations_whatever_the_length(params):
    config = changed(rms_norm_eps=2e-5)  # programs of its own
    generator = Generator(config, params)
    counters = [programs.prefill, programs.draw_first, programs.advance]
    before = [counter._cache_size() for counter in counters]
    for length in range(1, 129, 3):
        generator.generate(random_prompts(length), SamplingConfig(max_tokens=1 + length % 40))
    prefill, draw, advance = (
        counter._cache_size() - count for counter, count in zip(counters, before, strict=True)
    )
    # Prefill: 16, 32, 64 and 128 tokens; 128 and 192 slots of cache.
    assert draw == 1
    assert advance <= 2
    assert prefill <= 5


def test_the_cache_under_a_window_does_not_grow_with_the_text(params):
    prompt = random_prompts(400)[0]
    sampling = SamplingConfig(max_tokens=100)
    kept = {}
    for window in (None, 40):
        generator = Generator(
            changed(sliding_window=window), params, tokenizer=Letters(), chunk_tokens=64
        )
        list(generator.stream(prompt, sampling))
        kept[window] = sum(leaf.nbytes for leaf in jax.tree.leaves(generator._kept.cache))
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, bytes
    assert kept[None] == 512 * slot
    assert kept[40] == 128 * slot  # the window and a chunk


def test_a_cache_has_room_for_the_text_so_far_not_for_all_that_was_allowed(params):
    config = changed(max_position_embeddings=100_000)
    generator = Generator(config, params, tokenizer=Letters())
    stream = generator.stream([1, 2, 3], SamplingConfig(max_tokens=50_000))
    chunks = [next(stream) for _ in range(3)]
    stream.close()
    assert generator._kept.cache.slots == 768
    assert sum(len(chunk.tokens) for chunk in chunks) == 17


def test_growing_changes_nothing(params, monkeypatch):
    prompt = random_prompts(100)[0]
    sampling = SamplingConfig(max_tokens=300)
    ((expected,),) = Generator(CONFIG, params).generate([prompt], sampling)
    monkeypatch.setattr("danube_jax.inference.buckets.ROOM_TOKENS", 1)
    ((grown,),) = Generator(CONFIG, params).generate([prompt], sampling)
    assert grown == expected


def test_decoding_writes_its_cache_in_place(params):
    batch, slots = 3, 192
    cache = init_cache(CONFIG, batch, slots, jnp.float32)
    rows = programs.Rows(
        token_B=jnp.zeros(batch, jnp.int32),
        time=jnp.int32(9),
        padding_B=jnp.zeros(batch, jnp.int32),
        done_B=jnp.zeros(batch, bool),
        keys_B=jax.random.split(jax.random.key(0), batch),
        seen_BV=None,
        stop_tokens=jnp.full(4, -1),
    )
    sampling = SamplingConfig()
    plan, values = SamplingPlan.of(sampling), SamplingValues.of(sampling)
    arguments = (Decoder(CONFIG), plan, params, values, rows, cache, jnp.int32(5))
    memory = programs.advance.lower(*arguments).compile().memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    # The scores take under a quarter; a copy of one of the cache's four arrays would add another.
    assert memory.temp_size_in_bytes < cache_bytes / 3


def test_bfloat16(params):
    prompts = random_prompts(20, 7)
    sampling = SamplingConfig(max_tokens=8, logprobs=1)
    exact = Generator(CONFIG, params)
    rounded = Generator(CONFIG, params, dtype=jnp.bfloat16, tokenizer=Letters())
    list(rounded.stream(prompts[0], sampling))
    assert rounded._kept.cache.keys[0].dtype == jnp.bfloat16
    mixed = Generator(CONFIG, params, cache_dtype=jnp.bfloat16, tokenizer=Letters())
    list(mixed.stream(prompts[0], sampling))
    assert mixed._kept.cache.values[0].dtype == jnp.bfloat16
    for (ours,), (theirs,) in zip(
        rounded.generate(prompts, sampling), exact.generate(prompts, sampling), strict=True
    ):
        # Logits of standard deviation near 3 from two layers of bfloat16 (2^-9 each rounding).
        first = ours.token_logprobs[0] - theirs.token_logprobs[0]
        assert abs(first) < 0.2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [67]], {}, "prompt 1 holds token 67"),
        ([[1] * 510], {}, "exceed the model's context of 512"),
        ([[1]], {"logprobs": 90}, "logprobs: expected at most 67"),
    ],
)
def test_refusals(generator, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generator.generate(prompts, SamplingConfig(max_tokens=5, **options))


def test_refusals_of_text_without_a_tokenizer(params):
    generator = Generator(CONFIG, params)
    with pytest.raises(UserError, match="stop_strings: they need a tokenizer"):
        generator.generate([[1]], SamplingConfig(stop_strings=("x",)))
    with pytest.raises(UserError, match="needs a tokenizer"):
        generator.stream([1])
    with pytest.raises(UserError, match="num_samples"):
        Generator(CONFIG, params, tokenizer=Letters()).stream([1], SamplingConfig(num_samples=2))
    assert generator.generate([[1]], SamplingConfig(max_tokens=2))[0][0].text is None


def test_nothing_to_do(generator):
    assert generator.generate([], SamplingConfig()) == []
    ((nothing,),) = generator.generate([[1]], SamplingConfig(max_tokens=0))
    assert (nothing.tokens, nothing.text, nothing.finish_reason) == ((), "", "length")
    (chunk,) = generator.stream([1], SamplingConfig(max_tokens=0))
    assert chunk.finish_reason == "length"
    assert generator.score([]) == []


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260k model")
@pytest.mark.parametrize("streamed", [False, True])
def test_stories260k_tells_its_published_story(streamed):
    tokenizers = pytest.importorskip("tokenizers")
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    fields = json.loads((STORIES / "config.json").read_text())
    names = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in fields.items() if name in names})
    state = safetensors_numpy.load_file(STORIES / "model.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    generator = Generator(config, params_from_hf(state, config), tokenizer=tokenizer)
    prompt, sampling = [fields["bos_token_id"]], SamplingConfig(max_tokens=205)
    if streamed:
        text = "".join(chunk.text for chunk in generator.stream(prompt, sampling))
    else:
        text = generator.generate([prompt], sampling)[0][0].text
    assert text.startswith((STORIES / "golden_greedy.txt").read_text())
