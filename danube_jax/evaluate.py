"""Measure a model on lm-evaluation-harness tasks, beside the published scores.

Example:
  python -m danube_jax.evaluate --model=runs/danube2 --tasks=leaderboard
  python -m danube_jax.evaluate --model=DIR --tasks=hellaswag,piqa --limit=100
  python -m danube_jax.evaluate --model=DIR --tasks=danube --local_data=data/benchmarks
  python -m danube_jax.evaluate --model=DIR --tasks=mt_bench --mt_bench=data/mt_bench \\
      --judge_url=http://localhost:8000/v1 --judge_model=judge

Presets: leaderboard (Open LLM Leaderboard v1), danube (the paper's zero-shot tasks). A model is a
workdir (its latest checkpoint), one checkpoint step, or a Hugging Face folder. Answers are kept
while the command runs: the same command goes on where it was stopped.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from danube_jax import command_line
from danube_jax.console import info, warn
from danube_jax.errors import EXIT_INTERRUPTED, UserError
from danube_jax.interruption import Interrupted

_MODEL = flags.DEFINE_string("model", None, "A workdir, a checkpoint step, or a HF folder.")
_TASKS = flags.DEFINE_list("tasks", None, "leaderboard, danube, mt_bench, or lm-eval's tasks.")
_LIMIT = flags.DEFINE_integer("limit", None, "Documents a task (for trying).", lower_bound=1)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples in the prompt; default: the task's own.", lower_bound=0
)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder of further task YAML files.")
_LOCAL_DATA = flags.DEFINE_string(
    "local_data", None, "Folder of JSONL files instead of downloads; see docs/evaluation.md."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for the results; default: WORKDIR/evaluation, or none."
)
_CHAT = flags.DEFINE_bool("chat", False, "Put prompts in the model's chat format.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "danube, danube2, danube3 or a Jinja file; default: the model's."
)
_SYSTEM = flags.DEFINE_string("system", None, "System text.")
_MULTITURN = flags.DEFINE_bool("multiturn", True, "Examples are turns of the chat, with --chat.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "auto", ["auto", "float32", "bfloat16"], "auto: float32 on a CPU, else bfloat16."
)
_SEED = flags.DEFINE_integer("seed", 1234, "Of the choice of examples (lm-eval's default).")
_MT_BENCH = flags.DEFINE_string(
    "mt_bench", None, "Folder with MT-Bench's questions, judge prompts and references."
)
_JUDGE_URL = flags.DEFINE_string(
    "judge_url", None, "Address of an OpenAI-compatible judge; default: $OPENAI_BASE_URL."
)
_JUDGE_MODEL = flags.DEFINE_string(
    "judge_model", None, "Its name on the server; default: $JUDGE_MODEL."
)
_JUDGE_KEY = flags.DEFINE_string("judge_key", None, "Its key; better in $OPENAI_API_KEY.")
_JUDGE_TIMEOUT = flags.DEFINE_float(
    "judge_timeout", 120.0, "Seconds for one reply.", lower_bound=0.001
)
_JUDGE_ATTEMPTS = flags.DEFINE_integer(
    "judge_attempts", 5, "Requests for one score.", lower_bound=1
)
_JUDGE_WORKERS = flags.DEFINE_integer("judge_workers", 4, "Requests at once.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Of MT-Bench's answers; default: by category.", lower_bound=0.0
)
_CACHE = flags.DEFINE_bool("cache", True, "Keep answers, so that a stopped command goes on.")
_SAMPLES = flags.DEFINE_bool("log_samples", False, "Write every document and its answers, too.")


def main(argv: Sequence[str]) -> int:
    """Parses flags, evaluates, shows and writes results; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("model", "tasks"))
    try:
        return _main()
    except Interrupted as interrupted:
        interrupted.handled()
        kept = "; the same command goes on from here" if _CACHE.value else ""
        info(f"{interrupted}: stopped{kept}")
        return EXIT_INTERRUPTED


def _main() -> int:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; read when tqdm is imported
    from danube_jax.evaluation.tasks import MT_BENCH, load_tasks, select

    if _TASKS.value == [MT_BENCH]:
        return _mt_bench()
    selection = select(_TASKS.value, _NUM_FEWSHOT.value)
    from danube_jax.evaluation.loading import open_for_evaluation

    model = open_for_evaluation(_MODEL.value, _CHAT_TEMPLATE.value)
    if _CHAT.value and model.tokenizer.chat_template is None:
        raise UserError(
            f"{_MODEL.value}: has no chat template, so it is a base model; leave out --chat, or "
            "name a template with --chat_template"
        )
    with load_tasks(selection, include_path=_INCLUDE_PATH.value, data=_LOCAL_DATA.value) as (
        tasks,
        notes,
    ):
        for note in notes:
            warn(note)
        if _LIMIT.value is not None:
            notes = [*notes, f"only the first {_LIMIT.value:,} documents a task"]
        results, lm = _run(model, tasks)
    _report(selection, model, results, lm, notes)
    return 0


def _run(model: Any, tasks: list[Any]) -> tuple[dict, Any]:
    from danube_jax.evaluation.harness import DanubeLM
    from danube_jax.evaluation.run import run_tasks

    lm = DanubeLM(**model.load(_DTYPE.value))
    started = time.perf_counter()
    results = run_tasks(
        lm,
        tasks,
        limit=_LIMIT.value,
        chat=_CHAT.value,
        system=_SYSTEM.value,
        multiturn=_MULTITURN.value,
        cache=_cache_path(model) if _CACHE.value else None,
        seed=_SEED.value,
        samples=_SAMPLES.value,
    )
    results = dict(results)
    results["total_evaluation_time_seconds"] = f"{time.perf_counter() - started:.1f}"
    return results, lm


