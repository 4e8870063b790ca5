"""The page that sets runs side by side."""

from collections.abc import Sequence
from typing import Any

from danube_jax.report.collect import RunFolder


def context(runs: Sequence[RunFolder]) -> dict[str, Any]:
    return {"runs": runs}
