"""Metrics: rows in metrics.jsonl, curves in TensorBoard, tokens a second and MFU."""

import contextlib
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from danube_jax import files
from danube_jax.errors import UserError
from danube_jax.training.curves import CurveWriter
from danube_jax.training.events import FINISHED, HISTORY

# Dense bfloat16 matmul peak in FLOP/s, NVIDIA data sheets; the first name that stands in the
# device's own counts.
PEAK_FLOPS = (
    ("H200", 989.5e12),
    ("H100 PCIe", 756.0e12),
    ("H100 NVL", 835.0e12),
    ("H100", 989.5e12),
    ("B200", 2_250.0e12),
    ("A100", 312.0e12),
    ("L40S", 362.0e12),
    ("L4", 121.0e12),
    ("RTX 4090", 165.2e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, or None for an unknown one (a CPU, say)."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


class Throughput:
    """Tokens a second since the last call, and what share of a second was waiting for data."""

    def __init__(self, flops_per_token: float, device_kind: str, num_devices: int):
        """`flops_per_token`: matmul FLOPs, causal attention at half, remat not counted."""
        self._flops, self._devices = flops_per_token, num_devices
        self._peak = peak_flops(device_kind)
        self.reset()

    def reset(self) -> None:
        """Starts a new interval, so that compiling and evaluating do not count as training."""
        self._start, self._tokens, self._wait = time.perf_counter(), 0, 0.0

    def add(self, tokens: int, data_wait_seconds: float) -> None:
        """Counts one step."""
        self._tokens += tokens
        self._wait += data_wait_seconds

    def read(self) -> dict[str, float | None]:
        """The interval's rates; `mfu` is None where the device's peak is not known.

        MFU = tokens/s x FLOPs a token / (devices x dense bfloat16 peak), as in PaLM, appendix B,
        but with causal attention at half.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = self._tokens / seconds
        achieved = rate * self._flops / self._devices
        return {
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._devices,
            "tflops_per_second_per_device": achieved / 1e12,
            "mfu": achieved / self._peak if self._peak else None,
            "data_wait": self._wait / seconds,
        }


def memory_bytes() -> int:
    """Peak bytes in use on the fullest local device; the process's own where it does not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """Appends rows to metrics.jsonl and scalars to TensorBoard; process 0 of a run writes.

    Attributes:
      evaluations: the rows of that kind, those of earlier sessions of the run included.
      finished: the step at which an earlier session recorded the end of the run, or None.
      lost_steps: steps that an earlier session logged and that are run again.
    """

    def __init__(self, workdir: Path, resume_step: int):
        """Rows after `resume_step` are dropped: the steps they tell of are run again.

        Events that happened to the run as a whole stay (`events.HISTORY`).

        Raises:
          UserError: the files cannot be read or written.
        """
        self._path = workdir / "metrics.jsonl"
        self.lost_steps, self._failed = 0, False
        try:
            rows = self._keep(resume_step)
            self.evaluations = [row for row in rows if row["kind"] == "evaluation"]
            ends = [row["step"] for row in rows if row.get("event") == FINISHED]
            self.finished = max(ends, default=None)
            self._file = self._path.open("a")
            self._curves = CurveWriter(workdir / "tensorboard", resume_step + 1)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error}") from error

    def _keep(self, resume_step: int) -> list[dict[str, Any]]:
        """The rows up to `resume_step`; the file is replaced by them."""
        if not self._path.exists():
            return []
        rows, lines = [], self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # a line torn by a kill has no end
            try:
                row = json.loads(line)
                fine = {"kind", "step"} <= row.keys() and isinstance(row["step"], int)
            except (ValueError, AttributeError):
                fine = False
            if not fine:
                raise UserError(
                    f"{self._path}, line {number}: not a row of metrics: damaged; remove the line, "
                    "or move the file away to begin another"
                )
            if row["step"] <= resume_step or row.get("event") in HISTORY:
                rows.append(row)
            if row["kind"] == "train":
                self.lost_steps = max(self.lost_steps, row["step"] - resume_step)
        content = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_bytes(self._path, content.encode())
        return rows

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row with `kind` and `step`; numbers become curves named kind/key.

        Rows of kind "event" are no curves.

        Raises:
          UserError: the disk is full or the folder is gone.
        """
        if row["kind"] == "evaluation":
            self.evaluations.append(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if row["kind"] == "event":
                return
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                    self._curves.add_scalar(f"{row['kind']}/{key}", value, row["step"])
        except OSError as error:
            self._failed = True
            raise UserError(f"{self._path}: cannot be written: {error}") from error

    def write_samples(self, step: int, texts: Sequence[str]) -> None:
        """Writes generated texts to samples/ and to TensorBoard."""
        folder = self._path.parent / "samples"
        text = "\n\n---\n\n".join(texts)
        files.write_bytes(folder / f"step-{step:08d}.txt", (text + "\n").encode())
        self._curves.add_text("samples", text, step)

    def close(self) -> None:
        """Flushes both.

        Raises:
          UserError: the disk is full; not again where `write` has said so.
        """
        if self._failed:
            with contextlib.suppress(OSError):
                self._file.close()
            self._curves.abandon()
            return
        try:
            self._file.close()
            self._curves.close()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error}") from error
