"""Run folders for the report's tests: what a run leaves behind, without the run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from danube_jax.config import base_config, parse_config, phase, source, to_dict

BATCH = 512
STEPS = 60  # 24 of phase "short", 36 of phase "long"


def run_config(**changes: Any) -> dict[str, Any]:
    """The config of a small run of two sources and two phases, as config.json holds it."""
    config = base_config()
    config.name = "tiny"
    model = config.model
    model.vocab_size, model.hidden_size, model.intermediate_size = 400, 32, 64
    model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads = 2, 4, 2
    model.max_position_embeddings = 64
    config.data.tokenizer.path = "tokenizer.model"
    config.data.sources = {name: source(path=name) for name in ("first", "second")}
    config.training.batch_tokens = BATCH
    config.phases = (
        phase(
            name="short",
            tokens=24 * BATCH,
            context_length=32,
            mixture={"first": 0.7, "second": 0.3},
        ),
        phase(
            name="long", tokens=36 * BATCH, context_length=64, mixture={"first": 0.2, "second": 0.8}
        ),
    )
    config.samples.prompts = ("The function", "If the value")
    return to_dict(dataclasses.replace(parse_config(config), **changes))


def train_row(step: int, **more: Any) -> dict[str, Any]:
    """A logged step with figures that anyone can compute again."""
    long = step > 24
    return {
        "kind": "train",
        "step": step,
        "tokens": step * BATCH,
        "phase": "long" if long else "short",
        "context": 64 if long else 32,
        "loss": 3 + 4 * math.exp(-step / 20) + 0.1 * math.sin(step),
        "grad_norm": 0.5 + 1 / step,
        "learning_rate": 3e-3 * min(step / 5, 1),
        "tokens_per_second": 1_000.0,
        "tflops_per_second_per_device": 0.01,
        "mfu": None,
        "data_wait": 0.01,
        "memory_bytes": 10**9,
        "z_loss": 0.0,
        "skipped": 0,
        **more,
    }


def evaluation_row(step: int) -> dict[str, Any]:
    """A held-out evaluation."""
    row = {"kind": "evaluation", "step": step, "tokens": step * BATCH, "context": 64}
    for index, name in enumerate(("first", "second")):
        row |= {f"loss/{name}": 5 - step / 30 + index, f"bits_per_byte/{name}": 2 - step / 90}
    return row


def event_row(event: str, step: int, **details: Any) -> dict[str, Any]:
    """An event, a second a step after 2026-01-01 00:00 UTC."""
    place = {"step": step, "tokens": step * BATCH, "time": 1_767_225_600.0 + step}
    return {"kind": "event", "event": event, **place, **details}


def default_rows(steps: int = STEPS) -> list[dict[str, Any]]:
    """A run without trouble: rows of every kind."""
    versions = {"danube_jax": "9.8.7", "jax": "6.5.4"}
    start = {"versions": versions, "device": "test device", "devices": 8, "parameters": 43_210}
    rows = [event_row("start", 0, **start)]
    for step in range(1, steps + 1):
        rows.append(train_row(step))
        if step == 24:
            rows.append(event_row("phase", 24, phase="long", context=64))
        if step % 30 == 0:
            rows.append(evaluation_row(step))
    return [*rows, event_row("finished", steps, unigram={"first": 5.5, "second": 5.75})]


def make_run(
    path: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    samples: dict[int, tuple[str, ...]] | None = None,
) -> Path:
    """Writes a run's folder and returns it; `samples` maps steps to texts."""
    path.mkdir(parents=True, exist_ok=True)
    saved = {"danube_jax": "0.1.0", "config": run_config() if config is None else config}
    (path / "config.json").write_text(json.dumps(saved))
    rows = default_rows() if rows is None else rows
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples is None:
        samples = {
            step: (f"The function is {step}.", f"If the value is {step}.") for step in (30, 60)
        }
    for step, texts in samples.items():
        (path / "samples").mkdir(exist_ok=True)
        content = "\n\n---\n\n".join(texts) + "\n"
        (path / "samples" / f"step-{step:08d}.txt").write_text(content)
    return path
