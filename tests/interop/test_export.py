"""Export: what the folder holds, that it computes the same, and what stops it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from danube_jax.data.chat import TEMPLATES
from danube_jax.data.tokenizer import SentencePieceTokenizer
from danube_jax.errors import RunError, UserError
from danube_jax.interop import export_hf, hf_config
from danube_jax.interop.export_hf import ExportOptions, export_model, parse_size
from danube_jax.interop.hf_weights import Leaf, layout
from danube_jax.interop.model_source import open_model
from danube_jax.interop.verify import HARD_TEXTS, our_logits

torch = pytest.importorskip("torch")
UNCHECKED = ExportOptions(verify=False)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The run as a bfloat16 folder in several shards with a chat template, and its check."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    options = ExportOptions(shard_bytes=30_000, chat_template="danube2", license="mit")
    return export_model(open_model(trained.path), folder, options)


def test_every_file_and_field_that_others_read(exported, trained):
    folder = exported.path
    config = json.loads((folder / "config.json").read_text())
    # transformers 4 and vLLM: torch_dtype, rope_theta; transformers 5: dtype, rope_parameters;
    # llama.cpp: architectures, rope_theta, head_dim, sliding_window, vocab_size.
    expected = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 416,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "rope_theta": 50_000,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 50_000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    assert {key: config.get(key) for key in expected} == expected
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {"bos_token_id", "eos_token_id", "pad_token_id"} <= generation.keys()

    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == TEMPLATES["danube2"]
    assert (folder / "chat_template.jinja").read_text() == TEMPLATES["danube2"]
    assert tokenizer_config["add_bos_token"] is True
    assert tokenizer_config["model_max_length"] == 64
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer_config["model_input_names"] == ["input_ids", "attention_mask"]
    assert (folder / "tokenizer.model").read_bytes() == trained.tokenizer.read_bytes()
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "special_tokens_map.json").is_file()


def test_shards_and_index(exported):
    from safetensors import safe_open

    folder = exported.path
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not (folder / "model.safetensors").exists()
    assert len(exported.files) > 2
    assert sorted(exported.files) == sorted(set(index["weight_map"].values()))
    total = 0
    for name in exported.files:
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                assert index["weight_map"].pop(key) == name
                tensor = file.get_tensor(key)
                assert tensor.dtype == torch.bfloat16
                total += tensor.nbytes
        assert (folder / name).stat().st_size < 30_000 + 2_000
    assert index["weight_map"] == {}
    assert index["metadata"]["total_size"] == total


def test_transformers_computes_the_same(exported, trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = open_model(trained.path)
    tokens = np.random.default_rng(1).integers(0, 416, (2, 40))  # past the window of 8
    model = AutoModelForCausalLM.from_pretrained(exported.path, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), source.load_params())
    np.testing.assert_allclose(our_logits(source.config, rounded, tokens), theirs, atol=1e-4)
    ours = SentencePieceTokenizer(trained.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(exported.path)
    for text in HARD_TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode(text, bos=True)


def test_the_state_of_fp8_is_in_the_checkpoint_and_not_in_the_export(exported, trained):
    from safetensors import safe_open

    meta = json.loads((trained.path / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert any(name.startswith(".fp8") for name in meta["checksums"])
    names = set()
    for name in exported.files:
        with safe_open(exported.path / name, "np") as file:
            names |= set(file.keys())
    expected = {t.name for leaf in layout(open_model(trained.path).config) for t in leaf.tensors}
    assert names == expected


def test_the_check_reports_what_the_dtype_costs(exported, trained, tmp_path):
    found = exported.comparison
    assert found.max_difference < 1e-4
    assert found.dtype_max_difference > 3 * found.max_difference  # bfloat16 has 8 bits
    assert 0 < found.dtype_kl < 1e-3
    assert (found.tokens, found.texts) == (128, len(HARD_TEXTS))
    options = ExportOptions(dtype="float32")
    exact = export_model(open_model(trained.path), tmp_path / "f32", options)
    assert exact.files == ("model.safetensors",)
    assert exact.comparison.dtype_max_difference == exact.comparison.max_difference < 1e-4
    assert not (tmp_path / "f32" / "chat_template.jinja").exists()


def test_the_model_card_tells_how_the_model_was_made(exported):
    card = (exported.path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlanguage:\n- en\nlibrary_name: transformers\n")
    for text in (
        "# tiny",
        "pipeline_tag: text-generation",
        "| parameters | 45,216 |",
        "| sliding window | 8 |",
        "| tokens seen | 2,048 |",
        "| batch | 512 tokens |",
        "AdamW, beta1 0.9, beta2 0.95",
        "| short | 12,288 | 32 | first 70.0%, second 30.0% |",
        "| long | 18,432 | 64 | first 20.0%, second 80.0% |",
        "### Held-out text, step 4, context 32",
        "| first | ",
        "<|prompt|>Why is the sky blue?</s><|answer|>",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert text in card


def test_an_older_checkpoint_stands_in_for_a_damaged_one(trained, tmp_path, messages):
    workdir = trained.copy(tmp_path / "run")
    for path in (workdir / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    source = open_model(workdir)
    assert source.steps == (4, 2)
    result = export_model(source, tmp_path / "out", UNCHECKED)
    assert result.step == 2
    assert "checkpoints/4: checkpoint cannot be used: " in messages.getvalue()
    assert (workdir / "checkpoints" / "4").is_dir()
    _, step = source.load_params_and_step()
    assert step == 2
    with pytest.raises(UserError, match="checkpoint 4 cannot be used"):
        export_model(open_model(workdir / "checkpoints" / "4"), tmp_path / "four", UNCHECKED)
    assert not (tmp_path / "four").exists()


def test_a_step_can_be_chosen(trained, tmp_path):
    from safetensors.torch import load_file

    for step in (2, 4):
        source = open_model(trained.path, step)
        assert source.step == step
        assert export_model(source, tmp_path / str(step), UNCHECKED).step == step
    two, four = (load_file(tmp_path / str(s) / "model.safetensors") for s in (2, 4))
    assert two.keys() == four.keys()
    assert not torch.equal(two["lm_head.weight"], four["lm_head.weight"])


def swapped(leaf, array, to_tensors=Leaf.to_tensors):
    """A mistake in the layout: gate and up in each other's place."""
    parts = list(to_tensors(leaf, array))
    if len(parts) == 2:
        (gate, a), (up, b) = parts
        parts = [(gate, b), (up, a)]
    yield from parts


