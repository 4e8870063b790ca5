"""Starting a run from a model that exists: weights, optimizer, and another tokenizer."""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import command, read_rows
from ml_collections import config_dict

from danube_jax.config import TokenizerConfig, parse_config
from danube_jax.data.tokenizer import load_tokenizer, open_tokenizer, train_bpe
from danube_jax.errors import UserError
from danube_jax.models.decoder import init_params
from danube_jax.training.init_from import (
    Initialization,
    RowMap,
    map_rows,
    remap_rows,
    resolve_model,
)
from danube_jax.training.mesh import make_mesh
from danube_jax.training.optimizer import make_optimizer
from danube_jax.training.step import init_state, state_shardings, state_specs

STEPS = 6
LLAMA2 = "DANUBE_JAX_LLAMA2_TOKENIZER"


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """The workdir of a run of a few steps, evaluated at its end."""
    workdir = tmp_path_factory.mktemp("runs") / "base"
    result = command(
        f"--config={corpus.config}",
        f"--workdir={workdir}",
        f"--config.training.max_steps={STEPS}",
        "--config.checkpoint.every_steps=3",
    )
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def config(corpus):
    """Makes a config of the tiny run with changes."""
    spec = importlib.util.spec_from_file_location("tiny", corpus.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(**changes) -> config_dict.ConfigDict:
        config = module.get_config()
        config.init_from.update(changes)
        return config

    return make


@pytest.fixture(scope="module")
def other_tokenizer(corpus, tmp_path_factory):
    """A tokenizer of 380 ids that shares some tokens with the corpus's."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    return train_bpe([text], tmp_path_factory.mktemp("tokenizer") / "other.model", 380)


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return leaves(manager.restore(step, args=args)["state"])


def leaves(tree) -> dict[str, np.ndarray]:
    """The arrays of a tree by dotted path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in flat
    }


def first_state(config, tokenizer):
    """The state of step 0 that a config describes, on all devices."""
    run = resolve_model(parse_config(config))
    optimizer = make_optimizer(run.optimizer)

    def fresh():
        return init_state(init_params(run.model, jax.random.key(run.training.seed)), optimizer)

    mesh = make_mesh()
    specs = state_specs(jax.eval_shape(fresh), mesh.size, zero1=True)
    plan = Initialization.plan(run, tokenizer)
    return plan, plan.state(optimizer, fresh, state_shardings(mesh, specs))


def test_a_run_from_a_workdir_begins_where_that_ended(corpus, base, tmp_path):
    result = command(
        f"--config={corpus.config}",
        f"--workdir={tmp_path}/next",
        f"--config.init_from.path={base}",
        "--config.evaluation.at_start=True",
        "--config.training.max_steps=2",
    )
    assert result.returncode == 0, result.stderr
    assert f"weights from {base}, step {STEPS}" in result.stderr
    before = read_rows(base, "evaluation")[-1]
    after = read_rows(tmp_path / "next", "evaluation")[0]
    assert before["step"] == STEPS
    assert after["step"] == 0
    for key in ("loss/first", "loss/second"):
        assert after[key] == before[key]

    again = command(
        f"--config={corpus.config}",
        f"--workdir={tmp_path}/next",
        f"--config.init_from.path={base}",
        "--config.evaluation.at_start=True",
        "--config.training.max_steps=3",
    )
    assert again.returncode == 0, again.stderr
    assert "resuming at step 2" in again.stderr
    assert "weights from" not in again.stderr


def test_weights_alone_or_with_the_optimizer(corpus, base, config):
    tokenizer = load_tokenizer(TokenizerConfig(path=str(corpus.path / "tokenizer.model")))
    saved = saved_arrays(base, STEPS)
    _, weights = first_state(config(path=str(base)), tokenizer)
    _, both = first_state(config(path=str(base), take="weights_and_optimizer"), tokenizer)
    for name, array in leaves(weights.params).items():
        np.testing.assert_array_equal(array, saved[f"params.{name}"])
    assert all(not array.any() for array in leaves(weights.opt_state).values())
    moments = {n.removeprefix("opt_state."): a for n, a in saved.items() if "opt_state" in n}
    assert leaves(both.opt_state).keys() == moments.keys()
    for name, array in leaves(both.opt_state).items():
        np.testing.assert_array_equal(array, moments[name])
    assert int(both.step) == int(weights.step) == 0
    assert any(moments[name].any() for name in moments)


def test_one_step_can_be_named(corpus, base, config):
    tokenizer = load_tokenizer(TokenizerConfig(path=str(corpus.path / "tokenizer.model")))
    plan, state = first_state(config(path=str(base / "checkpoints" / "3")), tokenizer)
    assert plan.describe()["step"] == 3
    saved = saved_arrays(base, 3)
    for name, array in leaves(state.params).items():
        np.testing.assert_array_equal(array, saved[f"params.{name}"])


