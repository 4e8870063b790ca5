"""Trains a quality model from examples of good and bad documents.

Example:
  python tools/train_quality_model.py --good='books/*.jsonl.gz' --bad='pages/*.jsonl.gz' \
    --output=quality.json

The examples are JSONL, parquet or text, as sources of tools/prepare_data.py. A part of them is
held out; ROC-AUC, precision and recall by threshold, and calibration are measured on it. A config
names the model in `steps.quality.model`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from danube_jax import command_line
from danube_jax.data.corpus.config import CorpusConfig, TextSource
from danube_jax.errors import UserError

_GOOD = flags.DEFINE_multi_string("good", [], "File, folder or glob of good documents.")
_BAD = flags.DEFINE_multi_string("bad", [], "File, folder or glob of bad documents.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write.")
_FIELD = flags.DEFINE_string("field", "text", "Column that holds the text.")
_LIMIT = flags.DEFINE_integer("limit", 20_000, "Most documents of each kind.", lower_bound=10)
_HELDOUT = flags.DEFINE_float("heldout", 0.2, "Share that is only measured on.", 0.01, 0.9)
_TREES = flags.DEFINE_integer("trees", 200, "Trees.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the split.")
_PIECE = flags.DEFINE_integer(
    "piece", 4_000, "Longer documents are cut into pieces of so many characters.", lower_bound=200
)


def read_texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """The texts of the documents, in order."""
    from danube_jax.data.corpus.inputs import list_inputs
    from danube_jax.data.corpus.records import RecordReader
    from danube_jax.data.corpus.tally import Tally

    for path in paths:
        corpus = CorpusConfig(
            output=".",
            sources={"examples": TextSource(path=path, text_column=field)},
            task_bytes=2**62,
        )
        reader = RecordReader(corpus, (tuple(list_inputs(corpus)),), Tally(), None)
        yield from (document.text for document in reader.run())


def show(report: dict) -> None:
    """Prints what was measured on the held-out documents."""
    console = Console()
    heldout = report["heldout"]
    console.print(
        f"held out: {heldout['good']:,} good, {heldout['bad']:,} bad; "
        f"ROC-AUC {report['roc_auc']:.4f}, Brier score {report['brier']:.4f}, calibration error "
        f"{report['calibration_error']:.4f}"
    )
    curve, calibration = Table(title="threshold"), Table(title="calibration")
    for name in ("score at least", "precision", "recall"):
        curve.add_column(name, justify="right")
    for row in report["precision_recall"]:
        curve.add_row(f"{row[0]:.2f}", f"{row[1]:.3f}", f"{row[2]:.3f}")
    for name in ("mean score", "good among them", "documents"):
        calibration.add_column(name, justify="right")
    for score, share, count in report["calibration"]:
        calibration.add_row(f"{score:.3f}", f"{share:.3f}", f"{count:,}")
    console.print(curve)
    console.print(calibration)
    console.print("most used: " + ", ".join(name for name, _ in report["most_used"]))


def main(argv: Sequence[str]) -> int:
    """Reads, trains, reports and saves; returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("output",))
    if not _GOOD.value or not _BAD.value:
        raise UserError("--good and --bad are needed; --help shows an example")
    from danube_jax.data.corpus import quality_trees
    from danube_jax.data.corpus.quality_training import sample

    texts = [
        sample(read_texts(paths, _FIELD.value), _LIMIT.value, _PIECE.value)
        for paths in (_GOOD.value, _BAD.value)
    ]
    scorer = quality_trees.train(
        *texts, heldout_fraction=_HELDOUT.value, rounds=_TREES.value, seed=_SEED.value
    )
    scorer.save(Path(_OUTPUT.value))
    show(scorer.report)
    print(f"wrote {_OUTPUT.value}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
