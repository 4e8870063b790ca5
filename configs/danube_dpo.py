"""H2O-Danube-1.8B: two rounds of DPO after supervised fine-tuning.

Source: H2O-Danube-1.8B Technical Report (arXiv 2401.16818), section 6.2: UltraFeedback Binarized,
Orca DPO Pairs and Distilabel Math Preferences; then pairs of Oasst2, English, of the best-ranked
and the worst-ranked answer. LoRA of rank 4 with alpha 16, one epoch, batch 2, beta 0.2, learning
rate 1e-5, in the second round 3e-6, cosine. H2O LLM Studio's ways where the report is silent: LoRA
dropout 0.05 on all linear layers but the head, clipping at 10, AdamW with betas 0.9 and 0.999,
no weight decay, cosine to zero, tokenised separately. Not published, and so chosen here: the
lengths, all pairs of each set, and that a batch of 2 is that of all devices. For more devices raise
`batch_size`. A row holds both answers of a pair.

The data sets are on the Hugging Face Hub; put the files into the folders below.

    HuggingFaceH4/ultrafeedback_binarized      train_prefs-*.parquet
    Intel/orca_dpo_pairs                       orca_rlhf.jsonl
    argilla/distilabel-math-preference-dpo     train-*.parquet
    OpenAssistant/oasst2                       train-*.parquet
"""

from danube_jax.config import base_config, source, tuning_round

CONTEXT = 8_192


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube_dpo"
    config.objective = "dpo"
    config.init_from.path = "runs/danube_sft"
    config.init_from.model_from_source = True

    config.data.sources = {
        "ultrafeedback": source(path="data/preferences/ultrafeedback_binarized"),
        "orca": source(path="data/preferences/orca_dpo_pairs"),
        "math": source(path="data/preferences/distilabel_math"),
        "oasst2": source(path="data/chat/oasst2", format="oasst", language="en"),
    }
    config.data.heldout_fraction = 0.01

    chat = config.chat
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