@pytest.mark.parametrize("new_rows", ["init", "old_statistics"])
def test_a_new_tokenizer_keeps_the_rows_of_shared_tokens(
    corpus, base, config, other_tokenizer, new_rows
):
    old_tokenizer = load_tokenizer(TokenizerConfig(path=str(corpus.path / "tokenizer.model")))
    cfg = config(
        path=str(base), take="weights_and_optimizer", change_tokenizer=True, new_rows=new_rows
    )
    cfg.model.vocab_size = 384  # four rows of padding
    cfg.model.initializer_range = 0.5
    plan, state = first_state(cfg, other_tokenizer)

    old_ids = {old_tokenizer.piece(i): i for i in range(400)}
    pieces = [other_tokenizer.piece(i) for i in range(380)]
    shared = [i for i, piece in enumerate(pieces) if piece in old_ids]
    new = [i for i, piece in enumerate(pieces) if piece not in old_ids]
    assert len(shared) > 280
    assert len(new) > 20
    assert plan.rows.carried == len(shared)
    assert plan.rows.dropped == 400 - len(shared)

    saved = saved_arrays(base, STEPS)
    old_embedding = saved["params.embed_tokens.embedding"]
    embedding = np.asarray(state.params["embed_tokens"]["embedding"])
    head, old_head = np.asarray(state.params["lm_head"]["kernel"]), saved["params.lm_head.kernel"]
    assert embedding.shape == (384, 32)
    assert head.shape == (32, 384)
    source = [old_ids[pieces[i]] for i in shared]
    np.testing.assert_array_equal(embedding[shared], old_embedding[source])
    np.testing.assert_array_equal(head[:, shared], old_head[:, source])
    spread = 0.5 if new_rows == "init" else float(old_embedding.std(0).mean())
    assert embedding[new].std() == pytest.approx(spread, rel=0.15)
    assert len(np.unique(embedding[new][:, 0])) == len(new)
    first_moment = next(
        a for n, a in leaves(state.opt_state).items() if n.endswith("mu.embed_tokens.embedding")
    )
    old_moment = next(a for n, a in saved.items() if n.endswith("mu.embed_tokens.embedding"))
    np.testing.assert_array_equal(first_moment[shared], old_moment[source])
    assert not first_moment[new].any()
    name = "layers_0.mlp.down_proj.kernel"
    np.testing.assert_array_equal(leaves(state.params)[name], saved[f"params.{name}"])


def test_old_statistics_are_a_feature_each():
    generator = np.random.default_rng(0)
    old = generator.normal([5.0, -1.0], [0.1, 2.0], (4_000, 2)).astype(np.float32)
    rows = RowMap(np.full(3_000, -1, np.int32), 3_000, 0, 4_000)
    normal = generator.normal(size=(3_000, 2)).astype(np.float32)
    tree, new = ({"embed_tokens": {"embedding": x}} for x in (old, normal))
    out = remap_rows(tree, rows, new, "old_statistics")["embed_tokens"]["embedding"]
    # Standard errors: std / sqrt(3,000), so four of them are 0.007 and 0.15.
    np.testing.assert_allclose(out.mean(0), [5.0, -1.0], atol=0.15)
    np.testing.assert_allclose(out.std(0), [0.1, 2.0], rtol=0.06)


def test_the_tokenizer_must_be_the_sources(corpus, base, config, other_tokenizer):
    with pytest.raises(UserError, match=r"change_tokenizer=True"):
        first_state(config(path=str(base)), other_tokenizer)


def test_the_architecture_must_be_the_sources(corpus, base, config):
    tokenizer = load_tokenizer(TokenizerConfig(path=str(corpus.path / "tokenizer.model")))
    cfg = config(path=str(base))
    cfg.model.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"config\.model\.num_hidden_layers: 3 .*\(2\)"):
        first_state(cfg, tokenizer)
    cfg.init_from.model_from_source = True
    _, state = first_state(cfg, tokenizer)
    assert "layers_2" not in state.params
    cfg = config(path=str(base))
    cfg.model.tie_word_embeddings = True
    with pytest.raises(UserError, match="tie_word_embeddings"):
        first_state(cfg, tokenizer)


def test_rows_beyond_the_tokenizer_are_padding(corpus, other_tokenizer):
    rows = map_rows(other_tokenizer, 400, None, 390)
    np.testing.assert_array_equal(rows.source_V, [*range(390), *[-1] * 10])
    assert (rows.tokens, rows.carried, rows.dropped) == (380, 380, 0)


def test_a_hugging_face_folder(corpus, config, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        )
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(corpus.path / "tokenizer.model")))
    tokenizer.save(tmp_path)

    cfg = config(path=str(tmp_path), model_from_source=True)
    run = resolve_model(parse_config(cfg))
    assert (run.model.rope_theta, run.model.max_position_embeddings) == (5e4, 128)
    _, state = first_state(cfg, tokenizer)
    gate_up = np.asarray(state.params["layers_1"]["mlp"]["gate_up_proj"]["kernel"])
    assert gate_up.dtype == np.float32
    mlp = model.model.layers[1].mlp
    expected = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T.float().detach().numpy()
    np.testing.assert_array_equal(gate_up, expected)
    with pytest.raises(UserError, match=r"init_from\.take.*weights alone"):
        first_state(config(path=str(tmp_path), take="weights_and_optimizer"), tokenizer)


@pytest.mark.parametrize("change", [{"take": "everything"}, {"change_tokenizer": True}])
def test_impossible_values_are_named(config, change):
    with pytest.raises(UserError, match=f"config.init_from.{next(iter(change))}"):
        parse_config(config(**change))


def test_a_source_that_is_not_there_leaves_nothing_behind(corpus, tmp_path):
    workdir = tmp_path / "run"
    result = command(
        f"--config={corpus.config}", f"--workdir={workdir}", "--config.init_from.path=/nowhere"
    )
    assert result.returncode == 2
    assert "/nowhere: no such folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not workdir.exists()


@pytest.mark.slow
def test_danube_to_danube2():
    if LLAMA2 not in os.environ:
        pytest.skip(f"{LLAMA2} does not name a file or folder of Llama 2's tokenizer")
    pytest.importorskip("mistral_common", reason="carries Mistral's tokenizer")
    mistral = load_tokenizer(TokenizerConfig(builtin="mistral"))
    rows = map_rows(mistral, 32_000, open_tokenizer(os.environ[LLAMA2]), 32_000)
    assert (rows.carried, rows.tokens - rows.carried, rows.dropped) == (24_184, 7_816, 7_816)
    same = rows.source_V == np.arange(32_000)
    assert int(same.sum()) == 270
    assert int(np.argmin(same)) == 260
