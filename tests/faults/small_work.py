"""Small pieces of work for the commands besides training."""

import json
from pathlib import Path
from pydoc_data.topics import topics

from tiny_folder import write_tiny_folder

TEXTS = [text for _, text in sorted(topics.items())]

PREPARATION = """
from danube_jax.data.corpus.config import corpus_config, text_source

def get_config():
    config = corpus_config()
    config.sources = {{
        "a": text_source(path="{folder}/a.jsonl"), "b": text_source(path="{folder}/b.jsonl")
    }}
    config.executor.workers = 2
    for step in ("language", "gopher_repetition", "gopher_quality", "fineweb", "unicode",
                 "masking"):
        config.steps[step].enabled = False
    config.tokenizer.train_vocab_size = 400
    config.task_bytes = 60_000
    config.heldout_fraction = 0.2
    return config
"""


def write_preparation(folder: Path) -> Path:
    """A config of a preparation of two sources, and their texts."""
    folder.mkdir(parents=True)
    for name, texts in (("a", TEXTS[:20]), ("b", TEXTS[18:32])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    config = folder / "preparation.py"
    config.write_text(PREPARATION.format(folder=folder))
    return config


def write_evaluation(folder: Path) -> list[str]:
    """Arguments of an evaluation of a tiny model, without its output."""
    folder.mkdir(parents=True)
    model = write_tiny_folder(folder / "model")
    data = folder / "data"
    data.mkdir()
    rows = (
        {
            "goal": " ".join(TEXTS[i].split()[:10]),
            "sol1": " ".join(TEXTS[i].split()[10:14]),
            "sol2": " ".join(TEXTS[i + 1].split()[10 : 13 + i % 5]),
            "label": i % 2,
        }
        for i in range(40)
    )
    (data / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--model={model}", "--tasks=piqa", f"--local_data={data}", "--log_samples"]
