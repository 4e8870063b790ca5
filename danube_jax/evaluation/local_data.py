"""lm-eval tasks over local JSONL files, for machines without a network.

Every task is lm-eval's own: a generated YAML includes the official one and replaces nothing but
where the documents come from, so prompts, metrics and filters stay what they are.

A folder holds one file a split, `NAME*.jsonl` or `NAME*.jsonl.gz` with the names of `TASKS` (a
number of rows or the like may follow NAME). Where only a training split is there, its rows are
scored; where few-shot examples are asked for and there is no file to take them from, the first
`HELD_OUT_ROWS` rows become examples and are not scored.
"""

import dataclasses
import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax import files
from danube_jax.errors import UserError
from danube_jax.evaluation import local_rows
from danube_jax.untrusted import READ_ERRORS, parse_json

HELD_OUT_ROWS = 40
MMLU_GROUP = "mmlu"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """How a task is made from files.

    Attributes:
      include: the official YAML, below lm-eval's folder of tasks.
      scored: beginnings of file names, the first that is there is scored.
      examples: beginnings of file names to take few-shot examples from.
      fields: keys that every row must have.
      fewshot: examples where the user asks for no number.
      convert: rows of the file → rows of the task.
      overrides: rows of the file → further keys of the YAML.
      check: whether a row holds what the task needs.
    """

    include: str
    scored: tuple[str, ...]
    examples: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    fewshot: int = 0
    convert: Callable[[list[Row]], list[Row]] | None = None
    overrides: Callable[[list[Row]], Mapping[str, Any]] | None = None
    check: local_rows.Check = bool


def _hellaswag_overrides(rows: list[Row]) -> Mapping[str, Any]:
    if "query" not in rows[0]:
        return {}  # the official columns, which the official task cleans up itself
    return {
        "process_docs": None,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "choices",
    }


def _wikitext_articles(rows: list[Row]) -> list[Row]:
    """Articles of the test split, as EleutherAI/wikitext_document_level has them."""
    if "page" in rows[0]:
        return rows
    texts = [row["text"] for row in rows if row.get("source", "test") == "test"]
    title = re.compile(r"(?m)^ = [^=\n].*[^=\n] = \n")
    articles = []
    for text in texts:
        starts = [match.start() for match in title.finditer(text)]
        ends = [*starts[1:], len(text)]
        articles += [{"page": text[a:b]} for a, b in zip(starts, ends, strict=True)]
    return articles


