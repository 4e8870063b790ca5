"""From a model's folder to what lm-eval's adapter works with."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from danube_jax.data.tokenizer import Tokenizer
from danube_jax.evaluation.scoring import Params, Scorer
from danube_jax.files import sha256_json
from danube_jax.inference.generate import Generator
from danube_jax.interop.model_source import CHECKPOINTS, ModelSource, open_model
from danube_jax.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class EvaluationParts:
    """A loaded model: what `DanubeLM` takes, by the same names."""

    source: ModelSource
    scorer: Scorer
    params: Params
    generator: Generator | Callable[[], Generator]
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    generation: Mapping[str, Any]
    max_length: int


def open_for_evaluation(path: str) -> tuple[ModelSource, Tokenizer]:
    """Opens a folder and its tokenizer; reads no weights.

    Raises:
      UserError: no model, or no tokenizer that fits it.
    """
    from danube_jax.inference.loading import open_text_model

    model = open_text_model(path)
    return model.source, model.source.tokenizer()


def resolve_dtype(dtype: str) -> str:
    """The dtype of 'auto': float32 on a CPU, else bfloat16."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_parts(path: str, dtype: str = "auto") -> EvaluationParts:
    """Loads a model onto all devices, a copy of the weights on each.

    Raises:
      UserError: no model, no tokenizer, or weights that cannot be used.
    """
    source, tokenizer = open_for_evaluation(path)
    mesh = make_mesh()
    kind = jax.numpy.dtype(resolve_dtype(dtype))
    params = source.load_params(kind)
    generator = Generator(source.config, params, tokenizer=tokenizer, dtype=kind)
    params = generator.params
    if mesh.size > 1:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return EvaluationParts(
        source=source,
        scorer=Scorer(generator.decoder, mesh=mesh),
        params=params,
        generator=generator,
        tokenizer=tokenizer,
        eos_ids=source.eos_ids(),
        generation=source.generation,
        max_length=source.config.max_position_embeddings,
    )


def fingerprint(source: ModelSource, dtype: str) -> str:
    """Names a cache of results: changes with the weights' files, the tokenizer and the dtype."""
    folder = source.path
    if source.kind == "workdir":
        folder = source.path / CHECKPOINTS / str(source.step)
    stats = [
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*") if source.kind == "workdir" else folder.iterdir())
        if path.is_file() and path.suffix not in (".md", ".db")
    ]
    where = os.path.abspath(Path(folder))
    return sha256_json([where, stats, source.tokenizer().fingerprint, dtype])[:16]
