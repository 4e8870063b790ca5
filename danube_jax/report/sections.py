"""The parts of a run's page that are no charts: headline, phases, mix, samples, configuration."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from danube_jax.config import RunConfig, SourceConfig, to_dict
from danube_jax.data.phases import sequences_read, source_use
from danube_jax.errors import UserError
from danube_jax.report import numbers, standing
from danube_jax.report.collect import RunFolder, tail_mean
from danube_jax.report.curves import source_colors
from danube_jax.report.metric_rows import Series

SAMPLES_SHOWN = 6  # of a prompt; the first and the last are always among them
SCORE_TILES = 3  # tasks of no preset in the headline, at most
STATUS = {
    "finished": "finished",
    "diverged": "diverged",
    "stopped": "stopped",
    "running": "not finished",
}


@dataclasses.dataclass(frozen=True)
class Tile:
    """One figure of the headline; `detail` says what it is, exactly."""

    label: str
    value: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Share:
    """A source's part of a phase: shares of sequences, and tokens read."""

    source: str
    color: int
    planned: float
    read: float | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class PhaseMix:
    """One phase's mix; `read` of the shares is None where it has not begun."""

    name: str
    context: int
    shares: tuple[Share, ...]


def parameters(run: RunFolder) -> int | None:
    """Parameters of the model: as the run recorded them, else counted from its config."""
    recorded = run.detail("parameters", int)
    if recorded is not None or run.run is None:
        return recorded
    from danube_jax.models.decoder import param_count

    return param_count(run.run.model)


def architecture(run: RunFolder) -> str:
    """The model in one line."""
    if run.run is None:
        return ""
    model = run.run.model
    heads = f"{model.num_attention_heads} attention heads"
    if model.num_key_value_heads != model.num_attention_heads:
        heads += f" over {model.num_key_value_heads} of keys and values"
    window = f", window {model.sliding_window:,}" if model.sliding_window else ""
    return (
        f"{model.model_type.capitalize()} decoder: {model.num_hidden_layers} layers, hidden size "
        f"{model.hidden_size:,}, {heads}{window}, vocabulary {model.vocab_size:,}"
    )


def lead(run: RunFolder) -> str:
    """What the run is and what came of it, in two sentences."""
    parts = []
    if run.run:
        eight_bits = "; linear layers in FP8" if run.run.precision.fp8_config else ""
        parts.append(f"{architecture(run)}{eight_bits}.")
    loss = run.metrics.series("loss").finite.values
    final = run.final()
    if run.tokens and final:
        phases = len(run.schedule.phases) if run.schedule else 0
        where = f" in {phases} phases" if phases > 1 else ""
        fell = f"the training loss went from {numbers.figure(float(loss[0]), 3)} to "
        parts.append(
            f"{numbers.count(run.tokens)} tokens{where}; {fell}{numbers.figure(final[0], 3)}."
        )
    return " ".join(parts)


def headline(run: RunFolder) -> list[Tile]:
    """The figures that a reader looks for first; those that are not known are left out."""
    tiles = []
    total = parameters(run)
    if total is not None:
        trained = run.detail("trained_parameters", int)
        detail = f"{total:,}"
        if trained and trained < total:
            detail = f"{numbers.count(trained)} trained (adapters)"
        tiles.append(Tile("Parameters", numbers.count(total), detail))
    if run.tokens:
        tiles.append(Tile("Tokens", numbers.count(run.tokens), _progress(run)))
    seconds = run.training_seconds
    if seconds is not None:
        elapsed = run.elapsed_seconds if run.status != "running" else None
        whole = f"{numbers.duration(elapsed)} from start to end" if elapsed else ""
        tiles.append(Tile("Training time", numbers.duration(seconds), whole))
    final = run.final()
    if final:
        steps = "the last logged step" if final[1] == 1 else f"mean of the last {final[1]} rows"
        tiles.append(Tile("Training loss", numbers.figure(final[0]), steps))
    heldout = run.last_heldout()
    if heldout:
        low, high = min(heldout.values()), max(heldout.values())
        several = f"{numbers.figure(low, 3)}{numbers.NONE}{numbers.figure(high, 3)}"
        value = several if len(heldout) > 1 else numbers.figure(low)
        detail = f"{len(heldout)} sources" if len(heldout) > 1 else next(iter(heldout))
        tiles.append(Tile("Held-out loss", value, detail))
    return tiles + _speed(run) + _scores(run)


def _progress(run: RunFolder) -> str:
    planned = run.schedule.total_tokens if run.schedule else 0
    if not planned:
        return ""
    exact = f"{run.tokens:,.0f}"
    if run.tokens >= planned:
        return exact
    return f"{exact}, {numbers.percent(run.tokens / planned)} of {numbers.count(planned)}"


