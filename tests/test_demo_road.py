"""The README's road from base model to chat: train, SFT, DPO, export, chat; shortened."""

import subprocess
import sys

import pytest
from helpers import ROOT, command, read_rows


@pytest.mark.slow
@pytest.mark.timeout(1_800)  # five commands, of which three train
def test_base_sft_dpo_export_chat(tmp_path):
    pytest.importorskip("torch", reason="the export compares with transformers")
    runs = {name: tmp_path / name for name in ("demo", "demo_sft", "demo_dpo")}
    steps = {"demo": 60, "demo_sft": 40, "demo_dpo": 20}
    before = None
    for name, workdir in runs.items():
        arguments = [f"--config=configs/{name}.py", f"--workdir={workdir}"]
        arguments += [f"--config.training.max_steps={steps[name]}"]
        arguments += [f"--config.init_from.path={before}"] if before else []
        result = command(*arguments)
        assert result.returncode == 0, result.stderr
        before = workdir
    first, *_, last = read_rows(runs["demo_sft"], "evaluation")
    assert last["loss/facts"] < 0.5 * first["loss/facts"]
    first, *_, last = read_rows(runs["demo_dpo"], "evaluation")
    assert first["accuracy/sentences"] == 0.5
    assert last["accuracy/sentences"] > 0.6
    export = command(
        f"--model={runs['demo_dpo']}",
        f"--output={tmp_path / 'hf'}",
        module="tools/convert_to_hf.py",
    )
    assert export.returncode == 0, export.stderr
    chat = subprocess.run(
        [sys.executable, "-m", "danube_jax.chat", f"--model={tmp_path / 'hf'}", "--temperature=0"],
        input="What colour is a banana?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
