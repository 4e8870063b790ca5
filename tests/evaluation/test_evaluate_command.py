"""`python -m danube_jax.evaluate` as users call it."""

import json
import os
import subprocess
import sys

import pytest
from evaluation_models import write_model
from helpers import ROOT, command
from tiny_folder import copy_without

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "mistral")


def write_piqa(folder):
    folder.mkdir()
    rows = [
        {"goal": f"do {i}", "sol1": "this way", "sol2": "that other way", "label": i % 2}
        for i in range(12)
    ]
    (folder / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_results_beside_the_published_ones(model, tmp_path):
    data, output = write_piqa(tmp_path / "data"), tmp_path / "out"
    arguments = (
        f"--model={model}",
        "--tasks=piqa",
        f"--local_data={data}",
        f"--output={output}",
        "--limit=10",
        "--log_samples",
    )
    done = command(*arguments, module="danube_jax.evaluate")
    assert done.returncode == 0, done.stderr
    assert "PIQA" in done.stdout
    assert "76.93" in done.stdout  # Danube's
    assert "20 requests" in done.stderr
    assert "tokens/s" in done.stderr
    saved = json.loads((output / "results_piqa.json").read_text())
    score, error = (saved["results"]["piqa"][key] for key in ("acc,none", "acc_stderr,none"))
    assert f"{100 * score:.2f} ± {100 * error:.2f}" in done.stdout
    assert saved["n-samples"]["piqa"]["effective"] == 10
    assert {"config", "versions", "n-shot", "higher_is_better"} <= saved.keys()
    assert saved["danube_jax"]["notes"] == ["only the first 10 documents a task"]
    assert "only the first 10" in (output / "results_piqa.md").read_text()
    samples = (output / "samples_piqa_piqa.jsonl").read_text().splitlines()
    assert len(samples) == 10
    # Answers are kept: the same command computes nothing, and comes to the same.
    again = command(*arguments, module="danube_jax.evaluate")
    assert "all answers were known" in again.stderr
    assert again.stdout == done.stdout


def test_mistakes_are_one_line(model, tmp_path):
    data = write_piqa(tmp_path / "data")
    bare = copy_without(model, tmp_path / "bare", "tokenizer.json", "tokenizer_config.json")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.yaml").write_text("task: broken\ndataset_path: no/such\n")
    (tmp_path / "no_yaml").mkdir()
    (tmp_path / "no_yaml" / "x.yaml").write_text("task: [")
    (tmp_path / "odd").mkdir()
    odd = {"goal": "do", "sol1": None, "sol2": [], "label": "x"}
    (tmp_path / "odd" / "piqa_valid.jsonl").write_text(json.dumps(odd) + "\n")
    local = [f"--model={model}", f"--local_data={data}"]
    cases = {
        "--tasks is needed": [f"--model={model}"],
        "there is no task 'hellaswagg'; did you mean hellaswag": [*local, "--tasks=hellaswagg"],
        "has no data for the task winogrande; expected a file winogrande_xl_val*": [
            *local,
            "--tasks=winogrande",
        ],
        "nowhere is no folder": [f"--model={model}", "--tasks=piqa", "--local_data=nowhere"],
        "--include_path: nowhere is no folder": [*local, "--tasks=piqa", "--include_path=nowhere"],
        "so it is a base model; leave out --chat": [*local, "--tasks=piqa", "--chat"],
        "no tokenizer in this folder": [f"--model={bare}", *local[1:], "--tasks=piqa"],
        "no such folder": ["--model=nowhere", *local[1:], "--tasks=piqa"],
        "the task broken cannot be loaded": [
            f"--model={model}",
            f"--include_path={tmp_path / 'broken'}",
            "--tasks=broken",
        ],
        "the preset 'danube' stands alone": [*local, "--tasks=danube,piqa"],
        "'mt_bench' stands alone": [*local, "--tasks=piqa,mt_bench"],
        f"{tmp_path / 'no_yaml' / 'x.yaml'} is no YAML": [
            *local,
            f"--include_path={tmp_path / 'no_yaml'}",
            "--tasks=x",
        ],
        f"{tmp_path / 'odd' / 'piqa_valid.jsonl'}, line 1: goal, sol1, sol2, label holds": [
            f"--model={model}",
            f"--local_data={tmp_path / 'odd'}",
            "--tasks=piqa",
        ],
        "the cache of answers cannot be used": [*local, "--tasks=piqa", "--output=/dev/null/x"],
        "--mt_bench: is needed": [f"--model={model}", "--tasks=mt_bench"],
        "lacks the questions of MT-Bench": [*local, "--tasks=mt_bench"],
        "--limit": [*local, "--tasks=piqa", "--limit=0"],
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "evaluate_cases.py")],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_OFFLINE": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    for expected, (status, shown) in zip(cases, json.loads(done.stdout), strict=True):
        assert status == 2, shown
        assert expected in shown
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, shown
        assert shown.strip().splitlines()[-1] == errors[0]
        assert "Traceback" not in shown
    folders = ["bare", "broken", "data", "no_yaml", "odd"]
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
