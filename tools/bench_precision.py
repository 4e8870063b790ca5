"""Trains one config in several precisions, a few seeds each, and compares the held-out losses.

Examples:
  python tools/bench_precision.py --config=configs/demo.py --workdir=runs/precision
  python tools/bench_precision.py --config=configs/danube2.py --workdir=runs/danube2_precision \\
      --precisions=bfloat16,fp8 --seeds=0 --config.training.max_steps=5000

Runs of one seed read the same batches and begin with the same weights. Activations, embeddings and
head are bfloat16 in all but 'float32', and evaluation computes in the activations' dtype: what
differs is how the linear layers of the blocks multiply while training. Everything else is the
config's, overrides included.

A run that is complete is not trained again, and one that was stopped goes on. The folder holds a
run a precision and seed, comparison.html with all of their curves, and precision.json.
"""

import dataclasses
import functools
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from danube_jax import command_line, files
from danube_jax.config import RunConfig, parse_config
from danube_jax.config_validation import LINEAR_PRECISIONS
from danube_jax.console import info
from danube_jax.errors import EXIT_INTERRUPTED, EXIT_RUN_FAILED, UserError
from danube_jax.report.collect import RunFolder, collect
from danube_jax.report.page import write_comparison
from danube_jax.training.workdir import PREPARED_DATA, check_workdir

