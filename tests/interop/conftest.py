"""Fixtures: a run of four steps, and folders that transformers wrote."""

import dataclasses
import importlib.util
import io
import shutil
from pathlib import Path

import pytest


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained workdir with checkpoints 2 and 4."""

    path: Path
    tokenizer: Path

    def copy(self, path: Path) -> Path:
        shutil.copytree(self.path, path)
        return path


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> Run:
    """A tiny windowed model with more rows than its tokenizer has ids: four steps in FP8."""
    from danube_jax.config import parse_config
    from danube_jax.training.run import train
    from danube_jax.training.signals import StopRequest

    spec = importlib.util.spec_from_file_location("tiny_config", corpus.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.vocab_size = 416
    config.model.sliding_window = 8
    config.model.rope_theta = 50_000.0
    config.precision.linear = "fp8"
    config.training.max_steps = 4
    config.evaluation.every_steps = 4
    config.checkpoint.every_steps = 2
    workdir = tmp_path_factory.mktemp("interop") / "run"
    with StopRequest() as stop:
        assert train(parse_config(config), workdir, stop) == 0
    return Run(workdir, corpus.path / "tokenizer.model")


@pytest.fixture
def messages(monkeypatch) -> io.StringIO:
    """What the user is shown during the test."""
    from rich.console import Console

    from danube_jax import console

    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, soft_wrap=True))
    return shown


SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def save_hf(tmp_path_factory):
    """A function that writes a random model with transformers and returns its folder."""

    def save(architecture="mistral", *, dtype="bfloat16", shards=False, bin_file=False, **changes):
        import torch
        import transformers

        torch.manual_seed(0)
        if architecture == "mistral":
            changes = {"sliding_window": 7} | changes
            config = transformers.MistralConfig(**(SMALL | changes))
            model = transformers.MistralForCausalLM(config)
        else:
            config = transformers.LlamaConfig(**(SMALL | changes))
            model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():  # fresh scales are one, which would hide a lost scale
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        model = model.to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp("hf") / "model"
        model.save_pretrained(folder, max_shard_size="12KB" if shards else "5GB")
        if bin_file:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        return folder

    return save


@pytest.fixture(scope="session")
def hf_folder(save_hf) -> Path:
    """One such folder, to be copied before it is changed."""
    return save_hf()
