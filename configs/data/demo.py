"""The text of configs/demo.py through the whole pipeline, as a command of its own.

  python tools/prepare_data.py --config=configs/data/demo.py --config.output=demo_corpus

No download, no file: the text is what every installation carries. The steps are those of the
training demo (`builtin_corpus_config` lists them); a place to try steps and thresholds, and to see
what the page looks like.
"""

from danube_jax.data.corpus.config import stage
from danube_jax.data.corpus.prepare import builtin_corpus_config

BATCH_TOKENS = 2_048


def get_config():
    """The preparation as an ml_collections.ConfigDict."""
    config = builtin_corpus_config(
        {
            "docstrings": "docstrings",
            "packages": "package_descriptions",
            "reference": "language_reference",
        }
    )
    config.name = "demo"
    config.output = "demo_corpus"
    config.tokenizer.train_vocab_size = 2_048
    config.heldout_fraction = 0.02

    config.plan.batch_tokens = BATCH_TOKENS
    config.stages = (
        stage(
            name="broad",
            tokens=700_000,
            context_length=128,
            mixture={"docstrings_high": 0.80, "packages_high": 0.15, "reference_high": 0.05},
        ),
        stage(
            name="good",
            tokens=300_000,
            context_length=256,
            mixture={"docstrings_high": 0.50, "packages_high": 0.20, "reference_high": 0.30},
        ),
    )
    return config
