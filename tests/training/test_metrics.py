"""Rows, rates and MFU."""

import json

import pytest

from danube_jax.errors import UserError
from danube_jax.training import metrics
from danube_jax.training.metrics import MetricsWriter, Throughput, peak_flops


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write({"kind": "train", "step": step, "loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # what a killed process leaves
    writer = MetricsWriter(tmp_path, 3)
    writer.write({"kind": "train", "step": 4, "loss": 9.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 3.0, 9.0]


def test_another_file_under_that_name_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"name": "something else"}\n')
    with pytest.raises(UserError, match="line 1: not a row of metrics"):
        MetricsWriter(tmp_path, 0)


def test_tensorboard_reads_the_curves(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 4):
        writer.write({"kind": "train", "step": step, "loss": 1.0 / step, "phase": "a"})
    writer.write_samples(3, ["once upon"])
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [(s.step, pytest.approx(s.value)) for s in scalars] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert (tmp_path / "samples" / "step-00000003.txt").read_text() == "once upon\n"


def test_mfu_is_the_stated_formula(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(11.25e9, "NVIDIA H100 80GB HBM3", num_devices=8)
    throughput.add(600_000, 0.25)
    rates = throughput.read()
    assert rates["tokens_per_second"] == 300_000
    assert rates["tokens_per_second_per_device"] == 37_500
    assert rates["mfu"] == pytest.approx(37_500 * 11.25e9 / 989.5e12)
    assert rates["data_wait"] == pytest.approx(0.125)


def test_unknown_devices_have_no_mfu():
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert Throughput(1.0, "cpu", 1).read()["mfu"] is None
