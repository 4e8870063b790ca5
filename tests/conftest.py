"""Fixtures: eight virtual CPU devices, and a small tokenised corpus."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import atexit
import dataclasses
import itertools
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Tests send it to themselves and to commands; a background job ignores it, and so would these.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The many short runs of the tests compile the same few programs; sharing them halves the time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's workers share that of their parent
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="danube_jax_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

CONFIG = """
from danube_jax.config import base_config, phase, source

def get_config():
    config = base_config()
    config.name = "tiny"
    model = config.model
    model.vocab_size = 400
    model.hidden_size = 32
    model.intermediate_size = 64
    model.num_hidden_layers = 2
    model.num_attention_heads = 4
    model.num_key_value_heads = 2
    model.max_position_embeddings = 64
    config.precision.linear = config.precision.compute = "float32"
    config.data.tokenizer.path = "{corpus}/tokenizer.model"
    config.data.sources = {{
        name: source(
            path="{corpus}/" + name + "/train", heldout_path="{corpus}/" + name + "/heldout"
        )
        for name in ("first", "second")
    }}
    config.training.batch_tokens = 512
    config.training.log_every = 1
    config.phases = (
        phase(name="short", tokens=24 * 512, context_length=32,
              mixture={{"first": 0.7, "second": 0.3}}),
        phase(name="long", tokens=36 * 512, context_length=64,
              mixture={{"first": 0.2, "second": 0.8}}),
    )
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-4
    config.optimizer.warmup_tokens = 5 * 512
    config.evaluation.every_steps = 30
    config.evaluation.tokens_per_source = 2_000
    config.checkpoint.every_steps = 10
    return config
"""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenizer of 400 pieces and two sources, each with train and held-out stores."""

    path: Path
    config: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Real English (the language reference), tokenised into two sources."""
    from pydoc_data.topics import topics

    from danube_jax.config import TokenizerConfig
    from danube_jax.data.token_store_writer import TokenStoreWriter
    from danube_jax.data.tokenizer import load_tokenizer, train_bpe

    path = tmp_path_factory.mktemp("corpus")
    texts = [text for _, text in sorted(topics.items())]
    train_bpe(iter(texts[:40]), path / "tokenizer.model", 400)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(path / "tokenizer.model")))
    thirds = {"first/train": 0, "second/train": 1, "first/heldout": 2, "second/heldout": 2}
    for name, remainder in thirds.items():
        with TokenStoreWriter(
            path / name,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            provenance={"text": "pydoc_data.topics"},
        ) as writer:
            for text in itertools.islice(texts, remainder, 60, 3):
                ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                writer.add(ids, len(text.encode()))
            writer.finish()
    config = path / "tiny.py"
    config.write_text(CONFIG.format(corpus=path))
    return Corpus(path, config)
