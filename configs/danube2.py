"""H2O-Danube2-1.8B: 2T more tokens in three stages whose share of web text falls.

Source: H2O-Danube-1.8B Technical Report (arXiv 2401.16818), section 7: no sliding window, context
8,192, Mistral's tokenizer, web text 84.5 %, 72.8 % and 55.5 % of the stages. The share of
instruction data in the last stage (40.6 %) is read off the report's Figure 2. Not published, and
so chosen here: the other shares, batch, learning rate and FP8 (Danube's), and the use of 8,192
tokens of context in every stage.

Point `data.sources` at your own TokenStores. The tokenizer comes with the extra
`pip install -e '.[mistral]'`; `data.tokenizer.path` takes any other SentencePiece model (then
clear `data.tokenizer.builtin`).
"""

from danube_jax.config import base_config, phase, source, whole_steps

BILLION = 10**9
BATCH_TOKENS = 144 * 8_192  # 1,179,648, as Danube

STAGES = (
    # billions of tokens, shares of web, instruct, curated (encyclopaedic, academic, synthetic)
    ("stage1", 1_000, {"web": 0.845, "instruct": 0.055, "curated": 0.100}),
    ("stage2", 950, {"web": 0.728, "instruct": 0.152, "curated": 0.120}),
    ("stage3", 50, {"web": 0.555, "instruct": 0.406, "curated": 0.039}),
)


def get_config():
    """The run as an ml_collections.ConfigDict."""
    config = base_config()
    config.name = "danube2"

    model = config.model
    model.model_type = "mistral"
    model.vocab_size = 32_000
    model.hidden_size = 2_560
    model.intermediate_size = 6_912
    model.num_hidden_layers = 24
    model.num_attention_heads = 32
    model.num_key_value_heads = 8
    model.max_position_embeddings = 8_192
    model.rope_theta = 10_000.0

    config.precision.linear = "fp8"  # of the blocks; the head stays in bfloat16

    config.data.tokenizer.builtin = "mistral"
    config.data.sources = {
        name: source(path=f"data/danube2/{name}/train", heldout_path=f"data/danube2/{name}/heldout")
        for name in ("web", "instruct", "curated")
    }

    config.training.batch_tokens = BATCH_TOKENS
    config.training.microbatch_tokens = 16_384
    config.phases = tuple(
        phase(
            name=name,
            tokens=whole_steps(billions * BILLION, BATCH_TOKENS),
            context_length=8_192,
            mixture=mixture,
        )
        for name, billions, mixture in STAGES
    )

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-4
    optimizer.final_learning_rate = 1e-5
    optimizer.warmup_tokens = 2_000 * BATCH_TOKENS
    optimizer.b1, optimizer.b2 = 0.9, 0.95
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 1_000
    config.checkpoint.keep_every_steps = 50_000
    config.samples.prompts = ("The most important thing about", "Water boils when")
    return config
