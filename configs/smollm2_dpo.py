"""From `smollm2_sft` to one that puts things politely: DPO with LoRA on real preferences.

Trains on pairs of a polite answer and one that is not, from rasbt/LLMs-from-scratch
(`instruction-data-with-preference.json`). Small enough for two CPU cores; commands and figures are
in docs/tuning.md.
"""

from danube_jax.config import base_config, source, tuning_round


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "smollm2_dpo"
    config.objective = "dpo"
    config.init_from.path = "runs/smollm2_sft"
    config.init_from.model_from_source = True
    config.precision.linear = config.precision.compute = "float32"

    config.data.sources = {"politeness": source(path="data/preferences.jsonl", max_examples=160)}
    config.data.heldout_fraction = 0.3
    config.chat.on_bad_row = "skip"  # some pairs have two equal answers
    config.rounds = (
        tuning_round(
            name="politeness", sources=("politeness",), epochs=1.0, context_length=256, batch_size=2
        ),
    )
    config.lora.rank, config.lora.alpha, config.lora.dropout = 16, 32.0, 0.05
    config.dpo.beta = 0.1
    config.dpo.reference = "cache"

    optimizer = config.optimizer
    optimizer.learning_rate = 5e-4
    optimizer.final_learning_rate = 0.0
    optimizer.warmup_fraction = 0.1
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0

    config.training.microbatch_tokens = 512
    config.training.log_every = 5
    config.evaluation.at_start = True
    config.checkpoint.every_steps = 20
    config.samples.prompts = (
        "What is the capital of France?",
        "Give me three tips for staying healthy.",
        "Correct the spelling: I recieved your mesage.",
    )
    config.samples.temperature = 0.0
    config.samples.max_tokens = 48
    return config
