"""From the demo's base model to one that answers: supervised fine-tuning of all weights.

Starts from `runs/demo` (`python -m danube_jax.train --config=configs/demo.py`) and trains on the
built-in conversations, so that it needs no data file; a few minutes on two CPU cores.
"""

from danube_jax.config import base_config, source, tuning_round


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "demo_sft"
    config.objective = "sft"
    config.init_from.path = "runs/demo"
    config.init_from.model_from_source = True
    config.precision.linear = config.precision.compute = "float32"

    config.data.sources = {"facts": source(builtin="chat")}
    config.data.heldout_fraction = 0.1
    config.chat.template = "danube"
    config.rounds = (
        tuning_round(
            name="facts", sources=("facts",), epochs=12.0, context_length=512, batch_size=4
        ),
    )

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-3
    optimizer.final_learning_rate = 0.0
    optimizer.warmup_fraction = 0.05
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0

    config.training.log_every = 10
    config.evaluation.at_start = True
    config.evaluation.every_steps = 100
    config.checkpoint.every_steps = 50
    config.samples.prompts = (
        "What colour is a banana?",
        "What is the capital of Austria?",
        "Tell me where a penguin lives.",
    )
    config.samples.temperature = 0.0
    config.samples.max_tokens = 32
    return config
