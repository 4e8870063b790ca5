"""Scores as published, in percent: what our own scores stand beside.

Sources: arXiv 2401.16818v2, tables 1 to 6 (the harness version of Open LLM Leaderboard v1;
tables 2 and 5 are the authors' own runs, table 6 is the public board). Two tables give two runs of
a model, which differ by some tenths.
"""

import dataclasses
import types
from collections.abc import Mapping

LEADERBOARD_TASKS = (
    "arc_challenge",
    "hellaswag",
    "mmlu",
    "truthfulqa_mc2",
    "winogrande",
    "gsm8k",
)
ZERO_SHOT_TASKS = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "triviaqa",
    "winogrande",
)
MT_BENCH_CATEGORIES = (
    "extraction",
    "humanities",
    "math",
    "reasoning",
    "roleplay",
    "stem",
    "writing",
)


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """One model's row of a published table.

    Attributes:
      model: as the paper calls it.
      scores: lm-eval's name of the task → percent; for MT-Bench, category → (turn 1, turn 2).
      chat: whether it is a chat model.
      size: billions of parameters, None where the table does not say.
      table: table of arXiv 2401.16818v2.
    """

    model: str
    scores: Mapping[str, float]
    chat: bool
    size: float | None
    table: int

    @property
    def average(self) -> float:
        """Arithmetic mean of the scores, as the leaderboard averages."""
        return sum(self.scores.values()) / len(self.scores)


def _rows(tasks: tuple[str, ...], table: int, chat: bool, text: str) -> tuple[PublishedRow, ...]:
    """Rows of `model | size | scores`."""
    rows = []
    for line in text.strip().splitlines():
        model, size, numbers = (part.strip() for part in line.split("|"))
        scores = dict(zip(tasks, map(float, numbers.split()), strict=True))
        rows.append(
            PublishedRow(
                model, types.MappingProxyType(scores), chat, float(size) if size else None, table
            )
        )
    return tuple(rows)


LEADERBOARD = (
    *_rows(
        LEADERBOARD_TASKS,
        2,
        False,
        """
        TinyLlama       | 1.1 | 33.87 60.31 26.04 37.32 59.51  1.44
        Falcon          | 1.3 | 35.07 63.56 25.28 35.96 62.04  0.53
        OPT 1.3B        | 1.3 | 29.52 54.53 24.96 38.71 59.75  0.15
        OPT 2.7B        | 2.7 | 33.96 61.43 25.43 37.43 61.96  0.23
        Cerebras-GPT 1.3B | 1.3 | 26.28 38.54 26.59 42.70 53.43  0.23
        Cerebras-GPT 2.7B | 2.7 | 29.10 49.29 25.17 41.37 54.14  0.45
        Pythia-dedup 1.4B | 1.4 | 32.68 54.96 25.56 38.66 57.30  0.83
        Pythia-dedup 2.8B | 2.8 | 36.26 60.66 26.78 35.56 60.22  0.83
        Qwen            | 1.8 | 37.71 58.87 46.37 39.41 61.72 24.41
        """,
    ),
    *_rows(
        LEADERBOARD_TASKS,
        6,
        False,
        """
        StableLM 2      | 1.6 | 43.34 70.45 38.95 36.78 64.56 17.44
        Gemma-2B        | 2.5 | 48.46 71.65 41.68 33.13 66.77 17.36
        Qwen1.5         | 1.8 | 37.88 61.42 46.71 39.43 60.30 33.59
        Phi-1.5         | 1.3 | 52.90 63.79 43.89 40.89 72.22 12.43
        Danube          | 1.8 | 39.42 69.58 25.94 33.86 64.48  1.44
        Danube2         | 1.8 | 43.34 72.95 40.20 38.01 68.03 29.80
        """,
    ),
    *_rows(
        LEADERBOARD_TASKS,
        5,
        True,
        """
        TinyLlama-Chat  | 1.1 | 36.01 61.05 25.04 37.86 60.77  2.35
        Qwen-Chat       | 1.8 | 36.95 54.34 44.55 43.70 58.88 19.26
        StableLM-2-Zephyr | 1.6 | 43.69 69.34 41.85 45.21 64.09 35.18
        Danube-Chat     | 1.8 | 41.47 68.02 33.49 40.82 64.40 15.54
        """,
    ),
)

