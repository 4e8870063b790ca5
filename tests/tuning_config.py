"""Small tuning runs from a tiny Llama with random weights, for the tests of tuning."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from danube_jax.config import parse_config
from danube_jax.training.run import train
from danube_jax.training.signals import StopRequest

CONFIG = """
from danube_jax.config import base_config, source, tuning_round

def get_config():
    config = base_config()
    config.name = "tuned"
    config.objective = "{objective}"
    config.init_from.path = "{base}"
    config.init_from.model_from_source = True
    config.precision.linear = config.precision.compute = "float32"
    config.data.sources = {{"rows": source(path="{data}")}}
    config.data.heldout_fraction = 0.2
    config.chat.template = "danube"
    config.chat.truncation = "right"
    config.rounds = (tuning_round(
        name="first", sources=("rows",), epochs=2.0, context_length=96, batch_size=2
    ),)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 0.0
    config.training.log_every = 1
    config.evaluation.at_start = True
    config.checkpoint.every_steps = 2
    config.samples.prompts = ("What is 3?",)
    config.samples.max_tokens = 4
    config.samples.temperature = 0.0
    return config
"""

THINGS = ("lists", "tuples", "dicts", "sets", "loops", "names", "types", "calls", "files", "tests")


def conversation_rows() -> list[dict[str, Any]]:
    """Conversations of one question."""
    return [
        {"prompt": f"What are {thing} number {i}?", "response": f"{thing} are {thing}."}
        for i in range(2)
        for thing in THINGS
    ]


def preference_rows() -> list[dict[str, Any]]:
    """Preferences for the longer answer."""
    return [
        {"prompt": f"{thing} {i}?", "chosen": f"{thing}, of course.", "rejected": "No."}
        for i in range(2)
        for thing in THINGS
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path: Path, *, objective: str, base: Path, data: Path) -> Path:
    """A config file of a small tuning run."""
    path.write_text(CONFIG.format(objective=objective, base=base, data=data))
    return path


def load_config(path: Path) -> Any:
    """What the file's `get_config` returns."""
    spec = importlib.util.spec_from_file_location("tuning_config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tune(config: Any, workdir: Path, **training: Any) -> Path:
    """Runs a config in this process; `training` changes keys of that section."""
    config = config.copy_and_resolve_references()
    config.training.update(training)
    with StopRequest() as stop:
        assert train(parse_config(config), workdir, stop) == 0
    return workdir
