"""From a model's folder to a generator."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from danube_jax.data import chat
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.inference.generate import Generator
from danube_jax.interop.model_source import ModelSource, open_model


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model whose weights are not loaded yet, and its tokenizer."""

    source: ModelSource
    tokenizer: Tokenizer

    @property
    def context(self) -> int:
        """Tokens that the model takes, prompt and answer together."""
        return self.source.config.max_position_embeddings

    def generator(self, dtype: str, cache_dtype: str = "auto") -> Generator:
        """Loads the weights.

        Args:
          dtype: of weights and activations; 'auto' is float32 on a CPU, else bfloat16.
          cache_dtype: of cached keys and values; 'auto' is that of the weights.
        """
        import jax
        import jax.numpy as jnp

        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        kind = jnp.dtype(dtype)
        params = self.source.load_params(kind)
        return Generator(
            self.source.config,
            params,
            tokenizer=self.tokenizer,
            dtype=kind,
            cache_dtype=None if cache_dtype == "auto" else jnp.dtype(cache_dtype),
        )


def open_text_model(path: str, chat_template: str | None = None) -> TextModel:
    """Opens a model's folder; reads its tokenizer, not its weights.

    Args:
      path: a workdir, a checkpoint step, or a Hugging Face folder.
      chat_template: a name or a file, before the model's own template; where neither is there,
        Danube's.

    Raises:
      UserError: no model, no tokenizer, or one of another vocabulary; an unknown template.
    """
    template = chat.load_template(chat_template) if chat_template else None
    source = open_model(path)
    tokenizer = source.tokenizer()
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} ids and the model only "
            f"{source.config.vocab_size:,}; expected the tokenizer that it was trained with"
        )
    if template is None:
        template = tokenizer.chat_template or chat.TEMPLATES[chat.DEFAULT_TEMPLATE]
    return TextModel(source, tokenizer.with_chat_template(template))


@contextmanager
def quiet_broken_pipe() -> Iterator[None]:
    """A reader of standard output that goes away (`| head`) ends the block without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
