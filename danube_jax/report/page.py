"""Builds the page of one run, and writes it."""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from danube_jax import __version__, files
from danube_jax.console import info, warn
from danube_jax.errors import UserError
from danube_jax.report import comparison, curves, events, sections, standing
from danube_jax.report.collect import CONFIG, RunFolder, collect

FILE = "report.html"
MOST_TILES = 7  # side by side
ROUNDS = "rounds"  # where a tuning run keeps the folders of its earlier rounds

# The page's parts: anchor, title, and what each of them shows.
PARTS = (
    ("loss", "Loss", ("loss_charts", "phases")),
    ("heldout", "Held-out data", ("heldout_charts", "heldout")),
    ("scores", "Evaluation", ("benchmark_charts", "tasks", "mt_bench")),
    ("samples", "Samples", ("samples",)),
    ("more", "What else was logged", ("extra_charts",)),
    ("training", "Optimisation and speed", ("known_charts",)),
    ("mix", "Mix", ("mixture",)),
    ("events", "Events", ("events",)),
    ("config", "Configuration", ("changes", "versions")),
)

HELDOUT_COLUMNS = (
    ("first", "first loss"),
    ("last", "last loss"),
    ("perplexity", "perplexity"),
    ("bits", "bits a byte"),
    ("unigram", "token frequencies alone"),
)


def write_report(workdir: Path, output: Path | None = None) -> Path:
    """Writes the page of the run in `workdir`, to WORKDIR/report.html where `output` is None.

    Returns:
      Where it is.

    Raises:
      UserError: `workdir` is not the folder of a run, or the page cannot be written.
    """
    return _write(render(collect(workdir)), output or Path(workdir) / FILE)


def write_comparison(workdirs: Sequence[Path], output: Path) -> Path:
    """Writes one page that compares the runs in `workdirs`.

    Raises:
      UserError: one of them is not the folder of a run, or the page cannot be written.
    """
    return _write(render_comparison([collect(workdir) for workdir in workdirs]), output)


def report_at_end(workdir: Path) -> list[Path]:
    """Writes the pages of the run in `workdir`, and of its rounds if it has some, at its end.

    The run is sound whatever becomes of its report, so that a failure is a warning.
    """
    written = []
    for folder in (workdir, *sorted((workdir / ROUNDS).glob("*"))):
        if not (folder / CONFIG).is_file():  # a round that has not begun
            continue
        try:
            written.append(write_report(folder))
        except Exception as error:  # whatever it is
            warn(f"no report was written: {' '.join(str(error).split())[:300]}")
            continue
        info(f"{'report':14} {written[-1]}")
    return written


def render(run: RunFolder) -> str:
    """The page of one run."""
    with np.errstate(over="ignore", invalid="ignore"):  # values as logged may be anything
        content = run_context(run)
    parts = [(name, title) for name, title, keys in PARTS if any(content[key] for key in keys)]
    return _template("run.html").render(_style_and_script() | content | {"parts": parts})


def run_context(run: RunFolder) -> dict[str, Any]:
    """Everything that the page of a run shows."""
    event_rows, left_out = events.table(run)
    heldout = sections.heldout_rows(run)
    tiles = sections.headline(run)
    return {
        "run": run,
        "status": sections.status_line(run),
        "lead": sections.lead(run),
        "tiles": tiles,
        "tile_columns": -(-len(tiles) // max(1, math.ceil(len(tiles) / MOST_TILES))),
        "loss_charts": curves.loss_charts(run),
        "phases": sections.phase_rows(run),
        "heldout_charts": curves.heldout_charts(run),
        "heldout": heldout,
        "heldout_columns": [c for c in HELDOUT_COLUMNS if any(row[c[0]] for row in heldout)],
        "known_charts": curves.known_charts(run),
        "extra_charts": curves.extra_charts(run),
        "constants": curves.constants(run.metrics),
        "mixture": sections.mixture(run),
        "sources": sections.source_rows(run),
        "published_parts": standing.published_parts([run]),
        "tasks": standing.task_rows(run),
        "partial": standing.is_partial(run),
        "mt_bench": standing.mt_bench_strip(run.mt_bench[-1]) if run.mt_bench else None,
        "benchmark_charts": curves.benchmark_charts(run),
        "samples": sections.samples_by_prompt(run),
        "events": event_rows,
        "events_left_out": left_out,
        "changes": sections.config_changes(run),
        "config_json": json.dumps(run.config, indent=1, ensure_ascii=False),
        "versions": sections.versions(run),
    }


def render_comparison(runs: Sequence[RunFolder]) -> str:
    """The page that compares runs."""
    with np.errstate(over="ignore", invalid="ignore"):
        content = comparison.context(runs)
    return _template("comparison.html").render(_style_and_script() | content)


def _write(page: str, output: Path) -> Path:
    try:
        files.write_bytes(output, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    return output


def _resource(name: str) -> str:
    return resources.files("danube_jax.report").joinpath("templates", name).read_text("utf-8")


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["place"] = lambda value: f"{value:.3f}".rstrip("0").rstrip(".")
    return environment.get_template(name)


def _style_and_script() -> dict[str, Any]:
    """What every page carries; the page allows no script but this one, by its hash."""
    script = _resource("hover.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "version": __version__,
        "style": Markup(_resource("style.css")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "markup": Markup,
    }