def wrong_theta(*args, export_config=hf_config.export_config, **options):
    content = export_config(*args, **options)
    content["rope_parameters"]["rope_theta"] = content["rope_theta"] = 10_000.0
    return content


@pytest.mark.parametrize(
    ("target", "name", "mistake", "message"),
    [
        (Leaf, "to_tensors", swapped, "transformers computes other logits"),
        (hf_config, "export_config", wrong_theta, "rope_theta reads 10000.0; expected 50000.0"),
        (export_hf, "_write_tokenizer", lambda *args: None, "cannot load the tokenizer"),
    ],
    ids=["layout", "config", "tokenizer"],
)
def test_a_wrong_export_is_refused(trained, tmp_path, monkeypatch, target, name, mistake, message):
    monkeypatch.setattr(target, name, mistake)
    with pytest.raises(RunError, match=message):
        export_model(open_model(trained.path), tmp_path / "out", ExportOptions(dtype="float32"))
    assert list(tmp_path.iterdir()) == []


def test_without_torch_nothing_is_begun(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'danube-jax\[hf\]', or pass --noverify"):
        export_model(open_model(trained.path), tmp_path / "out", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer(save_hf, tmp_path, messages):
    source = open_model(save_hf())
    result = export_model(source, tmp_path / "out", ExportOptions())
    assert "exporting without a tokenizer" in messages.getvalue()
    assert result.comparison.texts == 0
    with pytest.raises(UserError, match="there is no tokenizer to go with it"):
        export_model(source, tmp_path / "chat", ExportOptions(chat_template="danube"))


def test_float16_does_not_overflow_silently(save_hf, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(save_hf(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--dtype=float16: model\.norm.weight has values beyond"):
        export_model(open_model(folder), tmp_path / "out", ExportOptions("float16", verify=False))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype=int8: expected one of bfloat16, float16, float32, stored"),
        ({"lora": "both"}, "--lora=both"),
        ({"shard_bytes": 0}, "--shard_size"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        ExportOptions(**options)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500 mb", "1.5KB", "77")] == [
        5 * 10**9,
        500 * 10**6,
        1_500,
        77,
    ]
    for text in ("", "5TB", "-1GB", "0"):
        with pytest.raises(UserError, match="--shard_size"):
            parse_size(text)
