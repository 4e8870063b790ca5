"""The tools' command lines: help with an example, one line for a mistake, and what they write."""

import pytest
from helpers import ROOT, command

TOOLS = (
    "plan",
    "train_tokenizer",
    "bench_data",
    "bench_train",
    "bench_precision",
    "bench_convert",
    "bench_generate",
    "bench_eval",
    "convert_from_hf",
    "convert_to_hf",
    "report",
)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_an_example_and_the_flags(tool):
    result = command("--help", module=f"tools/{tool}.py")
    assert result.returncode == 0, result.stderr
    assert f"python tools/{tool}.py" in result.stdout
    assert "Flags:" in result.stdout
    assert "--" in result.stdout.split("Flags:")[1]


@pytest.mark.parametrize(
    ("tool", "arguments", "fragment"),
    [
        ("plan", ["--config=configs/nothing.py"], "configs/nothing.py"),
        ("train_tokenizer", ["--output=x.model", "nothing.txt"], "nothing.txt: no such file"),
        ("bench_data", ["--steps=many"], "--steps"),
        ("bench_train", ["--model=gpt"], "--model=gpt: expected one of tiny, 16m, danube"),
        ("bench_eval", ["--model=nothing"], "nothing is no Hugging Face folder"),
        ("plan", ["--config=configs/three_buckets.py:nothing.py"], "nothing.py: no such file"),
    ],
)
def test_a_mistake_is_one_line(tool, arguments, fragment):
    result = command(*arguments, module=f"tools/{tool}.py")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fragment in result.stderr


def test_train_tokenizer_makes_a_model_that_reads_back_its_text(tmp_path):
    from danube_jax.data.tokenizer import open_tokenizer

    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text() + (ROOT / "LICENSE").read_text())
    output = tmp_path / "tokenizer.model"
    result = command(
        "--vocab_size=600", f"--output={output}", str(text), module="tools/train_tokenizer.py"
    )
    assert result.returncode == 0, result.stderr
    tokenizer = open_tokenizer(output)
    sentence = "The same command goes on\n  where it stopped: 12 %, 日本."
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
