"""Whole tuning runs: resume to the bit, rounds, what checkpoints hold and are good for."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import read_rows
from tiny_folder import write_tiny_folder
from tuning_config import (
    conversation_rows,
    load_config,
    preference_rows,
    tune,
    write_config,
    write_rows,
)

from danube_jax.config import tuning_round
from danube_jax.errors import UserError
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.interop.model_card import model_card
from danube_jax.interop.model_source import open_model
from danube_jax.interop.step_params import StepParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model, and rows of both kinds."""
    path = tmp_path_factory.mktemp("tuning")
    write_tiny_folder(path / "base")
    write_rows(path / "chat.jsonl", conversation_rows())
    write_rows(path / "preferences.jsonl", preference_rows())
    return path


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """A mesh of one device: the other seven would only wait for one another here."""
    from danube_jax.training import loop, mesh

    patch = pytest.MonkeyPatch()
    device = jax.devices()[:1]
    patch.setattr(loop, "make_mesh", lambda: mesh.Mesh(np.array(device), (mesh.DATA_AXIS,)))
    yield
    patch.undo()


def config_of(folder, objective):
    data = "chat.jsonl" if objective == "sft" else "preferences.jsonl"
    path = folder / f"{objective}.py"
    write_config(path, objective=objective, base=folder / "base", data=folder / data)
    return load_config(path)


def arrays(workdir):
    """The newest checkpoint's trained parameters by path."""
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    params = StepParams(workdir / "checkpoints" / str(step))
    return params.read(params.leaves), step, params.meta


