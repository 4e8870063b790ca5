"""Books and software manuals, cleaned, scored and divided into three quality buckets.

docs/corpus.md says where the text comes from and what came out. The paths are relative to the
folder in which the command is given; `steps.quality.model` is a file of
tools/train_quality_model.py.
"""

from danube_jax.data.corpus.config import corpus_config, stage, text_source

BATCH_TOKENS = 8_192


def get_config():
    """The preparation as an ml_collections.ConfigDict."""
    config = corpus_config()
    config.name = "three_buckets"
    config.output = "corpus"
    config.sources = {
        "books": text_source(path="text/books.jsonl.gz"),
        "proposals": text_source(path="text/proposals.jsonl.gz"),
        "manuals": text_source(path="text/manuals/*.jsonl.gz", id_column="id"),
    }
    config.tokenizer.builtin = "mistral"
    config.heldout_fraction = 0.03
    config.min_heldout_documents = 0  # a tenth of 71 books would be much text
    config.task_bytes = 8_000_000

    steps = config.steps
    steps.repeated_text.enabled = True
    # Whole books are one document each, and manuals name commands and options on every line.
    steps.gopher_quality.max_words = 0
    steps.gopher_quality.min_alphabetic_words = 0.6
    steps.gopher_repetition.duplicate_5_gram = 0.25
    steps.gopher_repetition.duplicate_6_gram = 0.24
    steps.gopher_repetition.duplicate_7_gram = 0.23
    steps.gopher_repetition.duplicate_8_gram = 0.22
    steps.gopher_repetition.duplicate_9_gram = 0.21
    steps.gopher_repetition.duplicate_10_gram = 0.20
    steps.fineweb.max_duplicate_characters = 0.1
    steps.fineweb.min_punctuated_lines = 0.05

    steps.quality.enabled = True
    steps.quality.model = "quality.json"
    steps.quality.buckets = ("high", "medium", "low")
    steps.quality.shares = (0.25, 0.5)  # of the documents; the rest is low

    config.plan.batch_tokens = BATCH_TOKENS
    config.stages = (
        stage(
            name="broad",
            tokens=400_000,
            context_length=256,
            mixture={
                **{"manuals_low": 0.25, "manuals_medium": 0.25, "manuals_high": 0.2},
                **{"books_high": 0.25, "proposals_high": 0.05},
            },
        ),
        stage(
            name="good",
            tokens=130_000,
            context_length=512,
            mixture={"manuals_high": 0.5, "books_high": 0.4, "proposals_high": 0.1},
        ),
    )
    return config
