"""Whole runs in FP8: resumed to the bit, exported without a trace of it, and tuned."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import command, read_rows
from tiny_folder import write_tiny_folder
from tuning_config import conversation_rows, load_config, tune, write_config, write_rows

from danube_jax.errors import EXIT_INTERRUPTED
from danube_jax.training.fp8_scaling import Fp8State
from danube_jax.training.step import init_state, update

INTERRUPT = str(Path(__file__).parent / "interrupt_at.py")
LAYERS, MODULES, HISTORY = 2, 4, 3
FP8 = (
    "--config.precision.linear=fp8",
    "--config.precision.compute=bfloat16",
    f"--config.precision.fp8.amax_history={HISTORY}",
    "--config.training.microbatch_tokens=256",
    "--config.training.max_steps=8",
    "--config.checkpoint.every_steps=3",
    "--config.evaluation.every_steps=0",
)


def read_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        tree = manager.restore(step, args=args)["state"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The workdir of eight steps of two micro-batches, at once."""
    workdir = tmp_path_factory.mktemp("fp8") / "whole"
    result = command(f"--config={corpus.config}", f"--workdir={workdir}", *FP8)
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_stopped_run_goes_on_to_the_bit(corpus, whole, tmp_path):
    workdir = tmp_path / "stopped"
    arguments = (f"--config={corpus.config}", f"--workdir={workdir}", *FP8)
    result = command("4", "SIGTERM", *arguments, module=INTERRUPT)
    assert result.returncode == EXIT_INTERRUPTED, result.stderr
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stderr

    losses = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(folder, "train")]
        for folder in (workdir, whole)
    ]
    assert losses[0] == losses[1]
    ours, theirs = read_state(workdir, 8), read_state(whole, 8)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def test_a_checkpoint_holds_scales_and_history(whole):
    state = read_state(whole, 8)
    history, scales = state["['fp8']['amax_N2H']"], state["['fp8']['scale_N2']"]
    assert history.shape == (LAYERS * MODULES, 2, HISTORY)
    assert np.all(history > 0)
    assert np.all(np.frexp(scales)[0] == 0.5)  # powers of two
    # Neither the optimizer nor the parameters have anything of it.
    others = [name for name in state if "amax" in name or "scale_N2" in name]
    assert len(others) == 2


def test_an_export_has_nothing_of_fp8(whole, tmp_path):
    from safetensors import safe_open

    from danube_jax.interop.export_hf import ExportOptions, export_model
    from danube_jax.interop.model_source import open_model

    folder = tmp_path / "exported"
    export_model(open_model(whole), folder, ExportOptions(verify=False))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    layer = {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    layers = {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in layer}
    assert names == layers | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert dtypes == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_clipping_and_decay_leave_scales_alone():
    params = {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)}
    optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.5))
    state = init_state(params, optimizer)
    state = state.replace(fp8=Fp8State(jnp.full((1, 2, 2), 3.0), jnp.full((1, 2), 0.25)))
    after = Fp8State(jnp.full((1, 2, 2), 1e6), jnp.full((1, 2), 8.0))
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 3.0), params)
    new, metrics = update(
        state,
        gradients,
        jnp.float32(1),
        optimizer=optimizer,
        learning_rate=lambda _: jnp.float32(0.1),
        clip_norm=1e-3,
        fp8_state=after,
    )
    jax.tree.map(np.testing.assert_array_equal, new.fp8, after)
    # The norm is that of the 20 gradients, and their first moment the clipped ones'.
    np.testing.assert_allclose(metrics["grad_norm"], 3 * math.sqrt(20), rtol=1e-6)
    np.testing.assert_allclose(new.opt_state[0].mu["kernel"], 0.1 * 1e-3 / math.sqrt(20), rtol=1e-4)


def test_sft_in_fp8_learns(tmp_path, monkeypatch):
    from danube_jax.training import loop, mesh

    one = np.array(jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda: mesh.Mesh(one, (mesh.DATA_AXIS,)))
    write_tiny_folder(tmp_path / "base")
    data = write_rows(tmp_path / "chat.jsonl", conversation_rows())
    path = write_config(tmp_path / "sft.py", objective="sft", base=tmp_path / "base", data=data)
    config = load_config(path)
    config.precision.linear = "fp8"
    config.samples.prompts = ()
    workdir = tune(config, tmp_path / "tuned")
    first, *_, last = read_rows(workdir, "evaluation")
    assert last["loss/rows"] < 0.8 * first["loss/rows"]
    history = read_state(workdir, last["step"])["['fp8']['amax_N2H']"]
    assert np.all(history[..., : min(last["step"], history.shape[-1])] > 0)
