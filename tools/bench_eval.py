"""Measure lm-eval tasks with our model and with lm-eval's Hugging Face backend.

Example:
  python tools/bench_eval.py --model=HF_DIR --tasks=piqa,arc_easy --limit=50 \\
      --local_data=data/benchmarks

Both run in this call, taking turns, on the same weights, tasks and documents. Loading is not timed;
compiling our programs is, in the first round; in later ones they are at hand. CPU seconds are those
of all threads: on a shared machine they say more than the clock. Scores must be the same, and the
largest difference of a log-likelihood is shown. Needs PyTorch and the extra 'eval'.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from danube_jax import command_line, files
from danube_jax.console import info
from danube_jax.errors import EXIT_RUN_FAILED, UserError

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder.")
_TASKS = flags.DEFINE_list("tasks", ["piqa"], "lm-eval's tasks, or a preset.")
_LIMIT = flags.DEFINE_integer("limit", 50, "Documents a task.", lower_bound=1)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in the prompt.", lower_bound=0)
_LOCAL_DATA = flags.DEFINE_string("local_data", None, "Folder of JSONL files.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder of further task YAML files.")
_HF_BATCH = flags.DEFINE_integer("hf_batch_size", 8, "Of the other backend.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each backend runs.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of both.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the figures as JSON.")


def main(argv: Sequence[str]) -> int:
    """Measures both backends; returns 1 where their scores differ."""
    command_line.parse_flags(argv, __doc__, required=("model",))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not (Path(_MODEL.value) / "config.json").is_file():
        raise UserError(f"--model: {_MODEL.value} is no Hugging Face folder; expected config.json")
    import jax
    from lm_eval.models.huggingface import HFLM

    from danube_jax.evaluation.harness import DanubeLM

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    backends = {
        "ours": DanubeLM(pretrained=_MODEL.value, dtype=_DTYPE.value),
        "lm-eval hf": HFLM(
            pretrained=_MODEL.value, dtype=_DTYPE.value, device=device, batch_size=_HF_BATCH.value
        ),
    }
    results: dict[str, Mapping[str, Any]] = {}
    seconds: dict[str, tuple[float, float]] = {}
    for number in range(1, _ROUNDS.value + 1):
        for name, lm in backends.items():
            measured, seconds[f"{name}, round {number}"] = _measure(lm)
            results.setdefault(name, measured)
    report = _compare(*results.values())
    report |= {
        "seconds": {name: wall for name, (wall, _) in seconds.items()},
        "cpu_seconds": {name: cpu for name, (_, cpu) in seconds.items()},
        "model": _MODEL.value,
        "tasks": _TASKS.value,
        "limit": _LIMIT.value,
        "dtype": _DTYPE.value,
        "hf_batch_size": _HF_BATCH.value,
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "lm_eval", "torch", "transformers")
        },
        "date": datetime.date.today().isoformat(),
    }
    _show(report)
    if _OUTPUT.value is not None:
        files.write_json(_OUTPUT.value, report)
    return 0 if report["same_scores"] else EXIT_RUN_FAILED


def _measure(lm: Any) -> tuple[Mapping[str, Any], tuple[float, float]]:
    """Results, and (seconds, CPU seconds) from the first request to the last answer."""
    from danube_jax.evaluation.run import run_tasks
    from danube_jax.evaluation.tasks import load_tasks, select

    wall = cpu = 0.0

    def timed(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal wall, cpu
            start, start_cpu = time.perf_counter(), time.process_time()
            answer = method(*args, **kwargs)
            wall += time.perf_counter() - start
            cpu += time.process_time() - start_cpu
            return answer

        return call

    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    for kind in kinds:
        setattr(lm, kind, timed(getattr(type(lm), kind).__get__(lm)))
    selection = select(_TASKS.value, _NUM_FEWSHOT.value)
    with load_tasks(selection, include_path=_INCLUDE_PATH.value, data=_LOCAL_DATA.value) as (
        tasks,
        _,
    ):
        results = run_tasks(lm, tasks, limit=_LIMIT.value, samples=True)
    for kind in kinds:
        delattr(lm, kind)
    info(f"{type(lm).__name__}: {wall:.1f} s, {cpu:.1f} CPU s")
    return results, (wall, cpu)


def _compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Scores side by side, and the largest difference of a log-likelihood."""
    from danube_jax.evaluation.results import task_rows

    pairs = zip(task_rows(ours), task_rows(theirs), strict=True)
    scores = {f"{a.task} {a.metric}": [a.value, b.value] for a, b in pairs}
    largest, requests = 0.0, 0
    for task, samples in ours["samples"].items():
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            for (a,), (b,) in zip(mine["resps"], other["resps"], strict=True):
                requests += 1
                if not isinstance(a, str):
                    a, b = (x if isinstance(x, float) else x[0] for x in (a, b))
                    largest = max(largest, abs(a - b))
    # Perplexities are no counts of right answers, and equal within rounding only.
    same = all(
        a == b or ("acc" not in name and abs(a - b) <= 1e-3 * abs(b))
        for name, (a, b) in scores.items()
    )
    return {
        "scores": scores,
        "same_scores": same,
        "requests": requests,
        "largest_loglikelihood_difference": largest,
    }


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("backend", "seconds", "CPU seconds", "requests/s")
    for name, seconds in report["seconds"].items():
        cpu = report["cpu_seconds"][name]
        rate = report["requests"] / seconds
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", f"{rate:.2f}")
    console.print(table)
    table = Table("score", "ours", "lm-eval hf")
    for name, (a, b) in report["scores"].items():
        table.add_row(name, f"{a:.4f}", f"{b:.4f}")
    console.print(table)
    difference = report["largest_loglikelihood_difference"]
    console.print(f"largest difference of a log-likelihood: {difference:.2e}")
    console.print(json.dumps({k: report[k] for k in ("device", "machine", "versions", "date")}))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command_line.run(main)
