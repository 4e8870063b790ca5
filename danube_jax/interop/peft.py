"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import danube_jax
from danube_jax import files
from danube_jax.console import progress
from danube_jax.errors import UserError
from danube_jax.interop import hf_config, safetensors_file
from danube_jax.interop.folders import check_output
from danube_jax.interop.hf_weights import get_leaf
from danube_jax.interop.import_hf import IMPORTED_META, STEP
from danube_jax.interop.model_source import (
    ADAPTER_CONFIG,
    CHECKPOINTS,
    OUR_KEY,
    TOKENIZER,
    ModelSource,
    open_model,
)
from danube_jax.interop.safetensors_file import RowBlock
from danube_jax.interop.step_params import LeafPath, LeafSource, save_params
from danube_jax.models.lora import LoraConfig, abstract_adapters
from danube_jax.models.projections import PROJECTIONS
from danube_jax.untrusted import refuse_misspelt

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers"
_SIDES = {"a": "lora_A", "b": "lora_B"}

# Features of PEFT's LoRA that are not ours, and the values that mean their absence.
_LACKING: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
}


_KNOWN = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
    *("target_modules", "use_rslora", *_LACKING),
)


def tensor_name(path: LeafPath) -> str:
    """PEFT's name of an array of the adapter tree."""
    layer, block, projection, side = path
    number = layer.removeprefix("layers_")
    return f"{_PREFIX}.{number}.{block}.{projection}.{_SIDES[side]}.weight"


def _paths(lora: LoraConfig, source: ModelSource) -> dict[LeafPath, tuple[int, ...]]:
    shapes = {}
    for layer, blocks in abstract_adapters(lora, source.config).items():
        for block, names in blocks.items():
            for name, sides in names.items():
                for side, leaf in sides.items():
                    shapes[layer, block, name, side] = leaf.shape
    return shapes


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json.

    Args:
      lora: rank, scale and targets.
      base: folder or name of the base model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


def write_adapter(
    folder: Path, source: ModelSource, adapters: Mapping[str, Any], *, base: str, dtype: np.dtype
) -> None:
    """Writes a LoRA checkpoint's adapters into `folder`.

    Args:
      folder: where the two files go.
      source: the LoRA checkpoint.
      adapters: its arrays.
      base: what the adapter calls its base.
      dtype: dtype of the tensors.
    """
    assert source.lora is not None
    # Ours are [in, r] and [r, out]; PEFT's are those of torch's Linear, [out, in].
    shapes = {path: shape[::-1] for path, shape in _paths(source.lora, source).items()}
    writer = safetensors_file.Writer(
        folder / WEIGHTS, [(tensor_name(path), dtype, shape) for path, shape in shapes.items()]
    )
    try:
        for path in shapes:
            array = np.asarray(get_leaf(adapters, path)).T.astype(dtype)
            writer.write(tensor_name(path), array)
    except BaseException:
        writer.abort()
        raise
    writer.close()
    files.write_json(folder / ADAPTER_CONFIG, adapter_config(source.lora, base))


def read_adapter_config(folder: Path) -> tuple[LoraConfig, str]:
    """The LoRA that a PEFT folder holds, and what it calls its base.

    Raises:
      UserError: another kind of adapter, or a feature that is not ours.
    """
    path = folder / ADAPTER_CONFIG
    content = hf_config.read_json(path)
    refuse_misspelt(content, _KNOWN, path)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={content.get('peft_type')!r}; expected 'LORA'")
    for key, allowed in _LACKING.items():
        value = content.get(key)
        if not any(value == item and type(value) is type(item) for item in allowed):
            raise UserError(f"{path}: {key}={content[key]!r} is not supported")
    targets = content.get("target_modules")
    if isinstance(targets, str):
        targets = list(PROJECTIONS) if targets == "all-linear" else [targets]
    if targets is not None and not isinstance(targets, list):
        raise UserError(f"{path}: target_modules is {targets!r}; expected a list of names")
    names = {str(target).rsplit(".", 1)[-1] for target in targets or ()}
    unknown = sorted(names - set(PROJECTIONS))
    if unknown or not names:
        raise UserError(
            f"{path}: target_modules {unknown[0] if unknown else targets!r}; expected some of "
            f"{', '.join(PROJECTIONS)}"
        )
    try:
        lora = LoraConfig(
            rank=_number(content, "r", int),
            alpha=float(_number(content, "lora_alpha", int | float, 8)),
            dropout=float(_number(content, "lora_dropout", int | float, 0.0)),
            targets=tuple(name for name in PROJECTIONS if name in names),
            rslora=_flag(content, "use_rslora"),
        )
    except (OverflowError, ValueError, UserError) as error:
        raise UserError(f"{path}: no usable LoRA config ({error})") from None
    return lora, str(content.get("base_model_name_or_path") or "")