_ARC = ("question", "choices", "answerKey")
TASKS: Mapping[str, LocalTask] = {
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml",
        ("arc_challenge_test", "arc_challenge_val", "arc_challenge_train"),
        ("arc_challenge_train",),
        _ARC,
        check=local_rows.labelled_choices("question"),
    ),
    "arc_easy": LocalTask(
        "arc/arc_easy.yaml",
        ("arc_easy_test", "arc_easy_val", "arc_easy_train"),
        ("arc_easy_train",),
        _ARC,
        check=local_rows.labelled_choices("question"),
    ),
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml",
        ("boolq_val", "boolq_train"),
        ("boolq_train",),
        ("question", "passage", "label"),
        check=local_rows.one_of(2, "label", "question", "passage"),
    ),
    "gsm8k": LocalTask(
        "gsm8k/gsm8k.yaml",
        ("gsm8k_test", "gsm8k_train"),
        ("gsm8k_train",),
        ("question", "answer"),
        fewshot=5,
        check=local_rows.all_texts("question", "answer"),
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        ("hellaswag_val", "hellaswag_train"),
        ("hellaswag_train",),
        overrides=_hellaswag_overrides,
        check=local_rows.hellaswag,
    ),
    "nq_open": LocalTask(
        "nq_open/nq_open.yaml",
        ("nq_open_dev", "nq_open_val", "nq_open_train"),
        ("nq_open_train",),
        ("question", "answer"),
        check=local_rows.answers,
    ),
    "openbookqa": LocalTask(
        "openbookqa/openbookqa.yaml",
        ("openbookqa_test", "openbookqa_val", "openbookqa_train"),
        ("openbookqa_train",),
        ("question_stem", "choices", "answerKey"),
        check=local_rows.labelled_choices("question_stem"),
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml",
        ("piqa_val", "piqa_train"),
        ("piqa_train",),
        ("goal", "sol1", "sol2", "label"),
        check=local_rows.one_of(2, "label", "goal", "sol1", "sol2"),
    ),
    "triviaqa": LocalTask(
        "triviaqa/default.yaml",
        ("triviaqa_val", "triviaqa_sub", "triviaqa_train"),
        ("triviaqa_train",),
        ("question", "answer"),
        check=local_rows.aliases,
    ),
    "truthfulqa_mc1": LocalTask(
        "truthfulqa/truthfulqa_mc1.yaml",
        ("truthfulqa_mc",),
        fields=("question", "mc1_targets"),
        check=local_rows.truthful("mc1_targets"),
    ),
    "truthfulqa_mc2": LocalTask(
        "truthfulqa/truthfulqa_mc2.yaml",
        ("truthfulqa_mc",),
        fields=("question", "mc2_targets"),
        check=local_rows.truthful("mc2_targets"),
    ),
    "wikitext": LocalTask(
        "wikitext/wikitext.yaml",
        ("wikitext2", "wikitext"),
        convert=_wikitext_articles,
        check=local_rows.wikitext,
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        ("winogrande_xl_val", "winogrande_val", "winogrande_xl_train", "winogrande_train"),
        ("winogrande_xl_train", "winogrande_train"),
        ("sentence", "option1", "option2", "answer"),
        check=local_rows.winogrande,
    ),
}
_MMLU = LocalTask(
    "mmlu/default",
    ("mmlu_test", "mmlu_val"),
    ("mmlu_dev",),
    ("question", "subject", "choices", "answer"),
    check=local_rows.mmlu,
)


def local_names() -> list[str]:
    """Tasks and groups that can be made from files."""
    return sorted([*TASKS, MMLU_GROUP])


def tasks_folder() -> Path:
    """lm-eval's folder of task definitions, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError(
            "lm-evaluation-harness is not installed; it comes with pip install 'danube-jax[eval]'"
        )
    return Path(spec.origin).parent / "tasks"


def write_local_tasks(folder: Path, output: Path, fewshot: Mapping[str, int | None]) -> list[str]:
    """Writes task definitions and their documents for lm-eval.

    Args:
      folder: where the JSONL files are.
      output: gets the YAML files (and `data/` beside them); give it to lm-eval as include path.
      fewshot: task (of `local_names()`) → number of few-shot examples, None for the official one.

    Returns:
      One line a task that is not scored on its official rows, saying on which instead.

    Raises:
      UserError: the folder or a file is missing, or a row cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"--local_data: {folder} is no folder; expected one that holds JSONL files")
    notes: list[str] = []
    for name, number in fewshot.items():
        if name == MMLU_GROUP:
            _write_mmlu(folder, output, number or 0)
            continue
        task = TASKS[name]
        number = task.fewshot if number is None else number
        scored_path, rows = _read_scored(folder, name, task)
        extra = task.overrides(rows) if task.overrides else {}
        if task.convert:
            rows = task.convert(rows)
        examples_path = _find(folder, task.examples)
        examples: list[Row] = []
        if number and examples_path is not None and examples_path != scored_path:
            examples = _read(examples_path, task)
        elif number:
            examples, rows = rows[:HELD_OUT_ROWS], rows[HELD_OUT_ROWS:]
            notes.append(
                f"{name}: few-shot examples are the first {len(examples)} rows of "
                f"{scored_path.name}; the other {len(rows):,} are scored"
            )
        elif "_train" in scored_path.name:
            notes.append(f"{name}: scored on {scored_path.name}, the training split")
        if number > len(examples) or not rows:
            raise UserError(
                f"{scored_path}: too few rows for {number} few-shot examples of {name}; expected "
                f"more than {max(number, HELD_OUT_ROWS)}"
            )
        _write_task(output, name, task.include, rows, examples, extra)
    return notes


