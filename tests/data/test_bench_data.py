import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from corpus_config import write_jsonl

from danube_jax.data.tokenizer import train_bpe

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


def test_preparation_is_measured_by_step(tmp_path):
    texts = [text for _, text in sorted(topics.items())][:60]
    text = write_jsonl(tmp_path / "text.jsonl", texts)
    tokenizer = train_bpe(iter(texts), tmp_path / "t.model", 400).path
    done = call_tool("--prepare", f"--text={text}", f"--tokenizer={tokenizer}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    steps = {name: row["mb_per_second"] for name, row in result["steps"].items()}
    assert steps.keys() >= {
        *("read", "unicode", "language", "gopher_repetition", "gopher_quality", "fineweb"),
        *("masking", "minhash_signatures", "minhash", "tokenise"),
    }
    assert all(row["documents_per_second"] > 0 for row in result["steps"].values())
    whole = 1 / sum(1 / rate for rate in steps.values())
    assert abs(result["whole_road_mb_per_second"] - whole) < 1e-6 * whole
    assert result["tokenizer_library_mb_per_second"] > 0
    assert result["text_mb"] == sum(len(t.encode()) for t in texts) / 1e6


def test_bad_flags_end_in_one_line_and_status_2(tmp_path):
    for flag in ("--steps=many", f"--store={tmp_path}"):
        done = call_tool(flag)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
