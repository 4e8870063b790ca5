"""H2O-Danube2-1.8B: supervised fine-tuning of the base model.

The report (arXiv 2401.16818, section 7) says that its chat model followed the concepts of the first
one, without figures: data and hyperparameters are those of `danube_sft`. Danube2's own are the
tokenizer, context 8,192, no sliding window, and a chat template that refuses a system text,
which here is merged into the first question.
"""

from danube_jax.config import base_config, source, tuning_round

SAMPLES = 50_000  # of each large set


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube2_sft"
    config.objective = "sft"
    config.init_from.path = "runs/danube2"
    config.init_from.model_from_source = True

    config.data.sources = {
        "openorca": source(path="data/chat/openorca", max_examples=SAMPLES),
        "metamathqa": source(path="data/chat/metamathqa", max_examples=SAMPLES),
        "ultrachat": source(path="data/chat/ultrachat_200k", max_examples=SAMPLES),
        "oasst2": source(path="data/chat/oasst2", format="oasst", language="en"),
    }
    config.data.heldout_fraction = 0.01

    chat = config.chat
    chat.template = "danube2"
    chat.system_text = "merge"
    chat.tokenization = "separate"
    chat.truncation = "left"
    chat.packing = "none"
    chat.on_bad_row = "skip"  # a few conversations of these sets have an empty turn
    config.rounds = (
        tuning_round(
            name="sft",
            sources=tuple(config.data.sources),
            epochs=1.0,
            context_length=8_192,
            batch_size=8,
        ),
    )
    config.training.microbatch_tokens = 8_192
    config.model.remat = "full"

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-5
    optimizer.final_learning_rate = 0.0
    optimizer.warmup_fraction = 0.01
    optimizer.b1, optimizer.b2 = 0.9, 0.999
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 0.0

    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 1_000
    config.samples.prompts = ("Why is drinking water so healthy?", "What is 17 times 6?")
    config.samples.max_tokens = 256
    config.samples.temperature = 0.0
    return config
