"""LoRA: our merge, PEFT's own computation, and adapters carried in both directions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_unsealed

from danube_jax.config import ModelConfig
from danube_jax.errors import RunError, UserError
from danube_jax.interop import peft as peft_folder
from danube_jax.interop.export_hf import ExportOptions, export_model
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model
from danube_jax.interop.peft import import_adapter
from danube_jax.interop.verify import our_logits
from danube_jax.models.decoder import init_params
from danube_jax.models.lora import LoraConfig, init_adapters, merge
from danube_jax.models.projections import PROJECTIONS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOKENS = np.random.default_rng(0).integers(0, 131, (2, 30))
CASES = {
    "all": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "rslora-subset": {
        "target_modules": ["k_proj", "up_proj", "o_proj"],
        "r": 5,
        "lora_alpha": 7,
        "use_rslora": True,
    },
}


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def adapter(request, save_hf, tmp_path_factory):
    """A base, a PEFT adapter on it with random A and B, and PEFT's logits."""
    base = save_hf(dtype="float32", architecture="llama")
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **CASES[request.param])
    model = peft.get_peft_model(load(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    model.eval()
    model.save_pretrained(folder)
    return base, folder, logits_of(model)


def test_the_same_logits_everywhere(adapter, tmp_path):
    base, folder, expected = adapter
    assert np.abs(expected - logits_of(load(base))).max() > 0.5  # the adapter does something
    import_model(base, tmp_path / "base")
    lora = import_adapter(folder, tmp_path / "ours", base=str(tmp_path / "base"))
    assert set(lora.targets) <= set(PROJECTIONS)
    source = open_model(tmp_path / "ours")
    assert source.base.path == tmp_path / "base"
    # float32 rounding: adding the product to the kernel, or its result to the layer's
    tolerance = {"atol": 2e-4}
    np.testing.assert_allclose(
        our_logits(source.config, source.load_params(), TOKENS), expected, **tolerance
    )
    merged = export_model(source, tmp_path / "merged", ExportOptions("float32"))
    assert merged.comparison.max_difference < 1e-3
    np.testing.assert_allclose(logits_of(load(tmp_path / "merged")), expected, **tolerance)

    options = ExportOptions("float32", lora="adapter", base_name=str(base))
    again = export_model(source, tmp_path / "adapter", options)
    assert again.files == ("adapter_model.safetensors",)
    model = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(model), expected, **tolerance)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)
    assert "base_model: " in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_of_another_scale_is_refused(adapter, tmp_path, monkeypatch):
    """Also in bfloat16, whose own rounding is no excuse."""
    base, folder, _ = adapter
    import_adapter(folder, tmp_path / "ours", base=str(base))
    source = open_model(tmp_path / "ours")
    exported = export_model(source, tmp_path / "good", ExportOptions(lora="adapter"))
    assert exported.comparison.max_difference < 1e-3 < exported.comparison.dtype_max_difference
    written = peft_folder.adapter_config

    def rescaled(lora, base):
        return written(lora, base) | {"lora_alpha": lora.alpha * 1.02}

    monkeypatch.setattr(peft_folder, "adapter_config", rescaled)
    with pytest.raises(RunError, match="other logits"):
        export_model(source, tmp_path / "bad", ExportOptions(lora="adapter"))
    assert not (tmp_path / "bad").exists()


