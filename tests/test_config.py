"""Configs: the published numbers, and one clear line for every mistake."""

import importlib.util
from pathlib import Path

import pytest

from danube_jax.config import base_config, parse_config, to_dict, whole_steps
from danube_jax.data.corpus.config import parse_corpus_config
from danube_jax.data.corpus.planner import as_python, plan_stages
from danube_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(name: str, *arguments):
    """The ConfigDict of a file in configs/; `arguments` are what its `get_config` takes."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def small_config():
    """A valid ConfigDict to break."""
    config = base_config()
    config.data.tokenizer.path = "tokenizer.model"
    config.data.sources = {"web": {"path": "web"}}
    config.training.batch_tokens = 4_096
    config.phases = (
        {"name": "one", "tokens": 40_960, "context_length": 128, "mixture": {"web": 1.0}},
        {"name": "two", "tokens": 40_960, "context_length": 512, "mixture": {"web": 1.0}},
    )
    return config


def planned_phases(folder: Path) -> str:
    """The file that tools/plan_stages.py writes for configs/data/three_buckets.py."""
    corpus = parse_corpus_config(load("data/three_buckets"))
    names = {name for stage in corpus.stages for name in stage.mixture}
    plan = plan_stages(corpus.stages, dict.fromkeys(names, 10**6), corpus.plan, rebalance=False)
    path = folder / "phases.py"
    path.write_text(as_python(plan, {name: {"train": name} for name in names}, corpus.plan))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_config_is_valid_and_survives_json(name, tmp_path):
    arguments = [planned_phases(tmp_path)] if name == "three_buckets" else []
    run = parse_config(load(name, *arguments))
    assert run.name == name
    assert parse_config(to_dict(run)) == run


def test_danube_is_the_papers():
    run = parse_config(load("danube"))
    assert run.training.batch_tokens == 1_179_648
    assert [p.context_length for p in run.phases] == [2_048, 4_096, 8_192, 16_384]
    assert [p.tokens // 1_179_648 for p in run.phases] == [593_398, 84_771, 84_771, 84_771]
    assert sum(p.tokens for p in run.phases) // 1_179_648 == 847_711
    assert run.model.sliding_window == 4_096
    assert run.model.max_position_embeddings == 16_384
    assert run.optimizer.warmup_tokens == 2_359_296_000
    assert (run.optimizer.learning_rate, run.optimizer.final_learning_rate) == (2e-4, 1e-5)
    assert (run.optimizer.b1, run.optimizer.b2) == (0.9, 0.95)
    assert (run.optimizer.weight_decay, run.optimizer.clip_norm) == (0.1, 1.0)


def test_danube2_stages_are_the_papers():
    run = parse_config(load("danube2"))
    for phase, tokens, web in zip(
        run.phases, (1.0e12, 0.95e12, 0.05e12), (0.845, 0.728, 0.555), strict=True
    ):
        assert abs(phase.tokens - tokens) <= run.training.batch_tokens / 2
        assert phase.mixture["web"] == web
        assert sum(phase.mixture.values()) == pytest.approx(1.0)
    assert run.phases[2].mixture["instruct"] == 0.406
    assert run.model.sliding_window is None
    assert run.model.max_position_embeddings == 8_192


def breakage(path: str, value):
    """A function that sets a dotted key, phases[i] included, of a plain dict."""

    def apply(config: dict) -> None:
        *parents, last = path.split(".")
        node = config
        for key in parents:
            node = node[int(key)] if key.isdigit() else node[key]
        node[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.hidden_sizes", 3, r"config\.model\.hidden_sizes: unknown key.*hidden_size"),
        ("model.hidden_size", "64", r"config\.model\.hidden_size: expected .* int, got '64'"),
        ("model.hidden_size", True, r"config\.model\.hidden_size: expected .* int, got True"),
        ("model.hidden_size", 0, r"config\.model\.hidden_size: 0 is not possible"),
        ("model.rope_theta", float("nan"), r"config\.model\.rope_theta: expected a finite"),
        ("model.num_key_value_heads", 5, r"num_key_value_heads: 5 .*divisor .*\(32\)"),
        ("model.num_attention_heads", 48, r"num_attention_heads: 48 .*divisor of hidden_size"),
        ("model.attention_backend", "fast", r"'fast' is not possible; expected one of auto"),
        ("precision.linear", "float32", r"no wider dtype than precision\.compute \(bfloat16\)"),
        ("precision.linear", "int4", r"config\.precision\.linear: 'int4'"),
        ("precision.fp8.scaling", "rowwise", r"fp8\.scaling: 'rowwise' .*one of delayed, current"),
        ("precision.fp8.amax_history", 0, r"precision\.fp8\.amax_history: 0 .*positive"),
        ("precision.fp8.margin", 0.5, r"precision\.fp8\.margin: 0\.5 .*at least 1"),
        ("precision.fp8.fast_accumulation", (True,), r"fast_accumulation: .*three values"),
        ("optimizer.b2", 1.0, r"config\.optimizer\.b2: 1\.0"),
        ("optimizer.final_learning_rate", 1.0, r"at most learning_rate"),
        ("data.heldout_fraction", 1.5, r"config\.data\.heldout_fraction: 1\.5"),
        ("data.sources", {}, r"config\.data\.sources: .* at least one source"),
        ("data.sources", {"web": {"builtin": "novels"}}, r"web\.builtin: 'novels'.*docstrings"),
        ("data.sources", {"web": {}}, r"config\.data\.sources\.web\.path"),
        ("data.tokenizer.path", "", r"exactly one of path, builtin and train_vocab_size"),
        ("data.tokenizer.builtin", "mistral", r"'path, builtin' is not possible"),
        ("phases", (), r"config\.phases: .* at least one phase"),
        ("phases.0.tokens", 40_000, r"phases\[0\]\.tokens: 40000 .* such as 40960"),
        ("phases.0.context_length", 96, r"phases\[0\]\.context_length: 96 .*longest.*512"),
        ("phases.1.context_length", 16_384, r"phases\[1\]\.context_length.*8192"),
        ("phases.0.batch_tokens", 1_000, r"phases\[0\]\.batch_tokens.*multiple of the context"),
        ("phases.0.context_length", 0, r"phases\[0\]\.context_length: 0 .*positive"),
        ("phases.0.mixture", {"books": 1.0}, r"mixture\.books: 1\.0 .*a source of .*web"),
        ("phases.0.mixture", {"web": -1.0}, r"mixture\.web: -1\.0"),
        ("phases.0.mixture", {"web": 0.0}, r"at least one positive weight"),
        ("phases.1.name", "one", r"a different name a phase"),
        ("phases.0.name", "", r"phases\[0\]\.name"),
        ("training.batch_tokens", 4_000, r"multiple of the context length, such as 3968"),
        ("checkpoint.every_steps", 0, r"config\.checkpoint\.every_steps: 0"),
    ],
)
def test_a_mistake_is_named_in_full(path, value, message):
    config = to_dict(parse_config(small_config()))
    breakage(path, value)(config)
    with pytest.raises(UserError, match=message) as caught:
        parse_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("danube_dpo", {}, r"'fp8' is not possible; expected bfloat16 or float32 for DPO"),
        ("danube_sft", {"lora.rank": 4}, r"'fp8' is not possible; .* for adapters"),
        ("danube", {"model.hidden_size": 2_568, "model.head_dim": 80}, r"hidden_size: 2568 .* 16"),
        ("danube", {"model.intermediate_size": 6_910}, r"intermediate_size: 6910 .* 16"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be(name, changes, message):
    config = load(name)
    for key, value in (changes | {"precision.linear": "fp8"}).items():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        parse_config(config)


def test_config_files_cannot_invent_keys():
    with pytest.raises(AttributeError, match="hidden_size"):
        base_config().model.hidden_sizes = 3


def test_whole_steps_is_the_nearest():
    assert whole_steps(1e12, 1_179_648) == 847_711 * 1_179_648
    assert whole_steps(1, 4_096) == 4_096