RESULTS, PAGE = "precision.json", "comparison.html"

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/ for pretraining; override with --config.key=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison.")
_PRECISIONS = flags.DEFINE_list(
    "precisions",
    ["bfloat16", "fp8"],
    f"Of {', '.join(LINEAR_PRECISIONS)}; the others are compared with the first.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "A run of each precision has each seed.")


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of the comparison."""

    precision: str
    seed: int
    folder: Path
    run: RunConfig


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a complete run reached.

    Attributes:
      steps: int [E], where held-out data was evaluated.
      losses: nats a token [E], over all sources together.
      final: source → nats a token, at the end.
      train_loss: mean over the last 2 % of the logged steps.
    """

    precision: str
    seed: int
    steps: np.ndarray
    losses: np.ndarray
    final: dict[str, float]
    train_loss: float

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Losses at some of the steps."""
        return self.losses[np.searchsorted(self.steps, steps)]


def plan(
    config: Mapping[str, Any], precisions: Sequence[str], seeds: Sequence[str], workdir: Path
) -> list[Member]:
    """The runs, those of one seed one after another, so that a part of them is a comparison.

    Raises:
      UserError: a precision, a seed or the config is not possible.
    """
    for name in precisions:
        if name not in LINEAR_PRECISIONS:
            raise UserError(f"--precisions={name}: expected of {', '.join(LINEAR_PRECISIONS)}")
    if len(set(precisions)) < 2:
        raise UserError("--precisions: expected at least two, to compare")
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds={seed}: expected whole numbers from 0 on")
    if not seeds:
        raise UserError("--seeds: expected at least one")
    members = []
    for seed in dict.fromkeys(map(int, seeds)):
        for precision in dict.fromkeys(precisions):
            changed = ml_collections.ConfigDict(config)
            for key, value in _overrides(precision, seed, config, workdir).items():
                changed.update_from_flattened_dict({key: value})
            run = parse_config(changed)
            if run.objective != "pretrain":
                raise UserError(
                    f"config.objective: {run.objective!r} is not possible; expected 'pretrain'"
                )
            folder = workdir / f"{precision}-seed{seed}"
            members.append(Member(precision, seed, folder, run))
    return members


def _overrides(
    precision: str, seed: int, config: Mapping[str, Any], workdir: Path
) -> dict[str, Any]:
    """What a member's config has of its own; built-in text is prepared once for all."""
    return {
        "name": f"{precision}-seed{seed}",
        "precision.linear": precision,
        "precision.compute": "float32" if precision == "float32" else "bfloat16",
        "training.seed": seed,
        "data.directory": config["data"]["directory"] or str(workdir / PREPARED_DATA),
    }


def is_complete(member: Member) -> bool:
    """Whether the member's folder holds its whole run.

    Raises:
      UserError: it holds another one.
    """
    if not member.folder.is_dir() or not any(member.folder.iterdir()):
        return False
    if not member.run.init_from.model_from_source:  # else the config does not say the model
        check_workdir(member.folder, member.run)
    return (member.folder / "metrics.jsonl").is_file() and (
        collect(member.folder).status == "finished"
    )


def train(member: Member, arguments: Sequence[str], config: Mapping[str, Any]) -> int:
    """Runs the trainer in a process of its own; its exit status.

    `arguments` are the user's for the config.
    """
    overrides = _overrides(member.precision, member.seed, config, member.folder.parent)
    command = [sys.executable, "-m", "danube_jax.train", *arguments]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    command += [f"--workdir={member.folder}"]
    process = subprocess.Popen(command)
    # The trainer saves and stops at a signal; one from the keyboard reaches it by itself.
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments about the config, as they were given."""
    found, rest = [], list(argv[1:])
    while rest:
        word = rest.pop(0)
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("-") and (name == "config" or name.startswith("config.")):
            found.append(word)
            if "=" not in word and rest:
                found.append(rest.pop(0))
    return found


def outcome(member: Member) -> Outcome:
    """Reads a complete run.

    Raises:
      UserError: it has no held-out losses.
    """
    folder: RunFolder = collect(member.folder)
    rows = folder.metrics.evaluation
    sources = [key.removeprefix("loss/") for key in rows if key.startswith("loss/")]
    train_loss = folder.final()
    if not sources or train_loss is None:
        raise UserError(
            f"{member.folder}: no held-out losses in metrics.jsonl; expected sources with held-out "
            "stores"
        )
    tokens = np.stack([rows[f"tokens/{name}"].values for name in sources])
    losses = np.stack([rows[f"loss/{name}"].values for name in sources])
    return Outcome(
        precision=member.precision,
        seed=member.seed,
        steps=rows[f"loss/{sources[0]}"].steps,
        losses=(tokens * losses).sum(0) / tokens.sum(0),
        final={name: float(rows[f"loss/{name}"].values[-1]) for name in sources},
        train_loss=train_loss[0],
    )


def compare(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each precision but the first beside the first, seed by seed.

    Curves have the steps at which all runs were evaluated.

    Returns:
      Rows of `precision`, `baseline`, and relative differences: `final`, one a seed, their `mean`
      and sample standard deviation `spread` (None for one seed), `train`, the mean of those of
      training losses, and `curve`, (step, mean, spread) of those of held-out losses.
    """
    by_precision: dict[str, dict[int, Outcome]] = {}
    for one in outcomes:
        by_precision.setdefault(one.precision, {})[one.seed] = one
    (baseline, base), *others = by_precision.items()
    steps_E = functools.reduce(np.intersect1d, [one.steps for one in outcomes])
    rows = []
    for precision, ours in others:
        pairs = [(ours[seed], base[seed]) for seed in base if seed in ours]
        relative_SE = np.stack([a.at(steps_E) / b.at(steps_E) - 1 for a, b in pairs])
        spread_E = [None] * relative_SE.shape[1]
        if len(pairs) > 1:
            spread_E = relative_SE.std(axis=0, ddof=1).tolist()
        rows.append(
            {
                "precision": precision,
                "baseline": baseline,
                "final": relative_SE[:, -1].tolist(),
                "mean": float(relative_SE[:, -1].mean()),
                "spread": spread_E[-1],
                "train": float(np.mean([a.train_loss / b.train_loss - 1 for a, b in pairs])),
                "curve": [
                    (int(step), float(mean), spread)
                    for step, mean, spread in zip(
                        steps_E, relative_SE.mean(axis=0), spread_E, strict=True
                    )
                ],
            }
        )
    return rows


def print_tables(outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]]) -> None:
    """Curves and final losses for people; Markdown, so that they can be kept."""
    precisions = list(dict.fromkeys(one.precision for one in outcomes))
    groups = {name: [one for one in outcomes if one.precision == name] for name in precisions}
    columns = [*precisions, *(f"{row['precision']} over {row['baseline']}" for row in rows)]
    print("Held-out loss, nats a token: mean over seeds; difference with its spread over seeds\n")
    print(f"| step | {' | '.join(columns)} |\n| ---: {'| ---: ' * len(columns)}|")
    for points in zip(*(row["curve"] for row in rows), strict=True):
        step = points[0][0]
        cells = [f"{np.mean([one.at(step) for one in groups[name]]):.4f}" for name in precisions]
        cells += [_percent(mean, spread) for _, mean, spread in points]
        print(f"| {step:,} | {' | '.join(cells)} |")
    print(f"\n| at the end | {' | '.join(columns)} |\n| --- {'| ---: ' * len(columns)}|")
    seeds = [one.seed for one in groups[precisions[0]]]
    for i, seed in enumerate(seeds):
        cells = [f"{groups[name][i].losses[-1]:.4f}" for name in precisions]
        cells += [_percent(row["final"][i], None) for row in rows]
        print(f"| seed {seed} | {' | '.join(cells)} |")
    ends = {name: [one.losses[-1] for one in group] for name, group in groups.items()}
    cells = [_loss(values) for values in ends.values()]
    cells += [_percent(row["mean"], row["spread"]) for row in rows]
    print(f"| mean ± spread | {' | '.join(cells)} |")
    for source in outcomes[0].final:
        values = {name: [one.final[source] for one in group] for name, group in groups.items()}
        cells = [_loss(losses) for losses in values.values()]
        for row in rows:
            pairs = zip(values[row["precision"]], values[row["baseline"]], strict=True)
            ratios = [ours / base - 1 for ours, base in pairs]
            cells.append(_percent(np.mean(ratios), _spread(ratios)))
        print(f"| {source} | {' | '.join(cells)} |")
    cells = [_loss([one.train_loss for one in group]) for group in groups.values()]
    cells += [_percent(row["train"], None) for row in rows]
    print(f"| training | {' | '.join(cells)} |")


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _loss(values: Sequence[float]) -> str:
    spread = _spread(values)
    return f"{np.mean(values):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _percent(mean: float, spread: float | None) -> str:
    return f"{mean:+.2%}" + ("" if spread is None else f" ± {spread:.2%}")


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, compares, and writes both files; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("config", "workdir"))
    config = command_line.config_dict(_CONFIG)
    workdir = Path(_WORKDIR.value)
    members = plan(config, _PRECISIONS.value, _SEEDS.value, workdir)
    for i, member in enumerate(members, 1):
        what = f"run {i} of {len(members)}: {member.precision}, seed {member.seed}"
        if is_complete(member):
            info(f"{what}: complete")
            continue
        info(what)
        status = train(member, config_arguments(argv), config)
        if status == EXIT_INTERRUPTED:
            return status
        if status or not is_complete(member):
            info(f"{what}: ended with status {status} before its last step")
            return status or EXIT_RUN_FAILED
    outcomes = [outcome(member) for member in members]
    rows = compare(outcomes)
    print_tables(outcomes, rows)
    first = collect(members[0].folder)
    report = {
        "config": to_plain(first.config),
        "device": first.detail("device", str),
        "devices": first.detail("devices", int),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")},
        "runs": [to_plain(dataclasses.asdict(one)) for one in outcomes],
        "comparison": rows,
    }
    files.write_json(workdir / RESULTS, report)
    page = write_comparison([member.folder for member in members], workdir / PAGE)
    info(f"written: {workdir / RESULTS}, {page}")
    return 0


def to_plain(value: Any) -> Any:
    """Arrays as lists, ready for JSON."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


if __name__ == "__main__":
    command_line.run(main)
