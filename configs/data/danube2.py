"""The three data stages of Danube2: noisy web text falls, instruction and clean text grow.

The report gives the web's share (84.5 %, 72.8 %, 55.5 %) and the stages' tokens (1 T, 0.95 T,
0.05 T), and a figure the 40.6 % of instruction data in the last stage. It does not give the other
shares: how the remainder is divided among them here is our choice, and so are the thresholds. Its
filters are heuristics, gradient-boosted trees and a BERT classifier; `steps.quality.model` takes
either kind of model.

  python tools/train_quality_model.py --good=good.jsonl.gz --bad=bad.jsonl.gz --output=quality.json
  python tools/prepare_data.py --config=configs/data/danube2.py
  python tools/plan_stages.py --config=configs/data/danube2.py --write=phases.py

To see epochs before there is any text: --available=web=1.8e12,instruct=2e10,... with every source
that the stages name.
"""

from danube_jax.data.corpus.config import corpus_config, stage, text_source

CONTEXT = 8_192
BATCH_TOKENS = 1_179_648


def get_config():
    """The preparation and its stages as an ml_collections.ConfigDict."""
    config = corpus_config()
    config.name = "danube2"
    config.output = "danube2_corpus"
    # The order ranks the sources: of near-duplicates, the one in the earlier source stays.
    config.sources = {
        "instruct": text_source(path="text/instruct"),
        "encyclopedia": text_source(path="text/encyclopedia"),
        "academic": text_source(path="text/academic"),
        "synthetic": text_source(path="text/synthetic"),
        "web": text_source(path="text/web", url_column="url"),
    }
    config.tokenizer.builtin = "mistral"

    steps = config.steps
    steps.c4.enabled = True
    steps.c4.terminal_punctuation = False
    steps.repeated_text.enabled = True
    steps.repeated_text.unit = "line"  # C4's rules leave no empty lines between paragraphs
    steps.decontamination.enabled = True
    steps.decontamination.path = "evaluation_sets"
    steps.quality.enabled = True
    steps.quality.model = "quality.json"
    steps.quality.min_score = 0.1

    config.plan.batch_tokens = BATCH_TOKENS
    config.plan.max_epochs = 4.0
    config.stages = (
        _stage("stage1", 1.0e12, web=84.5, instruct=1.5, encyclopedia=2, academic=6, synthetic=6),
        _stage("stage2", 0.95e12, web=72.8, instruct=5.2, encyclopedia=4, academic=10, synthetic=8),
        _stage(
            "stage3",
            0.05e12,
            web=55.5,
            instruct=40.6,
            encyclopedia=1.3,
            academic=1.3,
            synthetic=1.3,
        ),
    )
    return config


def _stage(name, tokens, **percent):
    return stage(name=name, tokens=int(tokens), context_length=CONTEXT, mixture=_shares(percent))


def _shares(percent):
    return {source: float(share) for source, share in percent.items()}
