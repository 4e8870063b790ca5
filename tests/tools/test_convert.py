"""The converters' command lines, on a real model where it is there."""

import json
from pathlib import Path

import pytest
from helpers import command

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260k"
FROM_HF, TO_HF = "tools/convert_from_hf.py", "tools/convert_to_hf.py"


@pytest.mark.parametrize(
    ("tool", "arguments", "fragment"),
    [
        (FROM_HF, ["--model=docs", "--output=x"], "docs: no config.json; expected a Hugging Face"),
        (FROM_HF, ["--output=x"], "--model is needed"),
        (TO_HF, ["--model=nothing", "--output=x"], "nothing: no such folder"),
        (TO_HF, ["--model=docs", "--output=x", "--dtype=int8"], "--dtype=int8: expected one of"),
    ],
)
def test_a_mistake_is_one_line(tool, arguments, fragment):
    result = command(*arguments, module=tool)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert fragment in result.stderr
    assert not Path("x").exists()


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260k model")
def test_there_and_back(tmp_path):
    result = command(f"--model={STORIES}", f"--output={tmp_path / 'ours'}", module=FROM_HF)
    assert result.returncode == 0, result.stderr
    assert "260,032 parameters in float32" in result.stderr
    flags = [f"--model={tmp_path / 'ours'}", f"--output={tmp_path / 'back'}"]
    result = command(*flags, "--chat_template=danube", module=TO_HF)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors of step 0" in result.stderr
    assert "checked on 128 tokens: largest difference of a logit" in result.stderr
    assert "bfloat16 against the checkpoint's own dtype" in result.stderr
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bench_convert_measures_time_and_memory(tmp_path):
    output = tmp_path / "bench.json"
    flags = ["--gigabytes=0.1", "--repeats=1", "--shard_size=40MB", f"--json={output}"]
    result = command(*flags, f"--scratch={tmp_path}", module="tools/bench_convert.py")
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert report["bytes"] > 0.05e9
    assert set(report["seconds"]) == {"cp -r", "cp -r, fsync", "import", "export"}
    assert all(value > 0 for value in report["seconds"].values())
    # Streaming: a block, a tensor or a layer is held, never the model.
    assert report["peak_of_model"]["import"] < 1.5
    assert report["peak_of_model"]["export"] < 1.5
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
