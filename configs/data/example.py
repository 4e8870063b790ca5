"""A preparation to start from: web pages and books, cleaned and deduplicated.

Point the sources at your files and try it on a few first:

  python tools/prepare_data.py --config=configs/data/example.py \
    --config.sources.web.path='pages/*.jsonl.gz' --config.sources.books.path=books

Every step is switched by `enabled`; danube_jax/data/corpus/config.py lists all thresholds. The
stages are for tools/plan_stages.py.
"""

from danube_jax.data.corpus.config import corpus_config, stage, text_source


def get_config():
    """The preparation as an ml_collections.ConfigDict."""
    config = corpus_config()
    config.name = "example"
    config.output = "corpus"
    config.sources = {
        # The order ranks the sources: of near-duplicates, the one in the earlier source stays.
        "books": text_source(path="books"),
        "web": text_source(path="pages/*.jsonl.gz", text_column="text", url_column=""),
    }
    config.tokenizer.builtin = "mistral"  # extra 'mistral'; or a path, or train_vocab_size

    steps = config.steps
    steps.language.languages = ("en",)
    # C4's rule that a line ends in punctuation costs text with hard line breaks most of its lines.
    steps.c4.enabled = True
    steps.c4.terminal_punctuation = False
    steps.repeated_text.enabled = True
    steps.repeated_text.unit = "line"  # C4's rules leave no empty lines between paragraphs

    config.plan.batch_tokens = 262_144
    config.stages = (
        stage(
            name="broad",
            tokens=2_000_000_000,
            context_length=2_048,
            mixture={"web": 0.8, "books": 0.2},
        ),
        stage(
            name="good",
            tokens=500_000_000,
            context_length=4_096,
            mixture={"web": 0.5, "books": 0.5},
        ),
    )
    return config
