"""Prepares a corpus: raw text → filtered, deduplicated, scored documents → token stores.

Example:
  python tools/prepare_data.py --config=configs/data/example.py --config.output=corpus

A stopped preparation goes on when the same command is given again; a finished one is shown.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import config_flags
from rich.console import Console

from danube_jax import command_line

PLAIN_WIDTH = 160  # columns where the output is no terminal

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/data/; override values with --config.key=value."
)


def main(argv: Sequence[str]) -> int:
    """Prepares, and says what was done; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("config",))
    from danube_jax.data.corpus.config import parse_corpus_config
    from danube_jax.data.corpus.html import write_page
    from danube_jax.data.corpus.pipeline import prepare

    corpus = parse_corpus_config(command_line.config_dict(_CONFIG))
    statistics = prepare(corpus)
    page = Path(corpus.output) / "report.html"
    write_page(statistics, page)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    for table in statistics.tables():
        console.print(table)
    bad = statistics.values["tally"]["num_bad_records"]
    if bad:
        console.print(f"{bad:,} bad records were skipped: {corpus.output}/bad_records.jsonl")
    console.print(f"token stores: {corpus.output}/stores, page: {page}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