def _cache_path(model: Any) -> Path:
    folder = _output_folder(model)
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "danube_jax" / "evaluation"
    return folder / "cache" / model.fingerprint(_DTYPE.value)


def _output_folder(model: Any) -> Path | None:
    if _OUTPUT.value is not None:
        if Path(_OUTPUT.value).is_file():
            raise UserError(f"--output: {_OUTPUT.value} is a file; expected a folder")
        return Path(_OUTPUT.value)
    return model.source.path / "evaluation" if model.source.kind == "workdir" else None


def _report(selection: Any, model: Any, results: dict, lm: Any, notes: list[str]) -> None:
    import danube_jax
    from danube_jax.evaluation.results import (
        comparison_table,
        markdown,
        task_table,
        write_results,
    )

    source = model.source
    step = "" if source.step is None else f"{source.step}_"
    results["model_name"] = results["model_source"] = str(source.path)
    results["danube_jax"] = {
        "version": danube_jax.__version__,
        "selection": selection.name,
        "step": source.step,
        "dtype": model.dtype(_DTYPE.value),
        "chat": _CHAT.value,
        "notes": notes,
        "requests": lm.requests,
        "tokens": lm.tokens,
        "seconds": lm.seconds,
    }
    name = source.path.name if source.step is None else f"{source.path.name}, step {source.step}"
    _show(task_table(results))
    if selection.preset is not None:
        _show(comparison_table(results, selection.preset, name))
    info(speed_line(lm))
    folder = _output_folder(model)
    if folder is not None:
        text = markdown(results, selection.preset, name, notes)
        stem = f"results_{step}{selection.name}"
        for path in write_results(folder, stem, results, text, samples=_SAMPLES.value):
            info(f"wrote {path}")


def _show(table: Any) -> None:
    """Prints a table on standard output; in full width where that is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _mt_bench() -> int:
    """Answers and grades MT-Bench; returns the exit status."""
    import dataclasses

    from danube_jax.evaluation.judge import Judge, JudgeConfig
    from danube_jax.evaluation.loading import open_for_evaluation
    from danube_jax.evaluation.mt_bench import read_mt_bench
    from danube_jax.evaluation.mt_bench_run import ChatModel, run_mt_bench, table
    from danube_jax.inference.sampling import SamplingConfig

    folder = _MT_BENCH.value or _LOCAL_DATA.value
    if folder is None:
        raise UserError("--mt_bench: is needed; expected the folder of MT-Bench's files")
    bench = read_mt_bench(folder)
    if _LIMIT.value is not None:
        bench = dataclasses.replace(bench, questions=bench.questions[: _LIMIT.value])
    model = open_for_evaluation(_MODEL.value, _CHAT_TEMPLATE.value)
    source = model.source
    if model.tokenizer.chat_template is None:
        raise UserError(
            f"{_MODEL.value}: has no chat template, so it is a base model; MT-Bench needs a chat "
            "model (or name its template with --chat_template)"
        )
    url, name = (
        flag.value or os.environ.get(variable)
        for flag, variable in ((_JUDGE_URL, "OPENAI_BASE_URL"), (_JUDGE_MODEL, "JUDGE_MODEL"))
    )
    if not url or not name:
        missing = "--judge_url" if not url else "--judge_model"
        raise UserError(f"{missing}: is needed; expected an OpenAI-compatible server's")
    judge = Judge(
        JudgeConfig(
            url,
            name,
            key=_JUDGE_KEY.value or os.environ.get("OPENAI_API_KEY", ""),
            timeout=_JUDGE_TIMEOUT.value,
            attempts=_JUDGE_ATTEMPTS.value,
            workers=_JUDGE_WORKERS.value,
        )
    )
    output = _output_folder(model)
    if output is None:
        raise UserError("--output: is needed for a Hugging Face folder; expected a folder")
    judge.check()
    parts = model.load(_DTYPE.value)
    penalty = source.generation.get("repetition_penalty") or 1.0
    title = source.path.name if source.step is None else f"{source.path.name}, step {source.step}"
    chat_model = ChatModel(
        name=title,
        fingerprint=model.fingerprint(_DTYPE.value),
        generator=parts["generator"][0],
        tokenizer=model.tokenizer,
        context=parts["max_length"],
        sampling=SamplingConfig(
            repetition_penalty=float(penalty), stop_tokens=source.eos_ids(), seed=_SEED.value
        ),
        batch=parts["generator"][0].max_batch,
    )
    summary = run_mt_bench(bench, chat_model, judge, output, source.step, _TEMPERATURE.value)
    _show(table(summary, title))
    if summary["ungraded"]:
        warn(f"{len(summary['ungraded'])} turns have no score and are left out of the means")
    return 0


def speed_line(lm: Any) -> str:
    """How much was computed, and how fast."""
    if not lm.seconds:
        return "all answers were known from an earlier run"
    return (
        f"{lm.requests:,} requests, {lm.tokens:,} tokens in {lm.seconds:.1f} s: "
        f"{lm.tokens / lm.seconds:,.1f} tokens/s, {lm.requests / lm.seconds:,.2f} requests/s "
        f"(shared beginnings entered once: {lm.computed_tokens:,} tokens computed)"
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command_line.run(main)