def board_tags(workdir):
    """Names of the curves and texts that TensorBoard shows."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(workdir / "tensorboard"))
    return {
        kind: set(names or ())
        for kind, names in accumulator.Reload().Tags().items()
        if isinstance(names, list)
    }


def assert_same_run(one, other):
    (ours, step, meta), (theirs, same_step, same_meta) = arrays(one), arrays(other)
    assert step == same_step
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=str(path))
    assert meta["checksums"] == same_meta["checksums"]  # moments and counters too
    rows = [[(r["step"], r["loss"]) for r in read_rows(w, "train")] for w in (one, other)]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == list(range(1, step + 1))


def test_sft_resumes_to_the_bit_and_gives_a_model_that_chats(folder, tmp_path):
    config = config_of(folder, "sft")
    whole = tune(config, tmp_path / "whole")
    parts = tmp_path / "parts"
    tune(config, parts, max_steps=3)
    tune(config, parts)
    assert_same_run(whole, parts)

    first, *_, last = read_rows(whole, "evaluation")
    assert (first["step"], last["step"]) == (0, arrays(whole)[1])
    assert last["loss/rows"] < 0.8 * first["loss/rows"]
    assert last["bits_per_byte/rows"] > 0
    row = read_rows(whole, "train")[0]
    assert 0 < row["padding"] < 0.6
    assert row["examples"] >= 4  # several in each of the batch's two rows
    assert (whole / "samples" / "step-00000000.txt").read_text().startswith("What is 3?\n")
    tags = board_tags(whole)
    assert {"train/loss", "train/padding", "evaluation/loss/rows"} <= tags["scalars"]
    assert "samples/text_summary" in tags["tensors"]

    from danube_jax.inference.loading import open_text_model

    model = open_text_model(str(whole))
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert model.tokenizer.decode(ids).strip().endswith("<|answer|>")
    (completion,) = model.generator("float32").generate([ids], SamplingConfig(max_tokens=4))[0]
    assert len(completion.tokens) > 0

    card = model_card(model.source, last["step"], model.tokenizer, license="", dtype="float32")
    assert "license: other" in card  # the weights began as someone's
    assert "### 1. base: published weights\n\nImported from the folder `base`." in card
    assert "### 2. tuned: supervised fine-tuning, first\n" in card
    assert f"| tokens seen, with padding | {last['step'] * 2 * 96:,} |" in card


@pytest.fixture(scope="module")
def rounds(folder):
    """DPO of adapters with dropout in two rounds: the config, and a run that was never stopped."""
    config = config_of(folder, "dpo")
    first = config.rounds[0]
    second = tuning_round(**(first.to_dict() | {"name": "second", "learning_rate": 1e-3}))
    config.rounds = (first, second)
    config.lora.update({"rank": 2, "alpha": 8.0, "dropout": 0.1, "targets": ("q_proj", "up_proj")})
    return config, tune(config, folder / "rounds")


def test_rounds_resume_to_the_bit(rounds, tmp_path, monkeypatch):
    config, whole = rounds
    parts = tmp_path / "parts"
    tune(config, parts, max_steps=3)
    assert not (parts / "checkpoints").exists()  # the second waits for the whole first
    monkeypatch.chdir(tmp_path)
    tune(config, Path("parts"))  # another spelling of the same folder
    assert_same_run(whole / "rounds" / "1-first", parts / "rounds" / "1-first")
    assert_same_run(whole, parts)


def test_a_round_begins_at_ln_2_from_the_one_before(rounds):
    _, whole = rounds
    for workdir in (whole / "rounds" / "1-first", whole):
        row = read_rows(workdir, "evaluation")[0]
        assert row["loss/rows"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["accuracy/rows"] == 0.5
        last = read_rows(workdir, "evaluation")[-1]
        assert last["loss/rows"] < 0.68
        assert last["margin/rows"] > 0
        assert {"reward_chosen", "reward_rejected", "accuracy"} <= read_rows(workdir, "train")[
            0
        ].keys()
    expected = {"evaluation/accuracy/rows", "evaluation/likelihood_accuracy/rows", "train/margin"}
    assert expected <= board_tags(whole)["scalars"]
    # The second round's base is the first one's result, and its rate is its own.
    found, step, meta = arrays(whole)
    assert meta["lora"]["base"] == f"rounds/1-first/checkpoints/{step}"
    assert {path[-2] for path in found} == {"q_proj", "up_proj"}
    assert read_rows(whole, "train")[0]["learning_rate"] == pytest.approx(
        read_rows(whole / "rounds" / "1-first", "train")[0]["learning_rate"] / 3
    )
    source = open_model(whole)
    assert source.base.base.kind == "huggingface"
    changed, before = source.load_params(), source.base.load_params()
    kernel = ("layers_0", "self_attn", "qkv_proj", "kernel")
    for key in kernel:
        changed, before = changed[key], before[key]
    assert np.abs(changed - before)[:, :32].max() > 0
    np.testing.assert_array_equal(changed[:, 32:], before[:, 32:])  # k and v have no adapters


def test_adapters_export_as_a_peft_folder_with_the_same_logits(rounds, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from danube_jax.interop.export_hf import ExportOptions, export_model

    source = open_model(rounds[1])
    options = ExportOptions("float32", lora="adapter")
    exported = export_model(source, tmp_path / "adapter", options)  # compares with PEFT's logits
    assert exported.comparison.max_difference < 1e-3
    merged = export_model(source, tmp_path / "merged", ExportOptions("float32"))
    assert merged.comparison.max_difference < 1e-3
    assert exported.comparison.texts > 0
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    step = source.base.step
    assert base["base_model_name_or_path"] == str(
        rounds[1].resolve() / "rounds" / "1-first" / "checkpoints" / str(step)
    )
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "### 2. tuned: DPO, first\n" in card
    assert "### 3. tuned: DPO, second\n" in card
    assert "| preference loss | sigmoid, beta 0.1 |" in card
    assert "Held-out preferences" in card


def test_a_cached_reference_trains_alike_and_is_used_again(folder, tmp_path):
    config = config_of(folder, "dpo")
    config.evaluation.at_start, config.samples.prompts = False, ()
    direct = tune(config, tmp_path / "direct", max_steps=4)
    config.dpo.reference = "cache"
    cached = tune(config, tmp_path / "cached", max_steps=2)
    file = cached / "reference_log_probs.npz"
    written = file.stat().st_mtime_ns
    tune(config, cached, max_steps=4)
    assert file.stat().st_mtime_ns == written
    losses = [[r["loss"] for r in read_rows(w, "train")] for w in (direct, cached)]
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-5)  # rounding of two programs
    # All weights are trained, and none are held twice.
    assert "lora" not in arrays(cached)[2]


def test_a_base_that_changed_is_refused(folder, tmp_path):
    base = write_tiny_folder(tmp_path / "base")
    config = config_of(folder, "sft")
    config.init_from.path = str(base)
    config.lora.rank = 2
    config.evaluation.at_start, config.samples.prompts = False, ()
    workdir = tune(config, tmp_path / "run", max_steps=1)
    open_model(workdir).load_params()
    shutil.rmtree(base)
    write_tiny_folder(base, seed=1)
    with pytest.raises(UserError, match="not those that this run began with"):
        tune(config, workdir, max_steps=2)
    with pytest.raises(UserError, match="not those that the adapters were trained on"):
        open_model(workdir).load_params()


def test_sft_in_fp8_is_close_to_float32(folder, tmp_path):
    config = config_of(folder, "sft")
    config.evaluation.at_start, config.samples.prompts = False, ()
    plain = tune(config, tmp_path / "plain", max_steps=3)
    config.precision.linear = "fp8"
    rough = tune(config, tmp_path / "fp8", max_steps=3)
    losses = [[r["loss"] for r in read_rows(w, "train")] for w in (plain, rough)]
    assert losses[0] != losses[1]
    # E4M3 keeps four significant bits: a product of two is off by a few per cent at random.
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


@pytest.mark.parametrize("objective", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_two_devices_train_as_one(folder, tmp_path, monkeypatch, objective):
    from danube_jax.training import loop, mesh

    config = config_of(folder, objective)
    config.lora.update({"rank": 2, "dropout": 0.2})
    config.dpo.reference = "cache"
    config.evaluation.at_start, config.samples.prompts = False, ()
    one = tune(config, tmp_path / "one", max_steps=3)
    devices = np.array(jax.devices()[:2])
    monkeypatch.setattr(loop, "make_mesh", lambda: mesh.Mesh(devices, (mesh.DATA_AXIS,)))
    two = tune(config, tmp_path / "two", max_steps=3)
    for kind, key in (("train", "loss"), ("evaluation", "loss/rows")):
        losses = [[r[key] for r in read_rows(w, kind)] for w in (one, two)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)  # sums in another order
