"""Measures import and export of a Hugging Face folder beside copying the same files.

Example:
  python tools/bench_convert.py
  python tools/bench_convert.py --model=HF_DIR --repeats=5 --json=convert.json

Without --model a random Mistral model of about --gigabytes in bfloat16 is made. The files are in
the page cache. Seconds are of the conversion, without the start of Python and its imports, and
include waiting until all is on disk; for copying, `cp -r` and the same with fsync of every file.
Peak memory is that of a fresh process less what it takes before it begins.
"""

import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line, files
from danube_jax.config import ModelConfig
from danube_jax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder; default: a random model.")
_GIGABYTES = flags.DEFINE_float("gigabytes", 1.1, "Size of the random model.", lower_bound=0.01)
_SHARD_SIZE = flags.DEFINE_string("shard_size", "500MB", "Of the random model and of the export.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Of each; the median counts.", lower_bound=1)
_SCRATCH = flags.DEFINE_string("scratch", None, "For temporary files; default: the system's.")
_JSON = flags.DEFINE_string("json", None, "Also write the result to this file.")

COPIES = ("cp -r", "cp -r, fsync")
LAYER_PARAMETERS = 2 * 2_048 * 2_048 + 2 * 2_048 * 512 + 3 * 2_048 * 5_632


def random_config(gigabytes: float) -> ModelConfig:
    """A Mistral model of about this many GB in bfloat16."""
    parameters = gigabytes * 1e9 / 2
    layers = max(1, round((parameters - 2 * 32_000 * 2_048) / LAYER_PARAMETERS))
    vocab = 32_000 if parameters > 2 * 32_000 * 2_048 else 1_000
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=2_048,
        intermediate_size=5_632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def make_folder(folder: Path, config: ModelConfig, shard_bytes: int) -> None:
    """Writes a random model in bfloat16 as a Hugging Face folder without a tokenizer."""
    from danube_jax.interop import hf_config, safetensors_file, weight_files
    from danube_jax.interop.export_hf import plan_shards
    from danube_jax.interop.hf_weights import layout

    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = [(t.name, dtype, t.shape) for leaf in layout(config) for t in leaf.tensors]
    shards = plan_shards(tensors, shard_bytes)
    weight_map = {}
    folder.mkdir()
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        writer = safetensors_file.Writer(folder / name, shard)
        for tensor, _, shape in shard:
            values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            writer.write(tensor, values.astype(dtype))
            weight_map[tensor] = name
        writer.close()
    files.write_json(folder / weight_files.SAFETENSORS_INDEX, {"weight_map": weight_map})
    content = hf_config.export_config(config, dtype="bfloat16", bos_id=1, eos_id=2, pad_id=0)
    files.write_json(folder / hf_config.CONFIG_FILE, content)


def run_import(source: str, target: str) -> None:
    """The conversion that `tools/convert_from_hf.py` makes."""
    from danube_jax.interop.import_hf import import_model

    import_model(Path(source), Path(target))


def run_export(source: str, target: str) -> None:
    """The conversion that `tools/convert_to_hf.py --dtype=stored --noverify` makes."""
    from danube_jax.interop.export_hf import ExportOptions, export_model, parse_size
    from danube_jax.interop.model_source import open_model

    options = ExportOptions(dtype="stored", shard_bytes=parse_size("500MB"), verify=False)
    export_model(open_model(Path(source)), Path(target), options)


def _child(work: Callable[[str, str], None], source: str, target: str, queue: Any) -> None:
    import jax

    import danube_jax.interop.export_hf
    import danube_jax.interop.import_hf  # noqa: F401 (imports take memory and time of their own)

    jax.numpy.zeros(()).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    resident = _status("VmRSS")
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    work(source, target)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    queue.put((seconds, _cpu_seconds(before, after), _status("VmHWM") - resident))


