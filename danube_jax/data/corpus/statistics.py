"""What a preparation did, as one JSON file and a table for the terminal."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from danube_jax import files
from danube_jax.config import TokenizerConfig, to_dict
from danube_jax.data.corpus.config import CorpusConfig
from danube_jax.data.corpus.tally import Tally, add_counts
from danube_jax.data.token_store import TokenStore
from danube_jax.errors import UserError

FORMAT = "danube_jax.corpus_statistics"
STEP_NAMES = {
    "read": "read",
    "unicode": "Unicode repair",
    "lists": "word and address lists",
    "language": "language",
    "c4": "C4 rules",
    "gopher_repetition": "Gopher repetition",
    "gopher_quality": "Gopher quality",
    "fineweb": "FineWeb rules",
    "masking": "personal data masked",
    "decontamination": "decontamination",
    "minhash_signatures": "MinHash signatures",
    "exact": "exact duplicates",
    "minhash": "near duplicates",
    "quality": "quality score",
    "tokenise": "tokenise",
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The numbers of a preparation.

    Attributes:
      values: "name", "config", "versions", "tally" (as `Tally.to_dict`), "stores" (store → part →
        counts and folder), "tokenizer" (fingerprint, path), "bucket_bounds".
    """

    values: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Reads the file of a finished preparation.

        Raises:
          UserError: it is no such file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(values["format"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the statistics of a preparation ({error!r})") from None
        return cls(values)

    def save(self, path: Path) -> None:
        """Writes the numbers as JSON."""
        files.write_json(path, self.values)

    def steps(self, source: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        """(step, its counts) in the order of the work; of one source, or of all together."""
        tally = self.values["tally"]["steps"]
        total = Tally()
        for name, steps in tally.items():
            if source in (None, name):
                for step, counts in steps.items():
                    add_counts(total.step("", step), counts)
        found = total.steps.get("", {})
        return [(step, found[step]) for step in STEP_NAMES if step in found]

    def tables(self) -> list[Table]:
        """What a person wants to see in the terminal."""
        return [_step_table(self), _store_table(self.values["stores"])]


def collect(
    corpus: CorpusConfig,
    tally: Tally,
    stores: Mapping[str, Mapping[str, Path]],
    tokenizer: TokenizerConfig,
    bounds: Sequence[float],
) -> Statistics:
    """Puts a preparation's numbers together."""
    found: dict[str, dict[str, Any]] = {}
    fingerprint = ""
    for name, parts in stores.items():
        for part, folder in parts.items():
            store = TokenStore.open(folder)
            fingerprint = store.tokenizer
            found.setdefault(name, {})[part] = {
                "path": str(folder),
                "documents": store.documents,
                "bytes": store.bytes,
                "tokens": store.tokens,
                "fingerprint": store.fingerprint,
            }
    versions = {name: metadata.version(name) for name in ("datatrove", "numpy")}
    return Statistics(
        {
            "format": FORMAT,
            "name": corpus.name,
            "config": to_dict(corpus),
            "versions": versions | {"python": platform.python_version()},
            "tally": tally.to_dict(),
            "stores": found,
            "tokenizer": {**to_dict(tokenizer), "fingerprint": fingerprint},
            "bucket_bounds": list(bounds),
        }
    )


def _step_table(statistics: Statistics) -> Table:
    table = Table(title=f"{statistics.values['name']}: what each step did", title_justify="left")
    table.add_column("step")
    for column in ("documents", "MB in", "removed", "MB removed", "MB/s a core"):
        table.add_column(column, justify="right")
    table.add_column("why, or what was changed")
    for step, counts in statistics.steps():
        gone = counts["documents_in"] - counts["documents_out"]
        size = sum(row[1] for row in counts["removed"].values())
        reasons = sorted(counts["removed"].items(), key=lambda item: -item[1][0])
        why = [f"{reason} {number:,}" for reason, (number, _) in reasons[:4]]
        why += [f"{what} {number:,}" for what, number in sorted(counts["edited"].items())]
        rate = counts["bytes_in"] / counts["seconds"] / 1e6 if counts["seconds"] else 0.0
        table.add_row(
            STEP_NAMES[step],
            f"{counts['documents_in']:,}",
            f"{counts['bytes_in'] / 1e6:,.2f}",
            f"{gone:,}" if gone else "",
            f"{size / 1e6:,.2f}" if gone else "",
            f"{rate:,.1f}" if rate else "",
            ", ".join(why),
        )
    return table


def _store_table(stores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    table = Table(title="token stores", title_justify="left")
    table.add_column("store")
    for column in ("documents", "MB", "tokens", "bytes a token"):
        table.add_column(column, justify="right")
    for name, parts in stores.items():
        for part, row in parts.items():
            table.add_row(
                f"{name}/{part}",
                f"{row['documents']:,}",
                f"{row['bytes'] / 1e6:,.2f}",
                f"{row['tokens']:,}",
                f"{row['bytes'] / row['tokens']:.2f}",
            )
    return table
