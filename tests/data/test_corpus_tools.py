"""The command lines of the corpus pipeline."""

from pydoc_data.topics import topics

import pytest
from corpus_config import make, write_jsonl
from helpers import ROOT, command

from danube_jax.data.corpus import tokenizer_mix
from danube_jax.data.corpus.config import parse_corpus_config
from danube_jax.data.tokenizer import train_bpe
from danube_jax.errors import UserError

TEXTS = [text for _, text in sorted(topics.items())]
CONFIG = """
from danube_jax.data.corpus.config import corpus_config, text_source, stage

def get_config():
    config = corpus_config()
    config.output = "out"
    config.sources = {"a": text_source(path="a.jsonl"), "b": text_source(path="b.jsonl")}
    config.tokenizer.train_vocab_size = 400
    config.heldout_fraction = 0.2
    config.executor.workers = 1
    for name in ("language", "gopher_repetition", "gopher_quality", "fineweb"):
        config.steps[name].enabled = False
    config.plan.batch_tokens = 1_024
    config.stages = (
        stage(name="one", tokens=4_096, context_length=64, mixture={"a": 0.7, "b": 0.3}),
    )
    return config
"""


def run(folder, tool, *arguments):
    return command(*arguments, module=str(ROOT / "tools" / tool), cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    write_jsonl(folder / "a.jsonl", TEXTS[:40])
    write_jsonl(folder / "b.jsonl", TEXTS[40:70])
    (folder / "config.py").write_text(CONFIG)
    return folder


def test_prepare_then_plan(folder):
    done = run(folder, "prepare_data.py", "--config=config.py")
    assert done.returncode == 0, done.stderr
    assert "a/train" in done.stdout
    assert "documents/s" in done.stderr
    assert "datatrove" not in done.stderr
    page = (folder / "out" / "report.html").read_text()
    assert "<svg" in page
    again = run(folder, "prepare_data.py", "--config=config.py")
    assert again.returncode == 0
    assert "already prepared" in again.stderr
    assert (folder / "out" / "report.html").read_text() == page
    planned = run(folder, "plan_stages.py", "--config=config.py", "--write=phases.py")
    assert planned.returncode == 0, planned.stderr
    assert "70.0%" in planned.stdout
    assert "stores/a/heldout" in (folder / "phases.py").read_text()


def test_mistakes_give_one_line(folder, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"no\n')
    for arguments, message in (
        (("--config.sources.a.path=missing.jsonl",), "does not exist"),
        (("--config.steps.minhash.buckets=0",), "config.steps.minhash.buckets: 0 is not possible"),
        ((f"--config.sources.a.path={broken}",), f"{broken.name}, line 2: is not JSON"),
        (("--config.tokenizer.train_vocab_size=0", "--config.tokenizer.path=none"), "none"),
        (("--config.executor.workers=2", f"--config.sources.b.path={broken}"), "line 2"),
    ):
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        done = run(
            folder, "prepare_data.py", "--config=config.py", f"--config.output={output}", *arguments
        )
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (output / "stores").exists()


def test_a_tokenizer_is_compared_by_source(folder, tmp_path):
    other = train_bpe(iter(text.upper() for text in TEXTS[:40]), tmp_path / "other.model", 400)
    model = tmp_path / "own.model"
    done = run(
        folder,
        "train_tokenizer.py",
        "--config=config.py",
        "--mix=a=3,b=1",
        "--sample_mb=0.06",
        "--vocab_size=400",
        f"--output={model}",
        f"--compare={other.path}",
        f"--config.output={tmp_path / 'none'}",
    )
    assert done.returncode == 0, done.stderr
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    found = {row[0]: [float(x) for x in row[1:]] for row in rows if row and row[0] in ("a", "b")}
    assert found.keys() == {"a", "b"}
    for name, weight in (("a", 3), ("b", 1)):
        megabytes, own, compared = found[name]
        assert megabytes == pytest.approx(0.015 * weight, abs=0.006)  # two digits
        assert own > compared > 0.5  # the other one knows capitals only


def test_a_quality_model_is_trained_and_reported(tmp_path):
    pieces = [text[i : i + 700] for text in TEXTS for i in range(0, len(text) - 700, 700)][:120]
    write_jsonl(tmp_path / "good.jsonl.gz", pieces)
    write_jsonl(tmp_path / "bad" / "a.jsonl", [text[::-1] for text in pieces])
    arguments = ("--good=good.jsonl.gz", "--bad=bad", "--trees=20", "--output=quality.json")
    done = run(tmp_path, "train_quality_model.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "held out: 24 good, 24 bad; ROC-AUC 1.0000" in done.stdout
    for expected in ("score at least", "precision", "recall", "calibration", "most used"):
        assert expected in done.stdout
    assert (tmp_path / "quality.json").is_file()


def test_tokenizer_sample_follows_the_mix_and_compresses(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", TEXTS[:30])
    b = write_jsonl(tmp_path / "b.jsonl", [text.upper() for text in TEXTS[30:60]])
    corpus = make(tmp_path / "out", {"a": a, "b": b})
    sample = tokenizer_mix.sample_mix(corpus, {"a": 3.0, "b": 1.0}, 60_000)
    sizes = {name: sum(len(t.encode()) for t in rows) for name, rows in sample.train.items()}
    assert sizes["a"] == pytest.approx(45_000, rel=0.02)
    assert sizes["b"] == pytest.approx(15_000, rel=0.02)
    for name in ("a", "b"):
        assert set(sample.measured[name]).isdisjoint(sample.train[name])
    only_a = train_bpe(iter(sample.train["a"]), tmp_path / "a.model", 500)
    only_b = train_bpe(iter(sample.train["b"]), tmp_path / "b.model", 500)
    found = tokenizer_mix.compression({"a": only_a, "b": only_b}, sample.measured)
    assert found["a"]["a"] > found["a"]["b"]
    assert found["b"]["b"] > found["b"]["a"]
    text = sample.measured["a"][0]
    alone = tokenizer_mix.compression({"a": only_a}, {"a": [text]})["a"]["a"]
    assert alone == len(text.encode()) / len(only_a.encode(text))
    with pytest.raises(UserError, match="--mix: 'c' is no source"):
        tokenizer_mix.sample_mix(corpus, {"c": 1.0}, 1)


@pytest.mark.parametrize("name", ["example", "danube2", "three_buckets", "demo"])
def test_configs_are_valid(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert parse_corpus_config(module.get_config()).sources
