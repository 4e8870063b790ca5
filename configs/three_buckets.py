"""A small model in two stages on what configs/data/three_buckets.py prepares.

  python tools/plan_stages.py --config=configs/data/three_buckets.py --write=phases.py
  python -m danube_jax.train --config=configs/three_buckets.py:phases.py --workdir=run

The part after the colon is the file that tools/plan_stages.py wrote.
"""

import runpy
from pathlib import Path

from danube_jax.config import base_config
from danube_jax.errors import UserError


def get_config(phases: str = "phases.py"):
    """The run as an ml_collections.ConfigDict.

    Raises:
      UserError: there is no file `phases`.
    """
    if not Path(phases).is_file():
        raise UserError(
            f"{phases}: no such file; tools/plan_stages.py --write={phases} writes it (see the "
            "top of configs/three_buckets.py)"
        )
    config = base_config()
    config.name = "three_buckets"
    model = config.model
    model.vocab_size = 32_000
    model.hidden_size = 64
    model.intermediate_size = 192
    model.num_hidden_layers = 2
    model.num_attention_heads = 2
    model.num_key_value_heads = 1
    model.max_position_embeddings = 512
    model.tie_word_embeddings = True
    config.precision.linear = "float32"
    config.precision.compute = "float32"
    config.data.tokenizer.builtin = "mistral"
    config = runpy.run_path(phases)["set_data"](config)
    batch = config.training.batch_tokens
    config.optimizer.learning_rate = 8e-3
    config.optimizer.final_learning_rate = 4e-4
    config.optimizer.warmup_tokens = 10 * batch
    config.training.log_every = 8
    config.evaluation.every_steps = 24
    config.evaluation.tokens_per_source = 5_000
    config.checkpoint.every_steps = 100
    return config
