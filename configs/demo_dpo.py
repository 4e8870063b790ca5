"""From the demo's fine-tuned model to one that answers in whole sentences: DPO with LoRA.

Starts from `runs/demo_sft` and trains on built-in preferences, which put a sentence before a word;
needs no data file; a few minutes on two CPU cores.
"""

from danube_jax.config import base_config, source, tuning_round


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "demo_dpo"
    config.objective = "dpo"
    config.init_from.path = "runs/demo_sft"
    config.init_from.model_from_source = True
    config.precision.linear = config.precision.compute = "float32"

    config.data.sources = {"sentences": source(builtin="preferences")}
    config.data.heldout_fraction = 0.1
    config.rounds = (
        tuning_round(
            name="sentences", sources=("sentences",), epochs=1.0, context_length=256, batch_size=4
        ),
    )
    config.lora.rank, config.lora.alpha = 8, 16.0
    config.dpo.beta = 0.2

    optimizer = config.optimizer
    optimizer.learning_rate = 4e-4
    optimizer.final_learning_rate = 0.0
    optimizer.warmup_fraction = 0.1
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0

    config.training.log_every = 10
    config.evaluation.at_start = True
    config.evaluation.every_steps = 25
    config.checkpoint.every_steps = 25
    config.samples.prompts = (
        "What colour is a banana?",
        "What is the capital of Austria?",
        "Tell me where a penguin lives.",
    )
    config.samples.temperature = 0.0
    config.samples.max_tokens = 32
    return config