def _write_mmlu(folder: Path, output: Path, fewshot: int) -> None:
    _, rows = _read_scored(folder, MMLU_GROUP, _MMLU)
    examples: list[Row] = []
    if fewshot:
        path = _find(folder, _MMLU.examples)
        if path is None:
            raise UserError(
                f"--local_data: {folder} has no file mmlu_dev*.jsonl[.gz]; the task mmlu takes its "
                "few-shot examples from it"
            )
        examples = _read(path, _MMLU)
    subjects = sorted({row["subject"] for row in rows})
    for subject in subjects:
        include = f"{_MMLU.include}/mmlu_{subject}.yaml"
        if not (tasks_folder() / include).is_file():
            raise UserError(f"{folder}: {subject!r} is no subject of MMLU")
        scored, shown = (
            [row for row in part if row["subject"] == subject] for part in (rows, examples)
        )
        if len(shown) < fewshot:
            raise UserError(
                f"--local_data: {len(shown)} few-shot examples of MMLU's {subject}; expected "
                f"{fewshot}"
            )
        _write_task(output, f"mmlu_{subject}", include, scored, shown, {})
    group = {
        "group": MMLU_GROUP,
        "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    _write_yaml(output / f"{MMLU_GROUP}.yaml", group)


def _write_task(
    output: Path,
    name: str,
    include: str,
    rows: Sequence[Row],
    examples: Sequence[Row],
    extra: Mapping[str, Any],
) -> None:
    splits = {"test": rows} | ({"train": examples} if examples else {})
    data = {}
    for split, part in splits.items():
        path = output / "data" / name / f"{split}.jsonl"
        files.write_bytes(path, b"".join(json.dumps(row).encode() + b"\n" for row in part))
        data[split] = str(path.resolve())
    train = "train" if examples else None
    config = {
        "include": str(tasks_folder() / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data, "cache_dir": str((output / "cache").resolve())},
        "training_split": train,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": train,
        **extra,
    }
    if name.startswith("mmlu_"):
        config["tag"] = []
    _write_yaml(output / f"{name}.yaml", config)


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    import yaml

    files.write_bytes(path, yaml.safe_dump(dict(config), sort_keys=False).encode())


def _find(folder: Path, beginnings: Sequence[str]) -> Path | None:
    for beginning in beginnings:
        for suffix in (".jsonl", ".jsonl.gz"):
            found = sorted(folder.glob(f"{beginning}*{suffix}"))
            if found:
                return found[0]
    return None


def _read_scored(folder: Path, name: str, task: LocalTask) -> tuple[Path, list[Row]]:
    path = _find(folder, task.scored)
    if path is None:
        expected = " or ".join(f"{beginning}*.jsonl[.gz]" for beginning in task.scored)
        raise UserError(
            f"--local_data: {folder} has no data for the task {name}; expected a file {expected}"
        )
    return path, _read(path, task)


def _read(path: Path, task: LocalTask) -> list[Row]:
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_parse(line, f"{path}, line {number}", task))
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected JSON lines") from None
    if not rows:
        raise UserError(f"{path}: holds no rows; expected a JSON object a line")
    return rows


def _parse(line: str, where: str, task: LocalTask) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected a JSON object") from None
    fields = task.fields
    missing = [key for key in fields if not isinstance(row, dict) or key not in row]
    if missing or not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with {', '.join(fields)}")
    if not task.check(row):
        raise UserError(
            f"{where}: {', '.join(fields) or 'a column'} holds what the task "
            f"{Path(task.include).stem} cannot use; expected the columns of its data set"
        )
    return row
