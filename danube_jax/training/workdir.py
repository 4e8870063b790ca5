"""The folder of a run: whose it is, and that a run is resumed as what it was."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import danube_jax
from danube_jax import files
from danube_jax.config import RunConfig, parse_config, to_dict
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
PREPARED_DATA = "data"  # where built-in text is prepared
ROUNDS = "rounds"  # earlier rounds of a tuning run
TOKENIZER = "tokenizer"  # a copy of the run's tokenizer, so that the folder is whole

# What may differ when a run is resumed: speed, memory, reporting and housekeeping.
FREE_KEYS = (
    "name",
    "model.attention_backend",
    "model.remat",
    "model.scan_layers",
    "data.directory",
    "data.sources",  # what they hold is compared by fingerprint
    "data.tokenizer",
    "data.verify",
    "data.num_workers",
    "data.prefetch",
    "training.microbatch_tokens",
    "training.zero1",
    "training.loss_chunk_tokens",
    "training.max_steps",
    "training.log_every",
    "training.max_skipped_steps",
    "training.spike_guard",
    "training.spike_guard_window",
    "evaluation",
    "evals",
    "samples",
    "checkpoint",
)


def check_workdir(workdir: Path, run: RunConfig) -> None:
    """Makes sure that `workdir` is new, empty, or this run's; writes nothing.

    Raises:
      UserError: it is no folder, holds something else, or holds a run with another config.
    """
    try:
        entries = sorted(entry.name for entry in workdir.iterdir()) if workdir.exists() else []
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--workdir={workdir}: not a folder to work in: {reason}") from error
    if CONFIG_FILE in entries:
        _require_same_run(workdir / CONFIG_FILE, run)
        return
    others = [x for x in entries if x not in (PREPARED_DATA, ROUNDS) and not files.is_temporary(x)]
    if others:
        raise UserError(
            f"--workdir={workdir}: holds {others[0]!r} but no {CONFIG_FILE}, so it is not "
            "the folder of a run; choose an empty or a new one"
        )


def claim_workdir(workdir: Path, run: RunConfig) -> None:
    """Makes `workdir`, which `check_workdir` allowed, this run's folder.

    Raises:
      UserError: it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.clear_temporaries(workdir)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--workdir={workdir}: cannot be made: {reason}") from error
    saved = {"danube_jax": danube_jax.__version__, "config": to_dict(run)}
    files.write_json(workdir / CONFIG_FILE, files.seal(saved))


def has_checkpoints(workdir: Path) -> bool:
    """Whether `workdir` holds a checkpoint, be it good or damaged."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Saves a copy of the run's tokenizer in `workdir`, where there is none yet."""
    if not (workdir / TOKENIZER).exists():
        with files.atomic_folder(workdir / TOKENIZER) as folder:
            tokenizer.save(folder)
            files.write_sums(folder)


def read_config(workdir: Path) -> dict[str, Any]:
    """The config that a run was started with, as plain dicts.

    Raises:
      UserError: there is none or it is not readable.
    """
    path = workdir / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        files.check_seal(saved, str(path))
        return saved["config"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the config of a run, or damaged ({error}); restore it from a copy (it is "
            "the config that the run was started with), or choose another --workdir"
        ) from error


def _require_same_run(path: Path, run: RunConfig) -> None:
    free = FREE_KEYS + (("data", "phases") if run.checkpoint.allow_data_change else ())
    try:
        saved = parse_config(read_config(path.parent))  # with defaults of newer keys
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    old = _flatten(to_dict(saved))
    new = _flatten(to_dict(run))
    key = "init_from.path"  # however it is spelt
    if os.path.realpath(old[key]) == os.path.realpath(new[key]):
        old[key] = new[key]
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not any(
            key == item or key.startswith((f"{item}.", f"{item}[")) for item in free
        ):
            raise UserError(
                f"--workdir={path.parent}: holds another run: config.{key} is "
                f"{old.get(key)!r} there and {new.get(key)!r} here; "
                "choose another --workdir, or the same config"
            )


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted keys."""
    if isinstance(node, Mapping):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(node)]
    else:
        return {prefix: node}
    return {key: value for name, child in items for key, value in _flatten(child, name).items()}
