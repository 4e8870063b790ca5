"""Writes a tokenizer as the files of a Hugging Face folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from danube_jax import files
from danube_jax.data.hf_tokenizer import (
    GENERIC_CLASS,
    ORIGIN,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_JSON,
    HuggingFaceTokenizer,
)
from danube_jax.data.sentencepiece_tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    SentencePieceTokenizer,
)
from danube_jax.data.tokenizer_base import CHAT_TEMPLATE_FILE, Tokenizer
from danube_jax.errors import UserError
from danube_jax.interop.fast_tokenizer import to_fast_tokenizer

# Of version 4's generic class, token_type_ids are an output too, which the models refuse.
MODEL_INPUTS = ["input_ids", "attention_mask"]


def export_tokenizer(
    tokenizer: Tokenizer,
    folder: str | os.PathLike,
    *,
    chat_template: str | None,
    model_max_length: int,
) -> None:
    """Writes every tokenizer file that transformers 4 and 5, vLLM and llama.cpp read.

    A SentencePiece model becomes `tokenizer.json` with the same ids, with `tokenizer.model` beside
    it; a Hugging Face tokenizer is carried over file by file, where transformers 5 writes what
    version 4 cannot read in the form that both can. `AutoTokenizer.from_pretrained` of
    the folder gives the ids of `tokenizer.encode_prompt` and `tokenizer.encode_chat`.

    Args:
      tokenizer: what to write.
      folder: made where it is missing; files of the same names are replaced.
      chat_template: Jinja source, written into `tokenizer_config.json` and `chat_template.jinja`;
        None for a model without a chat format.
      model_max_length: the model's context, in tokens.

    Raises:
      UserError: the SentencePiece model cannot be converted exactly; nothing is written then.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        contents = _from_sentencepiece(tokenizer, model_max_length)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        contents = _from_hugging_face(tokenizer)
    else:
        raise UserError(f"{type(tokenizer).__name__}: cannot be exported")
    config = json.loads(contents.get(CONFIG_FILE, b"{}"))
    config.pop("chat_template", None)
    contents.pop(CHAT_TEMPLATE_FILE, None)
    config["model_max_length"] = model_max_length
    if chat_template is not None:
        config["chat_template"] = chat_template
        contents[CHAT_TEMPLATE_FILE] = chat_template.encode()
    contents[CONFIG_FILE] = _json(config)
    folder = Path(folder)
    for name, data in contents.items():
        files.write_bytes(folder / name, data)
    if chat_template is None:
        (folder / CHAT_TEMPLATE_FILE).unlink(missing_ok=True)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer, max_length: int) -> dict[str, bytes]:
    fast = to_fast_tokenizer(tokenizer)
    model = tokenizer.files()[MODEL_FILE]
    fast_json = fast.to_str(pretty=True).encode()
    config: dict[str, Any] = {
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {
                "content": tokenizer.piece(i),
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i in sorted(tokenizer.special_ids)
        },
        **tokenizer.special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": MODEL_INPUTS,
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": GENERIC_CLASS,
        ORIGIN: {
            MODEL_FILE: hashlib.sha256(model).hexdigest(),
            TOKENIZER_JSON: hashlib.sha256(fast_json).hexdigest(),
        },
    }
    return {
        TOKENIZER_JSON: fast_json,
        MODEL_FILE: model,
        SPECIAL_TOKENS_MAP: _json(dict(tokenizer.special_tokens)),
        CONFIG_FILE: _json(config),
    }


def _from_hugging_face(tokenizer: HuggingFaceTokenizer) -> dict[str, bytes]:
    contents = tokenizer.files()
    config = json.loads(contents.get(CONFIG_FILE, b"{}"))
    config["tokenizer_class"] = GENERIC_CLASS
    config.setdefault("model_input_names", MODEL_INPUTS)
    if tokenizer.bos_id is not None:  # llama.cpp goes by it, transformers 5 by tokenizer.json
        config["add_bos_token"] = tokenizer.adds_bos
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    contents[CONFIG_FILE] = _json(config)
    if tokenizer.special_tokens:
        contents.setdefault(SPECIAL_TOKENS_MAP, _json(dict(tokenizer.special_tokens)))
    return contents


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
