"""A small published model taught Danube's chat format on real instructions: SFT with LoRA.

Starts from a Hugging Face folder of SmolLM2-135M-Instruct and trains on rows of
mosaicml/dolly_hhrlhf (`dolly_hhrlhf_train_small.jsonl` of llm-foundry). Small enough for two CPU
cores; commands and figures are in docs/tuning.md. With more of a machine, take all rows
(`max_examples`) and longer ones (`context_length`).
"""

from danube_jax.config import base_config, source, tuning_round


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "smollm2_sft"
    config.objective = "sft"
    config.init_from.path = "models/SmolLM2-135M-Instruct"
    config.init_from.model_from_source = True
    config.precision.linear = config.precision.compute = "float32"

    config.data.sources = {"dolly": source(path="data/dolly_hhrlhf.jsonl", max_examples=600)}
    config.data.heldout_fraction = 0.2
    config.chat.template = "danube"  # in place of the model's own
    config.rounds = (
        tuning_round(
            name="dolly", sources=("dolly",), epochs=1.0, context_length=128, batch_size=4
        ),
    )
    config.lora.rank, config.lora.alpha, config.lora.dropout = 16, 32.0, 0.05

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-3
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