def test_an_adapter_comes_back_to_the_byte(adapter, tmp_path):
    from safetensors.torch import load_file

    base, folder, _ = adapter
    import_adapter(folder, tmp_path / "ours", base=str(base))
    options = ExportOptions("stored", lora="adapter", verify=False)
    export_model(open_model(tmp_path / "ours"), tmp_path / "back", options)
    expected, found = (
        load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "back")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_fresh_adapters_change_nothing_and_merge_keeps_the_dtype():
    config = ModelConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    params = init_params(config, jax.random.key(0))
    adapters = init_adapters(lora, config, jax.random.key(1))
    assert set(adapters["layers_0"]["self_attn"]) == {"q_proj"}
    assert np.abs(adapters["layers_0"]["mlp"]["down_proj"]["a"]).max() <= 24**-0.5
    same = merge(params, adapters, lora, config)
    jax.tree.map(np.testing.assert_array_equal, same, params)

    adapters["layers_0"]["self_attn"]["q_proj"]["b"] += 1.0
    changed = merge(params, adapters, lora, config)
    kernel, before = (p["layers_0"]["self_attn"]["qkv_proj"]["kernel"] for p in (changed, params))
    a = np.asarray(adapters["layers_0"]["self_attn"]["q_proj"]["a"], np.float64)
    expected = 32.0 / 3 * a.sum(axis=1, keepdims=True)  # B is all ones
    np.testing.assert_allclose(kernel[:, :16] - before[:, :16], expected.repeat(16, 1), atol=1e-5)
    np.testing.assert_array_equal(kernel[:, 16:], before[:, 16:])
    half = merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), adapters, lora, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": 0.0}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"targets": ("qkv_proj",)}, "lora.targets: 'qkv_proj'"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("q_proj", "q_proj")}, "twice"),
    ],
)
def test_impossible_lora(values, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**values)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit(f, peft_type="IA3"), "peft_type='IA3'; expected 'LORA'"),
        (lambda f: edit(f, use_dora=True), "use_dora=True is not supported"),
        (lambda f: edit(f, bias="all"), "bias='all'"),
        (lambda f: edit(f, rank_pattern={"q_proj": 2}), "rank_pattern"),
        (lambda f: edit(f, target_modules=["lm_head"]), "target_modules 'lm_head'"),
        (lambda f: edit(f, r=9), "expected .* to fit the base"),
        (lambda f: edit(f, r="x"), "no usable LoRA config"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    ],
)
def test_adapters_that_are_refused(adapter, tmp_path, break_it, message):
    base, folder, _ = adapter
    folder = shutil.copytree(folder, tmp_path / "adapter")
    break_it(folder)
    with pytest.raises(UserError, match=message):
        import_adapter(folder, tmp_path / "ours", base=str(base))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_does_not_fit_its_base(adapter, save_hf, tmp_path):
    base, folder, _ = adapter
    wide = save_hf(dtype="float32", architecture="llama", intermediate_size=48, hidden_size=64)
    with pytest.raises(UserError, match="to fit the base"):
        import_adapter(folder, tmp_path / "ours", base=str(wide))
    import_adapter(folder, tmp_path / "ours", base=str(base))
    meta = tmp_path / "ours" / "checkpoints" / "0" / "meta" / "metadata"
    record = read_unsealed(meta)
    record["lora"]["rank"] += 1
    meta.write_text(json.dumps(record))
    with pytest.raises(UserError, match="do not fit the base"):
        open_model(tmp_path / "ours").load_params()
    record["lora"]["base"] = str(tmp_path / "gone")
    meta.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"its LoRA base cannot be used: .*gone: no such folder"):
        open_model(tmp_path / "ours")


def test_a_damaged_base_is_named(adapter, tmp_path):
    base, folder, _ = adapter
    import_model(base, tmp_path / "base")
    import_adapter(folder, tmp_path / "ours", base=str(tmp_path / "base"))
    state = tmp_path / "base" / "checkpoints" / "0" / "state"
    (chunk,) = (p for p in (state / "params.norm.scale").iterdir() if p.name != ".zarray")
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    with pytest.raises(UserError, match=r"base/checkpoints/0: cannot be used as the base"):
        open_model(tmp_path / "ours").load_params()


def test_a_base_that_is_not_here(adapter, tmp_path):
    _, folder, _ = adapter
    with pytest.raises(UserError, match="name the base's with --base"):
        import_adapter(folder, tmp_path / "ours", base="someone/model")
    with pytest.raises(UserError, match="holds a PEFT adapter, no whole model"):
        open_model(folder)
