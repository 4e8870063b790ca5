"""Makes a folder of our own from a Hugging Face folder: weights, config, tokenizer, chat format."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import danube_jax
from danube_jax import files
from danube_jax.console import progress, warn
from danube_jax.data.tokenizer import NoTokenizer, Tokenizer, open_tokenizer
from danube_jax.errors import UserError
from danube_jax.interop import hf_config
from danube_jax.interop.folders import check_output
from danube_jax.interop.hf_weights import Leaf, layout
from danube_jax.interop.model_source import CHECKPOINTS, OUR_KEY, TOKENIZER
from danube_jax.interop.safetensors_file import RowBlock
from danube_jax.interop.step_params import LeafSource, save_params
from danube_jax.interop.weight_files import WeightFiles

STEP = 0
IMPORTED_META = {"step": STEP, "tokens": 0, "data": {}, "devices": 1}


@dataclasses.dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
      path: the folder that was made.
      parameters: number of them; a tied head counts once.
      dtypes: names of the stored dtypes.
      nbytes: bytes of the weights.
      tokenizer: None where the folder had none.
    """

    path: Path
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int
    tokenizer: Tokenizer | None


def import_model(model: Path, output: Path, *, overwrite: bool = False) -> Imported:
    """Converts a Llama or Mistral folder into checkpoint 0 of a new folder.

    Tensors keep their dtype and their bits. They are streamed: less than one is in memory.

    Args:
      model: the Hugging Face folder.
      output: the folder to make; it appears when all is in it.
      overwrite: replace what `output` holds.

    Raises:
      UserError: the model is not supported, a file is missing or damaged, or `output` cannot be
        written.
    """
    model, output = Path(model), Path(output)
    if not model.is_dir():
        raise UserError(f"--model={model}: no such folder; expected a Hugging Face model folder")
    check_output(output, overwrite)
    config, content = hf_config.read_config(model)
    if OUR_KEY in content:
        raise UserError(
            f"--model={model}: is a folder of danube_jax's own; every command reads it as it is"
        )
    weights = WeightFiles(model, config)
    weights.warn_of_untied_head()
    tokenizer = read_tokenizer(model, config.vocab_size)
    with files.atomic_folder(output) as folder:
        saved = {
            OUR_KEY: danube_jax.__version__,
            "config": {"name": model.resolve().name, "model": dataclasses.asdict(config)},
            "huggingface": content,
        }
        files.write_json(folder / hf_config.CONFIG_FILE, files.seal(saved))
        generation = model / hf_config.GENERATION_FILE
        if generation.is_file():
            content = hf_config.read_json(generation)
            files.write_json(folder / hf_config.GENERATION_FILE, content)
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
            files.write_sums(folder / TOKENIZER)
        _write_weights(weights, folder, model)
    dtypes = tuple(sorted({str(weights.dtype(leaf)) for leaf in layout(config)}))
    parameters = sum(int(np.prod(t.shape)) for t in weights.tensors.values())
    return Imported(output, parameters, dtypes, weights.nbytes, tokenizer)


def read_tokenizer(model: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None, with a warning, where it has none.

    Raises:
      UserError: it cannot be read, or has more ids than the model.
    """
    try:
        tokenizer = open_tokenizer(model)
    except NoTokenizer as error:
        warn(f"converting without a tokenizer: {error}")
        return None
    except UserError as error:
        raise UserError(
            f"{error}; to convert without a tokenizer, take its files out of the folder"
        ) from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{model}: the tokenizer has {tokenizer.vocab_size} ids and the model {vocab_size}; "
            "expected no more ids than rows of the embedding"
        )
    return tokenizer


def _write_weights(weights: WeightFiles, folder: Path, model: Path) -> None:
    not_finite: list[str] = []

    def row_blocks(leaf: Leaf) -> Iterator[RowBlock]:
        for block in weights.row_blocks(leaf):
            if not not_finite and not is_finite(block.rows):
                not_finite.append(leaf.tensors[0].name)
            yield block

    sources = [
        LeafSource(
            leaf.path,
            leaf.shape,
            weights.dtype(leaf),
            leaf.transposed,
            functools.partial(row_blocks, leaf),
        )
        for leaf in layout(weights.config)
    ]
    meta: dict[str, Any] = {**IMPORTED_META, "imported_from": str(model)}
    with progress(f"importing {model}", weights.nbytes, "MB") as advance:
        save_params(folder / CHECKPOINTS / str(STEP), sources, meta, advance)
    if not_finite:
        warn(
            f"{model}: {not_finite[0]} or its neighbour holds values that are not finite; they are "
            "kept as they are"
        )


_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def is_finite(block: np.ndarray) -> bool:
    """Whether a block of floats holds neither a NaN nor an infinity, by its bits."""
    words = block.view(f"u{block.dtype.itemsize}")
    magnitudes = words & words.dtype.type(np.iinfo(words.dtype).max >> 1)
    return int(magnitudes.max()) < _EXPONENTS[block.dtype.name]
