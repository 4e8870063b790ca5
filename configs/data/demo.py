"""Text that every installation carries, through the whole pipeline: no download, no file.

  python tools/prepare_data.py --config=configs/data/demo.py --config.output=demo_corpus

A place to try steps and thresholds, and to see what the page looks like.
"""

from danube_jax.data.corpus.config import corpus_config, stage, text_source

BATCH_TOKENS = 2_048


def get_config():
    """The preparation as an ml_collections.ConfigDict."""
    config = corpus_config()
    config.name = "demo"
    config.output = "demo_corpus"
    config.sources = {
        "reference": text_source(builtin="language_reference"),
        "packages": text_source(builtin="package_descriptions"),
        "docstrings": text_source(builtin="docstrings"),
    }
    config.tokenizer.train_vocab_size = 2_048
    config.heldout_fraction = 0.05

    steps = config.steps
    # Docstrings are short, and their names of functions are no English.
    steps.language.min_score = 0.5
    steps.gopher_quality.min_words = 20
    steps.gopher_quality.min_alphabetic_words = 0.65
    steps.gopher_quality.min_stop_words = 1
    steps.gopher_repetition.duplicate_5_gram = 0.25
    steps.fineweb.max_duplicate_characters = 0.1
    steps.repeated_text.enabled = True
    steps.repeated_text.min_document_characters = 80

    config.plan.batch_tokens = BATCH_TOKENS
    config.stages = (
        stage(
            name="broad",
            tokens=700_000,
            context_length=128,
            mixture={"docstrings": 0.80, "packages": 0.15, "reference": 0.05},
        ),
        stage(
            name="good",
            tokens=300_000,
            context_length=256,
            mixture={"docstrings": 0.50, "packages": 0.20, "reference": 0.30},
        ),
    )
    return config
