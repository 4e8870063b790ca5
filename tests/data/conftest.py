import numpy as np
import pytest

from danube_jax import config
from danube_jax.data.token_store_writer import TokenStoreWriter


@pytest.fixture
def make_run():
    """Builds a validated RunConfig from (name, tokens, context, mixture[, batch]) rows."""

    def build(rows, *, seed=0, microbatch_tokens=None, max_epochs=1000.0, **data):
        names = {name: None for _, _, _, mixture, *_ in rows for name in mixture}
        sources = {name: {"path": f"/{name}", "max_epochs": max_epochs} for name in names}
        keys = ("name", "tokens", "context_length", "mixture", "batch_tokens")
        return config.parse_config(
            {
                "data": {"sources": sources, "tokenizer": {"path": "/tokenizer.model"}, **data},
                "phases": [dict(zip(keys, row, strict=False)) for row in rows],
                "training": {
                    "batch_tokens": 64,
                    "seed": seed,
                    "microbatch_tokens": microbatch_tokens,
                },
                "model": {"max_position_embeddings": 65_536},
            }
        )

    return build


@pytest.fixture
def make_store(tmp_path):
    """Writes a store of numbered tokens in documents of random length; several shards."""

    def build(name, tokens, seed=0):
        rng = np.random.default_rng([seed, tokens])
        text = rng.integers(60_000, size=tokens)
        ends = np.flatnonzero(rng.random(tokens) < 0.05)
        with TokenStoreWriter(
            tmp_path / name,
            vocab_size=65_536,
            tokenizer="none",
            provenance={},
            shard_tokens=tokens // 3 + 1,
        ) as writer:
            for document in np.split(text, ends):
                if len(document):
                    writer.add(document, len(document))
            return writer.finish()

    return build
