"""From a model's folder to what lm-eval's adapter works with."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from danube_jax.data import chat
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.evaluation.scoring import Params, Scorer
from danube_jax.files import sha256_json
from danube_jax.inference.generate import Generator
from danube_jax.inference.loading import open_text_model
from danube_jax.interop.model_source import CHECKPOINTS, ModelSource
from danube_jax.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class EvaluationModel:
    """A model's folder; its weights are not loaded yet.

    Attributes:
      source: the folder.
      tokenizer: its tokenizer, with a chat template only if the model has one of its own or the
        user named one.
    """

    source: ModelSource
    tokenizer: Tokenizer

    def load(self, dtype: str = "auto", mesh: Mesh | None = None) -> dict[str, Any]:
        """Loads the weights, whole on each device of a mesh; returns `DanubeLM`'s arguments.

        Args:
          dtype: of weights and activations; 'auto' is float32 on a CPU, else bfloat16.
          mesh: over which rows are spread; None means all devices.

        Raises:
          UserError: the weights cannot be read or used.
        """
        source, kind = self.source, jax.numpy.dtype(self.dtype(dtype))
        mesh = make_mesh() if mesh is None else mesh
        generator = Generator(
            source.config, source.load_params(kind), tokenizer=self.tokenizer, dtype=kind
        )
        params = generator.params
        if mesh.size > 1:
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        return {
            "scorer": Scorer(generator.decoder, mesh=mesh),
            "params": params,
            "generator": local_generators(generator, params),
            "tokenizer": self.tokenizer,
            "eos_ids": source.eos_ids(),
            "generation": source.generation,
            "max_length": source.config.max_position_embeddings,
        }

    def dtype(self, dtype: str) -> str:
        """The name of the dtype that `load` computes in."""
        if dtype != "auto":
            return dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def fingerprint(self, dtype: str) -> str:
        """Changes with the weights' files, what bears on prompts' tokens, and the dtype."""
        folder = self.source.path
        if self.source.kind == "workdir":
            folder = folder / CHECKPOINTS / str(self.source.step)
        files = sorted(folder.rglob("*") if self.source.kind == "workdir" else folder.iterdir())
        stats = [
            (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
            if path.is_file() and path.suffix != ".md"
        ]
        tokens = [self.tokenizer.fingerprint, self.tokenizer.adds_bos, self.source.eos_ids()]
        return sha256_json([os.path.abspath(folder), stats, tokens, self.dtype(dtype)])[:16]


def local_generators(first: Generator, params: Params) -> list[Generator]:
    """One generator a device of this process.

    Args:
      first: a generator, which stays the first of them.
      params: its parameters, whole on every device of a mesh.
    """
    leaf = jax.tree.leaves(params)[0]
    others = range(1, len(leaf.addressable_shards))
    return [
        first,
        *(
            Generator(
                first.decoder.config,
                jax.tree.map(lambda x, i=i: x.addressable_shards[i].data, params),
                tokenizer=first.tokenizer,
                dtype=first.decoder.dtype,
            )
            for i in others
        ),
    ]


def open_for_evaluation(path: str, chat_template: str | None = None) -> EvaluationModel:
    """Opens a folder and its tokenizer; reads no weights.

    Args:
      path: a workdir, a checkpoint step, or a Hugging Face folder.
      chat_template: a name or a file, before the model's own template.

    Raises:
      UserError: no model, no tokenizer that fits it, or an unknown template.
    """
    source = open_text_model(path).source
    tokenizer = source.tokenizer()
    if chat_template is not None:
        tokenizer = tokenizer.with_chat_template(chat.load_template(chat_template))
    return EvaluationModel(source, tokenizer)