ZERO_SHOT = (
    *_rows(
        ZERO_SHOT_TASKS,
        1,
        False,
        """
        TinyLlama       | 1.1 | 55.35 30.12 57.80 59.18 36.00 73.18 28.78 58.88
        Falcon          | 1.3 | 57.32 32.00 62.84 61.52 35.20 74.65 27.27 60.77
        OPT 1.3B        | 1.3 | 50.93 29.52 57.71 53.73 33.40 72.52 15.67 59.59
        OPT 2.7B        | 2.7 | 54.34 31.31 60.31 60.61 35.20 74.81 22.38 60.85
        Cerebras-GPT 1.3B | 1.3 | 45.88 25.26 59.36 38.37 29.20 66.76  5.49 52.01
        Cerebras-GPT 2.7B | 2.7 | 52.53 27.30 59.20 48.84 32.00 70.89 12.41 55.96
        Pythia-dedup 1.4B | 1.4 | 56.57 29.86 56.76 54.40 33.20 72.36 18.46 56.20
        Pythia-dedup 2.8B | 2.8 | 58.96 32.68 64.19 59.45 35.60 73.78 24.39 58.17
        Qwen            | 1.8 | 58.25 34.98 67.13 58.82 33.40 72.85 23.92 58.96
        StableLM 2      | 1.6 | 67.63 39.08 75.60 68.78 40.00 76.39 33.84 63.30
        Danube          | 1.8 | 62.29 35.84 65.81 68.20 37.60 76.93 38.99 61.96
        """,
    ),
    *_rows(
        ZERO_SHOT_TASKS,
        4,
        True,
        """
        TinyLlama-Chat  | 1.1 | 54.34 33.36 60.83 60.39 37.20 74.59 29.04 59.91
        Qwen-Chat       | 1.8 | 49.28 32.94 67.74 54.73 34.60 71.82 19.04 59.43
        StableLM-2-Zephyr | 1.6 | 60.35 39.25 80.18 68.85 39.60 74.92 31.46 64.48
        Danube-Chat     | 1.8 | 67.51 39.25 77.89 67.60 39.20 76.71 36.29 65.35
        """,
    ),
)


@dataclasses.dataclass(frozen=True)
class PublishedMTBench:
    """MT-Bench without coding, scores from 1 to 10 (table 3); category → (turn 1, turn 2)."""

    model: str
    categories: Mapping[str, tuple[float, float]]


def _mt_bench(model: str, turn_1: str, turn_2: str) -> PublishedMTBench:
    pairs = zip(map(float, turn_1.split()), map(float, turn_2.split()), strict=True)
    scores = dict(zip(MT_BENCH_CATEGORIES, pairs, strict=True))
    return PublishedMTBench(model, types.MappingProxyType(scores))


MT_BENCH = (
    _mt_bench(
        "TinyLlama-Chat", "2.50 8.15 1.20 3.10 5.60 6.60 8.65", "1.20 8.10 1.40 2.30 5.60 4.60 2.70"
    ),
    _mt_bench(
        "Qwen-Chat", "4.70 6.60 2.40 3.50 6.70 6.50 9.20", "2.40 7.30 1.60 3.90 6.70 5.80 4.80"
    ),
    _mt_bench(
        "StableLM-2-Zephyr",
        "5.20 9.20 3.50 3.50 6.80 7.35 9.35",
        "4.80 9.70 1.60 3.20 6.95 6.80 7.50",
    ),
    _mt_bench(
        "Danube-Chat", "3.40 8.90 3.80 4.30 7.05 8.10 9.35", "3.20 8.90 1.50 2.70 6.90 6.10 3.10"
    ),
)

# Means over all eight categories: turn 1, turn 2, both (section 7; categories are not published).
MT_BENCH_OVERALL = types.MappingProxyType({"Danube2-Chat": (6.23, 5.34, 5.79)})
