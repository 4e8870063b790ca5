"""From what a user names (a preset, lm-eval tasks) to lm-eval's task objects."""

import contextlib
import dataclasses
import difflib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.errors import UserError
from danube_jax.evaluation import local_data
from danube_jax.evaluation.presets import PRESETS, Preset

MT_BENCH = "mt_bench"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is to be run.

    Attributes:
      name: names the files of results.
      tasks: lm-eval's name → few-shot examples, None for the task's own number.
      preset: the table to compare with, or None.
    """

    name: str
    tasks: Mapping[str, int | None]
    preset: Preset | None


def select(names: Sequence[str], num_fewshot: int | None = None) -> Selection:
    """The selection of a preset's name, or of tasks' names.

    Tasks that all stand in one preset, with the same number of examples, are compared with its
    table.

    Raises:
      UserError: nothing named, a preset beside other names, or a name twice.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"--tasks: names nothing; expected {', '.join(PRESETS)} or lm-eval's tasks")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"--tasks: {double[0]!r} is named twice")
    presets = [name for name in names if name in PRESETS]
    if presets and len(names) > 1:
        raise UserError(f"--tasks: the preset {presets[0]!r} stands alone; name its tasks instead")
    if MT_BENCH in names:
        raise UserError(f"--tasks: {MT_BENCH!r} stands alone, in a command of its own")
    if presets:
        preset = PRESETS[presets[0]]
        if num_fewshot is not None:
            raise UserError(f"--num_fewshot: the preset {preset.name!r} has numbers of its own")
        return Selection(
            preset.name, {column.task: column.fewshot for column in preset.columns}, preset
        )
    name = "_".join(names)
    if len(name) > 80:
        name = f"{names[0]}_and_{len(names) - 1}_more"
    return Selection(name, dict.fromkeys(names, num_fewshot), _comparable(names, num_fewshot))


def _comparable(names: Sequence[str], num_fewshot: int | None) -> Preset | None:
    for preset in reversed(PRESETS.values()):  # the zero-shot table first
        columns = tuple(
            column
            for column in preset.columns
            if column.task in names and column.fewshot == (num_fewshot or 0)
        )
        if len(columns) == len(names):
            return dataclasses.replace(preset, columns=columns, average=False)
    return None


@contextlib.contextmanager
def load_tasks(
    selection: Selection, *, include_path: str | None = None, data: str | None = None
) -> Iterator[tuple[list[Any], list[str]]]:
    """lm-eval's tasks and groups of a selection.

    Args:
      selection: what to run.
      include_path: a folder with task YAML files of the user's.
      data: a folder of JSONL files that takes the place of the network.

    Yields:
      Task and group objects for `lm_eval.simple_evaluate`, and remarks for the user. Files that
      they need are gone after the block.

    Raises:
      UserError: an unknown task (with the nearest names), or data that cannot be had.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path: {include_path} is no folder; expected one of YAML files")
    local_data.tasks_folder()  # refuses a machine without lm-eval
    with tempfile.TemporaryDirectory(prefix="danube_jax_tasks_") as folder, _quiet():
        notes: list[str] = []
        paths = [] if include_path is None else [include_path]
        if data is not None:
            local = {
                name: number
                for name, number in selection.tasks.items()
                if name in local_data.local_names()
            }
            notes = local_data.write_local_tasks(Path(data), Path(folder), local)
            paths.append(folder)
        manager = _manager(selection, paths, data is not None)
        loaded = []
        for name, number in selection.tasks.items():
            from_files = data is not None and name in local_data.local_names()
            loaded += _load(manager, name, number, str(data) if from_files else None)
        yield loaded, notes


def _manager(selection: Selection, paths: list[str], local: bool) -> Any:
    """An index of tasks; all of lm-eval's thousands are read only where they are needed."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=paths or None, include_defaults=False)
    missing = [name for name in selection.tasks if name not in manager.all_tasks]
    if not missing:
        return manager
    known = [name for name in missing if name in local_data.local_names()]
    if known == missing and not local:
        folders = [str(_official_folder(name)) for name in known]
        return TaskManager(include_path=[*folders, *paths], include_defaults=False)
    manager = TaskManager(include_path=paths or None)
    for name in missing:
        if name not in manager.all_tasks:
            for path in paths:
                _refuse_broken_yaml(Path(path))
            raise UserError(_unknown(name, manager.all_tasks))
    return manager


def _refuse_broken_yaml(folder: Path) -> None:
    """Names a file that lm-eval passed over, since it is no YAML."""
    import yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            for _ in yaml.parse(path.read_text(encoding="utf-8")):
                pass
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"--include_path: {path} is no YAML: {error}") from None


def _official_folder(name: str) -> Path:
    if name == local_data.MMLU_GROUP:
        return local_data.tasks_folder() / "mmlu" / "default"
    return (local_data.tasks_folder() / local_data.TASKS[name].include).parent


def _unknown(name: str, known: Sequence[str]) -> str:
    everything = dict.fromkeys([*PRESETS, MT_BENCH, *known])
    near = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks shows them all"
    return f"--tasks: there is no task {name!r}; {hint}"


def _load(manager: Any, name: str, number: int | None, data: str | None) -> list[Any]:
    """A task or group; `data` is the folder that its documents are from, None for the network."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # the datasets library raises whatever its back ends do
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if data is not None:
            hint = f"its rows in {data} are not what it expects, see docs/evaluation.md"
        else:
            hint = "where there is no network, give a folder of JSONL files with --local_data"
        raise UserError(f"the task {name} cannot be loaded ({reason}); {hint}") from None
    for task in loaded["tasks"].values():
        if number is not None:
            task.set_config(key="num_fewshot", value=number)
    inside = {child for group in loaded.get("groups", {}).values() for child in group.child_names}
    roots = [group for key, group in loaded.get("groups", {}).items() if key not in inside]
    return roots or list(loaded["tasks"].values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of lm-eval and the bars of datasets."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "fsspec")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
