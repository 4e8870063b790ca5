"""H2O-Danube2-1.8B: two rounds of DPO after supervised fine-tuning.

The report (arXiv 2401.16818, section 7) says that its chat model followed the concepts of the first
one, without figures: data and hyperparameters are those of `danube_dpo`. Danube2's own are the
tokenizer, rows of 8,192, no sliding window, and a chat template that refuses a system text,
which here is merged into the first question.
"""

from danube_jax.config import base_config, source, tuning_round

CONTEXT = 8_192


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube2_dpo"
    config.objective = "dpo"
    config.init_from.path = "runs/danube2_sft"
    config.init_from.model_from_source = True

    config.data.sources = {
        "ultrafeedback": source(path="data/preferences/ultrafeedback_binarized"),
        "orca": source(path="data/preferences/orca_dpo_pairs"),
        "math": source(path="data/preferences/distilabel_math"),
        "oasst2": source(path="data/chat/oasst2", format="oasst", language="en"),
    }
    config.data.heldout_fraction = 0.01

    chat = config.chat
    chat.system_text = "merge"
    chat.tokenization = "separate"
    chat.truncation = "left"
    chat.packing = "none"
    chat.on_bad_row = "skip"  # some pairs of these sets have two equal answers
    config.rounds = (
        tuning_round(
            name="feedback",
            sources=("ultrafeedback", "orca", "math"),
            context_length=CONTEXT,
            batch_size=2,
        ),
        tuning_round(
            name="oasst2",
            sources=("oasst2",),
            context_length=CONTEXT,
            batch_size=2,
            learning_rate=3e-6,
        ),
    )

    config.lora.rank, config.lora.alpha, config.lora.dropout = 4, 16.0, 0.05
    config.dpo.beta = 0.2
    config.model.remat = "full"

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-5
    optimizer.final_learning_rate = 0.0
    optimizer.b1, optimizer.b2 = 0.9, 0.999
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 10.0

    config.evaluation.every_steps = 500
    config.checkpoint.every_steps = 500
    config.samples.prompts = ("Why is drinking water so healthy?", "What is 17 times 6?")
    config.samples.max_tokens = 256
    config.samples.temperature = 0.0
    return config
