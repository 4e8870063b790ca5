"""Import: parity with transformers, the same bytes back, and what is refused with nothing left."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding
from tokenizer_models import train_sentencepiece

from danube_jax.config import CheckpointConfig
from danube_jax.data.chat import TEMPLATES
from danube_jax.data.tokenizer import SentencePieceTokenizer
from danube_jax.errors import UserError
from danube_jax.interop.export_hf import ExportOptions, export_model
from danube_jax.interop.hf_tokenizer import export_tokenizer
from danube_jax.interop.hf_weights import params_from_hf, params_to_hf
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model
from danube_jax.interop.verify import HARD_TEXTS, our_logits
from danube_jax.models.decoder import abstract_params
from danube_jax.training.checkpoint import Checkpointer

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260k"


def tensor_bytes(folder):
    """Every tensor of a folder as dtype, shape and bytes, read by the safetensors package."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(name)
                content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), content)
    for path in folder.glob("*.bin"):
        for name, tensor in torch.load(path, weights_only=True).items():
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), content)
    return found


def exported_again(folder, tmp_path, **options):
    import_model(folder, tmp_path / "ours")
    settings = {"dtype": "stored", "verify": False} | options
    export_model(open_model(tmp_path / "ours"), tmp_path / "back", ExportOptions(**settings))
    return tmp_path / "back"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "shards": True},
        {"dtype": "float16", "architecture": "llama", "tie_word_embeddings": True},
        {"dtype": "float32", "tie_word_embeddings": True, "shards": True},
        {"dtype": "bfloat16", "bin_file": True, "num_key_value_heads": 4},
        {"dtype": "float32", "bin_file": True, "tie_word_embeddings": True},
        {"dtype": "float32", "architecture": "llama", "head_dim": 12, "rope_theta": 1e5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_import_and_export_give_the_same_bytes(save_hf, tmp_path, options):
    folder = save_hf(**options)
    expected = tensor_bytes(folder)
    if options.get("tie_word_embeddings"):
        expected.pop("lm_head.weight", None)  # a .bin repeats the embedding
    back = exported_again(folder, tmp_path, dtype=options["dtype"], shard_bytes=9_000)
    assert tensor_bytes(back) == expected
    assert len(list(back.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "float32", "architecture": "llama", "head_dim": 12}],
    ids=["mistral", "llama"],
)
def test_logits_equal_those_of_transformers(save_hf, tmp_path, options):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = save_hf(**options)
    import_model(folder, tmp_path / "ours")
    tokens = np.random.default_rng(0).integers(0, 131, (2, 30))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    for path in (folder, tmp_path / "ours"):
        source = open_model(path)
        logits = our_logits(source.config, source.load_params(), tokens)
        # float32 rounding of two layers; logits are of the order of ten
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_the_two_directions_are_inverse(save_hf):
    source = open_model(save_hf(dtype="float32"))
    params = source.load_params()
    back = params_from_hf(dict(params_to_hf(params, source.config)), source.config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_training_restores_an_imported_checkpoint(hf_folder, tmp_path):
    import_model(hf_folder, tmp_path / "ours")
    source = open_model(tmp_path / "ours")
    params = source.load_params()
    sharding = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=sharding),
        abstract_params(source.config),
    )
    checkpointer = Checkpointer(tmp_path / "ours" / "checkpoints", CheckpointConfig())
    state, meta = checkpointer.restore_latest({"params": abstract})
    checkpointer.close()
    assert meta["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["params"], params)


def test_every_damaged_byte_is_noticed(hf_folder, tmp_path):
    import_model(hf_folder, tmp_path / "ours")
    state = tmp_path / "ours" / "checkpoints" / "0" / "state"
    for name in ("params.layers_1.mlp.down_proj.kernel", "params.norm.scale"):
        (chunk,) = (path for path in (state / name).iterdir() if path.name != ".zarray")
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
        with pytest.raises(UserError, match="checkpoint 0 cannot be used"):
            open_model(tmp_path / "ours").load_params()
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    open_model(tmp_path / "ours").load_params()


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260k model")
def test_stories260k(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    back = exported_again(STORIES, tmp_path, verify=True)
    assert tensor_bytes(back) == tensor_bytes(STORIES)
    ours = open_model(tmp_path / "ours")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 60))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="eager")
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = our_logits(ours.config, ours.load_params(), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # logits up to 20
    theirs = json.loads((STORIES / "generation_config.json").read_text())
    assert json.loads((back / "generation_config.json").read_text()) == theirs
    assert ours.tokenizer().encode_prompt("Once upon a time")[0] == 1
    assert ours.eos_ids() == (2,)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_published_folder_comes_back_with_its_tokenizer(save_hf, tmp_path, architecture):
    """Both tokenizer files, and a class that transformers 5 reads in a way of its own."""
    folder = save_hf(architecture, vocab_size=600, dtype="float32")
    tokenizer = SentencePieceTokenizer(train_sentencepiece(tmp_path / "tokenizer.model"))
    template = TEMPLATES["danube2"]
    export_tokenizer(tokenizer, folder, chat_template=template, model_max_length=64)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | tokenizer.special_tokens | {"chat_template": template})
    )
    back = exported_again(folder, tmp_path, verify=True)  # transformers gives the same ids
    assert tensor_bytes(back) == tensor_bytes(folder)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    ours = open_model(tmp_path / "ours").tokenizer()
    for text in HARD_TEXTS:
        assert ours.encode_prompt(text) == tokenizer.encode_prompt(text)


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def rename_tensor(folder, old, new):
    rewrite_header(
        folder / "model.safetensors", lambda header: header.update({new: header.pop(old)})
    )


