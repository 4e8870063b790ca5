"""What --model=DIR may be, and what it gives."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_unsealed
from safetensors.numpy import load_file, save_file

from danube_jax.config import CheckpointConfig
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model
from danube_jax.models.decoder import abstract_params
from danube_jax.training.checkpoint import Checkpointer


def test_a_run_its_folder_of_checkpoints_and_one_checkpoint(trained):
    for path, step in (
        (trained.path, 4),
        (trained.path / "checkpoints", 4),
        (trained.path / "checkpoints" / "2", 2),
    ):
        source = open_model(path)
        assert (source.kind, source.path, source.step) == ("workdir", trained.path, step)
        assert source.config.vocab_size == 416
        assert source.generation == {}
        assert source.eos_ids() == (2,)
        assert source.tokenizer().vocab_size == 400


def test_parameters_are_those_of_the_training_state(trained):
    source = open_model(trained.path / "checkpoints" / "4")
    params = source.load_params()
    expected = abstract_params(source.config)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, jnp.float32)
    checkpointer = Checkpointer(trained.path / "checkpoints", CheckpointConfig())
    restored = checkpointer._manager.restore(4)["state"]["params"]
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    half = source.load_params(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_the_folder_tokenizer_comes_first(trained, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    named = open_tokenizer(trained.tokenizer)
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
    assert open_model(workdir).tokenizer().fingerprint == named.fingerprint  # of the config
    named.with_chat_template("{{ messages[0]['content'] }}").save(workdir / "tokenizer")
    tokenizer = open_model(workdir).tokenizer()
    assert tokenizer.path.is_relative_to(workdir)
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "Hi"


def test_a_hugging_face_folder(save_hf):
    folder = save_hf(eos_token_id=[5, 7])
    source = open_model(folder)
    assert (source.kind, source.step, source.steps) == ("huggingface", None, ())
    assert source.eos_ids() == (5, 7)
    params = source.load_params()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def no_model(workdir):
    saved = read_unsealed(workdir / "config.json")
    del saved["config"]["model"]
    (workdir / "config.json").write_text(json.dumps(saved))


def narrow_model(workdir):
    saved = read_unsealed(workdir / "config.json")
    saved["config"]["model"]["intermediate_size"] = 32
    (workdir / "config.json").write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no such folder; expected a run's folder, one of its checkpoints, or a"),
        (lambda w: (w / "config.json").unlink(), "no config.json; expected a Hugging Face model"),
        (no_model, "no config.model in it"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "no checkpoint yet"),
        (narrow_model, "checkpoint 4, 2 cannot be used"),
        (lambda w: (w / "config.json").write_text("{"), "damaged JSON"),
    ],
)
def test_mistakes(trained, tmp_path, change, message):
    workdir = trained.copy(tmp_path / "run")
    change(workdir)
    with pytest.raises(UserError, match=message):
        open_model(workdir).load_params()


def test_wrong_steps(trained, hf_folder):
    with pytest.raises(UserError, match="no checkpoint 3; there are: 4, 2"):
        open_model(trained.path, 3)
    with pytest.raises(UserError, match="no checkpoint 7"):
        open_model(trained.path / "checkpoints" / "7") if (
            trained.path / "checkpoints" / "7"
        ).exists() else open_model(trained.path, 7)
    with pytest.raises(UserError, match="--step=4 contradicts it"):
        open_model(trained.path / "checkpoints" / "2", 4)
    with pytest.raises(UserError, match="a Hugging Face folder has no steps"):
        open_model(hf_folder, 0)


def test_fingerprints_tell_values_and_nothing_else(save_hf, tmp_path):
    def fingerprint(path):
        def read(reader):
            reader.fingerprinting = True
            for _ in reader:
                pass
            return reader.fingerprint()

        return open_model(path).with_reader(read)[0]

    folder = save_hf(dtype="bfloat16", architecture="llama")
    import_model(folder, tmp_path / "ours")  # in other arrays, and in another order in memory
    wide = tmp_path / "float32"
    shutil.copytree(folder, wide)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, wide / "model.safetensors")
    expected = fingerprint(folder)
    assert fingerprint(tmp_path / "ours") == fingerprint(wide) == expected
    name = min(tensors)
    tensors[name] = tensors[name] * 2
    save_file(tensors, wide / "model.safetensors")
    assert fingerprint(wide) != expected