def _speed(run: RunFolder) -> list[Tile]:
    tiles = []
    rate = run.metrics.series("tokens_per_second")
    seconds = run.training_seconds
    device = run.detail("device", str)
    devices = run.detail("devices", int)
    where = f"on {devices} x {device}" if device and devices else ""
    if len(rate) and seconds:
        tiles.append(
            Tile("Tokens a second", numbers.count(float(rate.tokens[-1]) / seconds), where)
        )
    mfu = tail_mean(run.metrics.series("mfu"))
    if mfu:
        detail = f"mean of the last {mfu[1]} rows" if mfu[1] > 1 else ""
        tiles.append(Tile("MFU", numbers.percent(mfu[0]), detail))
    memory = run.metrics.series("memory_bytes").finite.values
    if memory.size:
        tiles.append(Tile("Peak memory", numbers.size(float(memory.max())), "the fullest device"))
    return tiles


def _scores(run: RunFolder) -> list[Tile]:
    """The leaderboard's average where it is whole, a few single tasks, and MT-Bench."""
    tiles = []
    for _, table in standing.published_parts([run]):
        if table.head[-1] == "average" and table.rows[0][-1] != numbers.NONE:
            detail = f"{table.title}, average"
            tiles.append(Tile("Leaderboard", table.rows[0][-1], detail))
    known = standing.preset_names()
    singles = [
        (results, score)
        for results in standing.latest(run.results)
        if results.preset not in known
        for score in results.scores
    ]
    for results, score in singles[:SCORE_TILES]:
        value = f"{100 * score.value:.1f}" if score.is_share else numbers.figure(score.value)
        step = f", step {results.step:,}" if results.step >= 0 else ""
        tiles.append(
            Tile(score.task, value, f"{score.metric}{' in percent' * score.is_share}{step}")
        )
    average = run.mt_bench[-1].overall.get("average") if run.mt_bench else None
    if average is not None:
        step = run.mt_bench[-1].step
        tiles.append(Tile("MT-Bench", f"{average:.2f}", f"step {step:,}" if step >= 0 else ""))
    return tiles


def phase_rows(run: RunFolder) -> list[dict[str, str]]:
    """The run's table with what came of each phase."""
    rows = []
    loss = run.metrics.series("loss")
    rate = run.metrics.series("learning_rate")
    for phase in run.schedule.phases if run.schedule else ():
        end = phase.first_step + phase.steps
        ended = tail_mean(_steps(loss, phase.first_step, end))
        rates = _steps(rate, phase.first_step, end).finite.values
        rows.append(
            {
                "name": phase.name,
                "steps": f"{phase.first_step:,} – {end:,}",  # noqa: RUF001
                "tokens": numbers.count(phase.tokens),
                "context": f"{phase.context:,}",
                "sequences": f"{phase.sequences:,}",
                "rate": " → ".join(numbers.scientific(float(v)) for v in rates[[0, -1]])
                if rates.size
                else numbers.NONE,
                "loss": numbers.figure(ended[0]) if ended else numbers.NONE,
            }
        )
    return rows


def _steps(series: Series, first: int, end: int) -> Series:
    """Points of the steps first + 1 to end: a row's step counts those that are done."""
    keep = (series.steps > first) & (series.steps <= end)
    return Series(series.steps[keep], series.tokens[keep], series.values[keep])


def mixture(run: RunFolder) -> list[PhaseMix]:
    """Each phase's mix as asked for, and as read by the last step."""
    if run.schedule is None:
        return []
    colors = source_colors(run)
    done = min(run.metrics.last_step, run.schedule.total_steps)
    phases = []
    for phase, counts in zip(run.schedule.phases, sequences_read(run.schedule, done), strict=True):
        weights, read = sum(weight for _, weight in phase.mixture), sum(counts.values())
        shares = tuple(
            Share(
                source=name,
                color=colors[name],
                planned=weight / weights,
                read=counts[name] / read if read else None,
                tokens=counts[name] * phase.context,
            )
            for name, weight in phase.mixture
        )
        phases.append(PhaseMix(phase.name, phase.context, shares))
    return phases