def _number(content: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{key} is {value!r}; expected a number")
    return value


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return bool(value)


def import_adapter(
    model: Path, output: Path, *, base: str | None = None, overwrite: bool = False
) -> LoraConfig:
    """Converts a PEFT folder into checkpoint 0 of a new folder, which names its base.

    Args:
      model: the adapter's folder.
      output: the folder to make; it appears when all is in it.
      base: the base model's folder; None takes what the adapter names.
      overwrite: replace what `output` holds.

    Raises:
      UserError: an unsupported adapter, a base that is not there or that the adapter does not fit,
        a damaged file, or `output` cannot be written.
    """
    model, output = Path(model), Path(output)
    check_output(output, overwrite)
    lora, named = read_adapter_config(model)
    base_path = Path(base or named)
    if not base_path.is_dir():
        raise UserError(
            f"{model}: its base {str(base_path)!r} is no folder here; name the base's with --base"
        )
    source = open_model(base_path)
    weights = model / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{model}: no {WEIGHTS}; expected PEFT's adapter in safetensors")
    entries = safetensors_file.read_header(weights)
    shapes = _paths(lora, source)
    _check_entries(entries, shapes, weights, base_path)

    def row_blocks(path: LeafPath) -> Iterator[RowBlock]:
        for block in safetensors_file.read_row_blocks(weights, entries[tensor_name(path)]):
            yield RowBlock(block.rows.astype(np.float32))

    sources = [
        LeafSource(path, shape, np.dtype(np.float32), True, functools.partial(row_blocks, path))
        for path, shape in shapes.items()
    ]
    record = dataclasses.asdict(lora) | {"base": str(base_path.resolve())}
    with files.atomic_folder(output) as folder:
        saved = {
            OUR_KEY: danube_jax.__version__,
            "config": {
                "name": model.resolve().name,
                "model": dataclasses.asdict(source.config),
            },
        }
        files.write_json(folder / hf_config.CONFIG_FILE, files.seal(saved))
        if any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            from danube_jax.data.tokenizer import open_tokenizer

            open_tokenizer(model).save(folder / TOKENIZER)
            files.write_sums(folder / TOKENIZER)
        total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        meta = {**IMPORTED_META, "imported_from": str(model), "lora": record}
        with progress(f"importing {model}", total, "MB") as advance:
            save_params(folder / CHECKPOINTS / str(STEP), sources, meta, advance)
    return lora


def _check_entries(
    entries: Mapping[str, safetensors_file.Entry],
    shapes: Mapping[LeafPath, tuple[int, ...]],
    weights: Path,
    base: Path,
) -> None:
    expected = {tensor_name(path): shape[::-1] for path, shape in shapes.items()}
    for name in sorted(expected.keys() | entries.keys()):
        found = list(entries[name].shape) if name in entries else "missing"
        asked = list(expected[name]) if name in expected else "no such tensor"
        if found != asked:
            raise UserError(
                f"{weights}: {name} is {found}; expected {asked} to fit the base {base}"
            )
        if entries[name].dtype not in safetensors_file.DTYPES:
            raise UserError(f"{weights}: {name} is {entries[name].dtype}; expected a float dtype")
