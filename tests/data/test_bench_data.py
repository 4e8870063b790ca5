import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def call_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools/bench_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_small_benchmark_reports_what_it_measured(tmp_path):
    sizes = ("--store_tokens=20000", "--context=64", "--batch_tokens=1024", "--steps=6")
    output = tmp_path / "out.json"
    done = call_tool(
        *sizes, "--repeats=2", "--num_sources=2", "--mask_documents", f"--json={output}"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    rate = result["tokens_per_second"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert len(rate["repeats"]) == result["sources"] == 2
    assert result["tokens_on_disk"] == 40_000


def test_bad_flags_end_in_one_line_and_status_2(tmp_path):
    for flag in ("--steps=many", f"--store={tmp_path}"):
        done = call_tool(flag)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