def set_dtype(folder, name, dtype, shape):
    rewrite_header(folder / "model.safetensors", lambda h: h[name].update(dtype=dtype, shape=shape))


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
        (lambda f: cut(f / "model.safetensors", 5_000), "truncated: its header asks for"),
        (lambda f: cut(f / "model.safetensors", 5), "damaged or no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 500), "damaged or no safetens"),
        (lambda f: edit_json(f / "config.json", hidden_size=64), "has shape .* config asks for"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "model.layers.2.* missing"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=1), "no part of a mistral"),
        (lambda f: rename_tensor(f, NORM, "model.norm.bias"), "model.norm.bias: .* have biases"),
        (lambda f: rename_tensor(f, NORM, "model.final.weight"), "missing.*model.final.weight"),
        (lambda f: set_dtype(f, NORM, "I16", [32]), "model.norm.weight is I16"),
        (lambda f: set_dtype(f, NORM, "XX", [32]), "unknown dtype XX"),
        (lambda f: set_dtype(f, NORM, "BF16", [33]), "bytes for shape"),
        (lambda f: set_dtype(f, QUERY, "F16", [32, 32]), "q_proj.* BF16 and F16"),
        (lambda f: edit_json(f / "config.json", danube_jax="1"), "folder of danube_jax's own"),
    ],
)
def test_a_broken_folder_is_refused_and_leaves_nothing(hf_folder, tmp_path, break_it, message):
    folder = shutil.copytree(hf_folder, tmp_path / "model")
    break_it(folder)
    with pytest.raises(UserError, match=message) as error:
        import_model(folder, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f, shards: shards[1].unlink(), r"00002-of-.* missing \(1 of \d+ weight files"),
        (lambda f, shards: shutil.copy(shards[0], shards[1]), "too; expected it once"),
        (
            lambda f, shards: edit_json(
                f / "model.safetensors.index.json", weight_map={"x": "../a.safetensors"}
            ),
            "expected a file name in this folder",
        ),
        (
            lambda f, shards: edit_json(f / "model.safetensors.index.json", weight_map={}),
            "no weight_map",
        ),
    ],
)
def test_broken_shards(save_hf, tmp_path, break_it, message):
    folder = shutil.copytree(save_hf(shards=True), tmp_path / "model")
    break_it(folder, sorted(folder.glob("*.safetensors")))
    with pytest.raises(UserError, match=message):
        import_model(folder, tmp_path / "ours")


def test_a_damaged_bin_is_refused(save_hf, tmp_path):
    folder = save_hf(bin_file=True)
    cut(folder / "pytorch_model.bin", 3_000)
    with pytest.raises(UserError, match=r"pytorch_model.bin: damaged or no PyTorch weights"):
        import_model(folder, tmp_path / "ours")


def test_values_that_are_not_finite_are_kept_with_a_warning(hf_folder, tmp_path, messages):
    folder = shutil.copytree(hf_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # a NaN in bfloat16
    path.write_bytes(data)
    back = exported_again(folder, tmp_path)
    assert "values that are not finite" in messages.getvalue()
    assert tensor_bytes(back) == tensor_bytes(folder)


def test_without_a_tokenizer_there_is_a_warning(hf_folder, tmp_path, messages):
    imported = import_model(hf_folder, tmp_path / "ours")
    assert imported.tokenizer is None
    assert "converting without a tokenizer" in messages.getvalue()
    with pytest.raises(UserError, match="no tokenizer; expected the folder"):
        open_model(tmp_path / "ours").tokenizer()


def test_output_is_replaced_only_on_demand(hf_folder, tmp_path):
    output = tmp_path / "ours"
    output.mkdir()
    (output / "mine.txt").write_text("text")
    with pytest.raises(UserError, match="is not empty; choose another, or pass --overwrite"):
        import_model(hf_folder, output)
    import_model(hf_folder, output, overwrite=True)
    assert not (output / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    with pytest.raises(UserError, match="is a file"):
        import_model(hf_folder, output / "config.json")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(hf_folder, tmp_path, monkeypatch):
    output = tmp_path / "ours"
    import_model(hf_folder, output)
    before = (output / "config.json").read_bytes()

    def write(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "copy_file_range", lambda *args: write(0, b""))
    with pytest.raises(UserError, match=r"ours\S* cannot be written: No space left on device"):
        import_model(hf_folder, output, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert (output / "config.json").read_bytes() == before
    open_model(output).load_params()


@pytest.mark.parametrize("code", [errno.EXDEV, None], ids=["refused", "nothing copied"])
def test_files_that_the_kernel_does_not_copy(hf_folder, tmp_path, monkeypatch, code):
    def copy_file_range(*args):
        if code is None:
            return 0
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    assert tensor_bytes(exported_again(hf_folder, tmp_path)) == tensor_bytes(hf_folder)


def test_orbax_describes_the_checkpoint(hf_folder, tmp_path):
    """Orbax, without our code, sees the arrays with their shapes and dtypes."""
    import_model(hf_folder, tmp_path / "ours")
    step = tmp_path / "ours" / "checkpoints" / "0"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(step / "state").item_metadata.tree["params"]
    expected = abstract_params(open_model(tmp_path / "ours").config)
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