def _status(key: str) -> int:
    """Bytes of resident memory of this process, as Linux counts them, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _cpu_seconds(before: Any, after: Any) -> float:
    """Processor time, user's and system's, between two measurements."""
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(
    work: Callable[[str, str], None], source: Path, target: Path
) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak bytes of a conversion in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    shutil.rmtree(target, ignore_errors=True)
    process = context.Process(target=_child, args=(work, str(source), str(target), queue))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"{source}: the conversion failed; run tools/convert_from_hf.py on it")
    return queue.get()


def copy(source: Path, target: Path, durable: bool) -> tuple[float, float]:
    """Seconds and processor seconds of `cp -r`, and of fsync of the copies where `durable`."""
    shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if durable:
        for path in target.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    seconds = time.perf_counter() - begin
    return seconds, _cpu_seconds(before, resource.getrusage(resource.RUSAGE_CHILDREN))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def benchmark(source: Path, scratch: Path) -> dict[str, Any]:
    """Medians of every kind of work on one folder, taken in turns."""
    ours, back, copied = scratch / "ours", scratch / "back", scratch / "copy"
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}

    def record(name: str, taken: float, cpu: float) -> None:
        seconds.setdefault(name, []).append(taken)
        processor.setdefault(name, []).append(cpu)

    copy(source, copied, durable=True)  # warms the page cache
    for _ in range(_REPEATS.value):
        for name in COPIES:
            os.sync()
            record(name, *copy(source, copied, durable=name == COPIES[1]))
        for name, work, start, target in (
            ("import", run_import, source, ours),
            ("export", run_export, ours, back),
        ):
            os.sync()
            taken, cpu, peak = measure(work, start, target)
            record(name, taken, cpu)
            peaks.setdefault(name, []).append(peak)
    size = folder_bytes(source)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bytes": size,
        "seconds": median,
        "all_seconds": seconds,
        "cpu_seconds": {name: statistics.median(v) for name, v in processor.items()},
        "times_copy": {n: [median[n] / median[c] for c in COPIES] for n in peaks},
        "peak_bytes": {name: max(values) for name, values in peaks.items()},
        "peak_of_model": {name: max(values) / size for name, values in peaks.items()},
        "load_average": os.getloadavg()[0],
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {n: metadata.version(n) for n in ("jax", "orbax-checkpoint", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report as JSON and as a table."""
    print(json.dumps(report, indent=1))
    table = Table(title=f"{report['bytes'] / 1e9:.2f} GB", title_justify="left")
    columns = ("work", "seconds", "GB/s", "CPU seconds", *(f"x {c}" for c in COPIES), "peak/model")
    for column in columns:
        table.add_column(column, justify="left" if column == "work" else "right")
    for name, value in report["seconds"].items():
        ratios = [f"{ratio:.2f}" for ratio in report["times_copy"].get(name, ())]
        peak = report["peak_of_model"].get(name)
        table.add_row(
            name,
            f"{value:.2f}",
            f"{report['bytes'] / 1e9 / value:.2f}",
            f"{report['cpu_seconds'][name]:.2f}",
            *(ratios or ["", ""]),
            "" if peak is None else f"{peak:.3f}",
        )
    Console(highlight=False).print(table)


def main(argv: Sequence[str]) -> int:
    """Makes or takes a model, measures and prints; returns the exit status."""
    command_line.parse_flags(argv, __doc__)
    from danube_jax.interop.export_hf import parse_size

    shard_bytes = parse_size(_SHARD_SIZE.value)
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value, prefix="bench_convert.") as scratch:
        source = Path(_MODEL.value) if _MODEL.value else Path(scratch) / "model"
        if not _MODEL.value:
            make_folder(source, random_config(_GIGABYTES.value), shard_bytes)
        elif not source.is_dir():
            raise UserError(f"--model={source}: no such folder")
        report = benchmark(source, Path(scratch))
    show(report)
    if _JSON.value:
        files.write_json(_JSON.value, report)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    command_line.run(main)
