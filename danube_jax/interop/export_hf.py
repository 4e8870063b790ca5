"""Writes a model as a Hugging Face folder: weights, config, tokenizer, model card; checks it."""

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from danube_jax import files
from danube_jax.console import info, progress, warn
from danube_jax.data.chat import load_template
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.interop import hf_config, safetensors_file, weight_files
from danube_jax.interop.folders import check_output
from danube_jax.interop.hf_tokenizer import export_tokenizer
from danube_jax.interop.model_card import model_card
from danube_jax.interop.model_source import TOKENIZER, LeafReader, ModelSource
from danube_jax.interop.peft import write_adapter
from danube_jax.interop.verify import Comparison, verify_adapter, verify_model

STORED = "stored"
DTYPES = {str(dtype): dtype for dtype in safetensors_file.NAMES}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
      dtype: 'bfloat16', 'float16', 'float32', or 'stored' for the checkpoint's own.
      shard_bytes: largest size of a weight file; a single tensor may exceed it.
      chat_template: 'danube', 'danube2', 'danube3', a Jinja file, 'none'; '' keeps the tokenizer's.
      license: for the model card, as the Hub spells it; '' means apache-2.0 for what was trained
        from random weights, and 'other' for what descends from an imported model.
      lora: for a LoRA checkpoint, 'merge' or 'adapter'.
      base_name: what an exported adapter calls its base; '' means the base's folder.
      verify: load what was written with transformers and compare.
      overwrite: replace what the output folder holds.
    """

    dtype: str = "bfloat16"
    shard_bytes: int = 5 * 10**9
    chat_template: str = ""
    license: str = ""
    lora: str = "merge"
    base_name: str = ""
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          UserError: an impossible value; names the flag.
        """
        if self.dtype not in (*DTYPES, STORED):
            known = ", ".join((*DTYPES, STORED))
            raise UserError(f"--dtype={self.dtype}: expected one of {known}")
        if self.lora not in ("merge", "adapter"):
            raise UserError(f"--lora={self.lora}: expected merge or adapter")
        if self.shard_bytes < 1:
            raise UserError(f"--shard_size: {self.shard_bytes} bytes; expected a positive size")


def parse_size(text: str) -> int:
    """'5GB' as 5,000,000,000.

    Raises:
      UserError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--shard_size={text}: expected a size such as 5GB or 500MB")
    return size


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported: the folder, its weight files, and how it compares (None: unchecked)."""

    path: Path
    files: tuple[str, ...]
    step: int | None
    comparison: Comparison | None


def export_model(source: ModelSource, output: Path, options: ExportOptions) -> Exported:
    """Writes `source` as a Hugging Face folder, which appears when it is complete and checked.

    Weights are streamed a layer at a time. A LoRA checkpoint is merged into its base, or written as
    a PEFT folder.

    Raises:
      UserError: the source cannot be read, `output` cannot be written, or a check cannot be made.
      RunError: what was written does not compute what the checkpoint does.
    """
    output = Path(output)
    check_output(output, options.overwrite)
    adapter = source.lora is not None and options.lora == "adapter"
    if options.verify:
        require_verifiers(adapter)
    tokenizer = _tokenizer(source, options)
    with files.atomic_folder(output) as folder:
        if adapter:
            result = _export_adapter(source, folder, tokenizer, options)
        else:
            result = _export_whole(source, folder, tokenizer, options)
    return dataclasses.replace(result, path=output)


def require_verifiers(adapter: bool = False) -> None:
    """Makes sure that what the check needs is installed.

    Raises:
      UserError: it is not; says how to get it.
    """
    import importlib.util

    for package in ("torch", *(("peft",) if adapter else ())):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the check of what is written needs {package}, which is not installed: "
                "pip install 'danube-jax[hf]', or pass --noverify"
            )


def _tokenizer(source: ModelSource, options: ExportOptions) -> Tokenizer | None:
    try:
        tokenizer = source.tokenizer()
    except UserError as error:
        if (source.path / TOKENIZER).is_dir():  # it has one, and it is damaged
            raise
        warn(f"exporting without a tokenizer: {error}")
        if options.chat_template not in ("", "none"):
            raise UserError(
                f"--chat_template={options.chat_template}: there is no tokenizer to go with it"
            ) from None
        return None
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{source.config.vocab_size}; expected no more ids than rows of the embedding"
        )
    if options.chat_template == "none":
        return tokenizer.with_chat_template(None)
    if options.chat_template:
        return tokenizer.with_chat_template(load_template(options.chat_template))
    return tokenizer


def _export_whole(
    source: ModelSource, folder: Path, tokenizer: Tokenizer | None, options: ExportOptions
) -> Exported:
    names, step = source.with_reader(
        functools.partial(_write_weights, folder=folder, options=options)
    )
    dtype = _main_dtype(folder, names)
    content = hf_config.export_config(source.config, dtype=dtype, **special_ids(source, tokenizer))
    files.write_json(folder / hf_config.CONFIG_FILE, content)
    generation = source.generation or hf_config.export_generation_config(content)
    files.write_json(folder / hf_config.GENERATION_FILE, generation)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder, source)
    comparison = None
    if options.verify:
        fixed = dataclasses.replace(source, steps=() if step is None else (step,), step=step)
        comparison = verify_model(folder, fixed, tokenizer, options.dtype)
    card = model_card(source, step, tokenizer, license=options.license, dtype=dtype)
    files.write_bytes(folder / "README.md", card.encode())
    return Exported(folder, names, step, comparison)


