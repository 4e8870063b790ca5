"""H2O-Danube-1.8B: supervised fine-tuning of the base model.

Source: H2O-Danube-1.8B Technical Report (arXiv 2401.16818), section 6.1: all layers, 157k samples
of four data sets, one epoch, learning rate 1e-5, batch 8, cosine with a short warm-up, context
16,384, prompt masked; trained with H2O LLM Studio, whose ways are followed where the report is
silent: prompt and answer tokenised separately, long conversations lose their beginning, no packing,
AdamW with betas 0.9 and 0.999 and no weight decay, no clipping, cosine to zero. Not published, and
so chosen here: the length of the warm-up, that a batch of 8 is that of all devices, and which
samples: the first 50,000 of each large set, and the best-ranked English conversations of Oasst2.

The data sets are on the Hugging Face Hub; put the files into the folders below.

    Open-Orca/OpenOrca              1M-GPT4-Augmented.parquet
    meta-math/MetaMathQA            MetaMathQA-395K.json
    HuggingFaceH4/ultrachat_200k    train_sft-*.parquet
    OpenAssistant/oasst2            train-*.parquet
"""

from danube_jax.config import base_config, source, tuning_round

SAMPLES = 50_000  # of each large set


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube_sft"
    config.objective = "sft"
    config.init_from.path = "runs/danube"
    config.init_from.model_from_source = True

    config.data.sources = {
        "openorca": source(path="data/chat/openorca", max_examples=SAMPLES),
        "metamathqa": source(path="data/chat/metamathqa", max_examples=SAMPLES),
        "ultrachat": source(path="data/chat/ultrachat_200k", max_examples=SAMPLES),
        "oasst2": source(path="data/chat/oasst2", format="oasst", language="en"),
    }
    config.data.heldout_fraction = 0.01

    chat = config.chat
    chat.template = "danube"
    chat.tokenization = "separate"
    chat.truncation = "left"
    chat.packing = "none"
    chat.on_bad_row = "skip"  # a few conversations of these sets have an empty turn
    config.rounds = (
        tuning_round(
            name="sft",
            sources=tuple(config.data.sources),
            epochs=1.0,
            context_length=16_384,
            batch_size=8,
        ),
    )
    config.training.microbatch_tokens = 16_384
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