def source_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Tokens read of each source so far, and epochs over the whole run where known."""
    tokens: dict[str, int] = {}
    for phase in mixture(run):
        for share in phase.shares:
            tokens[share.source] = tokens.get(share.source, 0) + share.tokens
    total = sum(tokens.values())
    epochs = _epochs(run)
    return [
        {
            "source": name,
            "color": source_colors(run)[name],
            "tokens": f"{count:,}",
            "share": numbers.percent(count / total) if total else numbers.NONE,
            "epochs": f"{epochs[name]:.2f}" if name in epochs else "",
        }
        for name, count in tokens.items()
    ]


def _epochs(run: RunFolder) -> dict[str, float]:
    """Source → epochs over the whole run; {} where the stores are not all readable from here."""
    if run.schedule is None:
        return {}
    tokens = {name: run.store_tokens(name) for name in run.schedule.sources}
    known = {name: count for name, count in tokens.items() if count is not None}
    if len(known) < len(tokens):
        return {}
    try:
        use = source_use(run.schedule, known)
    except UserError:  # a store that is not the one the run read
        return {}
    return {name: float(item.epochs) for name, item in use.items()}


def heldout_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Held-out figures a source: first and last loss, perplexity, bits a byte, unigram loss."""
    unigram = run.detail("unigram", dict) or {}
    bits = run.last_heldout("bits_per_byte/")
    preferences = run.config.get("objective") == "dpo"  # its loss is no likelihood of text
    rows = []
    for name, last in run.last_heldout().items():
        series = run.metrics.evaluation[f"loss/{name}"]
        baseline = unigram.get(name)
        rows.append(
            {
                "source": name,
                "color": source_colors(run)[name],
                "first": numbers.figure(float(series.values[0])) if len(series) > 1 else "",
                "last": numbers.figure(last),
                "perplexity": "" if preferences else numbers.figure(math.exp(min(last, 50.0)), 3),
                "bits": numbers.figure(bits[name]) if name in bits else "",
                "unigram": numbers.figure(baseline) if isinstance(baseline, float) else "",
            }
        )
    return rows


def samples_by_prompt(run: RunFolder) -> list[dict[str, Any]]:
    """Prompt → its texts over time, oldest first; `rest` of a text is what the model wrote."""
    groups: dict[str, list[dict[str, str]]] = {}
    for sample in run.samples:
        for prompt, text in zip(sample.prompts, sample.texts, strict=True):
            rest = text[len(prompt) :]
            if prompt:  # blank lines would take a page; a text of unknown parts stays as it is
                rest = re.sub(r"\n\s*\n", "\n", rest)
            place = _tokens_at(run, sample.step)
            item = {"step": f"{sample.step:,}", "tokens": place, "prompt": prompt, "rest": rest}
            groups.setdefault(prompt, []).append(item)
    out = []
    for prompt, items in groups.items():
        shown = _spread(len(items), SAMPLES_SHOWN)
        chosen = [items[i] for i in shown]
        out.append({"prompt": prompt, "items": chosen, "left_out": len(items) - len(chosen)})
    return out


def _spread(total: int, most: int) -> list[int]:
    """Up to `most` of 0..total-1, the first and the last among them, evenly."""
    if total <= most:
        return list(range(total))
    return sorted({round(i * (total - 1) / (most - 1)) for i in range(most)})


def _tokens_at(run: RunFolder, step: int) -> str:
    """Tokens at a step, as a row of that step says; '' where none does."""
    curves = [*run.metrics.evaluation.values(), *run.metrics.train.values()]
    for series in curves:
        found = np.flatnonzero(series.steps == step)
        if found.size:
            return numbers.count(float(series.tokens[found[0]]))
    return ""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists of mappings get numbers."""
    if isinstance(node, Mapping) and node:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(node)]
    else:
        return {prefix: node}
    return {key: value for name, child in items for key, value in flatten(child, name).items()}


def config_changes(run: RunFolder) -> list[tuple[str, str]]:
    """Keys of the config whose value is not the default; phases have a table of their own."""
    defaults = flatten(to_dict(RunConfig()))
    for name in run.run.data.sources if run.run else ():
        defaults |= flatten(to_dict(SourceConfig()), f"data.sources.{name}")
    missing = object()
    return [
        (key, written(value))
        for key, value in flatten(run.config).items()
        if not key.startswith("phases") and value != defaults.get(key, missing)
    ]


def written(value: Any) -> str:
    """A value of the config as one would write it."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "_")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def versions(run: RunFolder) -> list[tuple[str, str]]:
    """Package → version, of the newest start or resume that says so."""
    recorded = run.detail("versions", dict)
    if recorded:
        return [(str(name), str(version)) for name, version in recorded.items()]
    return [("danube_jax", run.version)] if run.version else []


def status_line(run: RunFolder) -> str:
    """How far the run is, in a few words."""
    step, planned = run.metrics.last_step, run.planned_steps
    place = f"step {step:,} of {planned:,}" if planned else f"step {step:,}"
    return f"{STATUS[run.status]}, {place}"