def _export_adapter(
    source: ModelSource, folder: Path, tokenizer: Tokenizer | None, options: ExportOptions
) -> Exported:
    assert source.base is not None
    adapters, step = source.adapters()
    dtype = np.dtype(np.float32) if options.dtype == STORED else DTYPES[options.dtype]
    base = options.base_name or str(source.base.checkpoint_folder())
    if not options.base_name and source.base.kind == "workdir":
        warn(
            f"the adapter's base, {base}, is a checkpoint, which PEFT cannot load; export it too "
            f"(tools/convert_to_hf.py --model={base} --output=DIR) and name that folder with "
            "--base_name=DIR"
        )
    write_adapter(folder, source, adapters, base=base, dtype=dtype)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder, source)
    comparison = None
    if options.verify:
        fixed = dataclasses.replace(source, steps=(step,), step=step)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base.") as scratch:
            base_folder = source.base.path
            if source.base.kind == "workdir":
                base_folder = Path(scratch)
                info("writing the base for the check")
                plain = ExportOptions(dtype=STORED, verify=False)
                _export_whole(source.base, base_folder, None, plain)
            comparison = verify_adapter(folder, base_folder, fixed, tokenizer, options.dtype)
    card = model_card(source, step, tokenizer, license=options.license, dtype=str(dtype), base=base)
    files.write_bytes(folder / "README.md", card.encode())
    names = tuple(path.name for path in folder.glob("*.safetensors"))
    return Exported(folder, names, step, comparison)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, source: ModelSource) -> None:
    export_tokenizer(
        tokenizer,
        folder,
        chat_template=tokenizer.chat_template,
        model_max_length=source.config.max_position_embeddings,
    )


def special_ids(source: ModelSource, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """BOS, EOS and padding for config.json: an imported model's own, else the tokenizer's."""
    imported = source.saved if source.kind == "huggingface" else source.saved.get("huggingface")
    if imported is None and source.base is not None:
        return special_ids(source.base, tokenizer)
    if imported is not None:
        defaults = hf_config.DEFAULTS[source.config.model_type]
        return {
            name: imported.get(f"{name[:3]}_token_id", defaults[f"{name[:3]}_token_id"])
            for name in ("bos_id", "eos_id", "pad_id")
        }
    if tokenizer is None:
        return {"bos_id": None, "eos_id": None, "pad_id": None}
    return {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}


Announced = tuple[str, np.dtype, tuple[int, ...]]


def plan_shards(tensors: Sequence[Announced], shard_bytes: int) -> list[list[Announced]]:
    """The tensors of every weight file, in order; none larger than asked unless of one tensor."""
    shards: list[list[Announced]] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += nbytes
    return shards


def _write_weights(reader: LeafReader, *, folder: Path, options: ExportOptions) -> tuple[str, ...]:
    """Streams the weights into `folder`; returns the names of the files."""
    wanted = None if options.dtype == STORED else DTYPES[options.dtype]
    tensors = [
        (tensor.name, wanted or reader.dtype(leaf), tensor.shape)
        for leaf in reader.leaves
        for tensor in leaf.tensors
    ]
    shards = plan_shards(tensors, options.shard_bytes)
    names = [weight_files.SAFETENSORS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {t[0]: name for name, shard in zip(names, shards, strict=True) for t in shard}
    total = sum(int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in tensors)
    with progress("writing weights", total, "MB") as advance:
        _stream(reader, folder, dict(zip(names, shards, strict=True)), weight_map, advance)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_json(folder / weight_files.SAFETENSORS_INDEX, index)
    return tuple(names)


def _stream(
    reader: LeafReader,
    folder: Path,
    shards: dict[str, list[Announced]],
    weight_map: dict[str, str],
    advance: Callable[[float], None],
) -> None:
    dtypes = {name: dtype for shard in shards.values() for name, dtype, _ in shard}
    writer, current = None, ""
    try:
        for leaf, array in reader:
            array = _cast(array, dtypes[leaf.tensors[0].name], leaf.tensors[0].name)
            for tensor, part in leaf.to_tensors(array):
                if weight_map[tensor.name] != current:
                    if writer is not None:
                        writer.close()
                    current = weight_map[tensor.name]
                    writer = safetensors_file.Writer(folder / current, shards[current])
                writer.write(tensor.name, part)
                advance(part.nbytes)
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    writer.close()


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and np.isinf(cast).sum() != np.isinf(array).sum():
        raise UserError(f"--dtype=float16: {name} has values beyond its range; take bfloat16")
    return cast


def _main_dtype(folder: Path, names: Sequence[str]) -> str:
    """The dtype of most tensors, by torch's name."""
    entries = [e for n in names for e in safetensors_file.read_header(folder / n).values()]
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry.dtype] = counts.get(entry.dtype, 0) + 1
    return str(safetensors_file.DTYPES[max(counts, key=lambda name: counts[name])])
