"""Models that the benchmarks share."""

import runpy
from pathlib import Path

from danube_jax.config import ModelConfig, parse_config
from danube_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

SMALL_MODELS = {
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8_192,
    ),
    "16m": ModelConfig(
        vocab_size=8_192,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8_192,
    ),
}


def named_model(name: str) -> ModelConfig:
    """A small model, or the model of a file in configs/.

    Raises:
      UserError: there is none of this name.
    """
    if name in SMALL_MODELS:
        return SMALL_MODELS[name]
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        known = [*SMALL_MODELS, *sorted(path.stem for path in CONFIGS.glob("*.py"))]
        raise UserError(f"--model={name}: expected one of {', '.join(known)}")
    return parse_config(runpy.run_path(str(path))["get_config"]()).model
