"""Tokenizers in Hugging Face's files, read by transformers without network and without PyTorch.

A `tokenizer.json` is taken as it stands: that is what transformers 4 and the tokenizers library
make of it. transformers 5 builds some classes anew instead, depending on the `model_type` of the
model beside it (a Llama's loses the space in front of a text that begins with one). What is saved
or exported therefore names the generic class, which every version takes as it stands.
"""

import copy
import functools
import hashlib
import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from danube_jax import files as file_tools
from danube_jax.data.control_names import ControlNames, is_shielded
from danube_jax.data.sentencepiece_tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    SPACE,
    read_chat_template,
    read_tokenizer_config,
)
from danube_jax.data.tokenizer_base import CHAT_TEMPLATE_FILE, Tokenizer, with_the_next
from danube_jax.errors import UserError
from danube_jax.interruption import Interrupted

TOKENIZER_JSON = "tokenizer.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ORIGIN = "danube_jax"  # key in tokenizer_config.json: checksums of the files our export wrote
# Files that hold a vocabulary; the first ones are the usual ones.
DEFINING_FILES = (
    TOKENIZER_JSON,
    MODEL_FILE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "added_tokens.json",
    SPECIAL_TOKENS_MAP,
)
GENERIC_CLASS = "PreTrainedTokenizerFast"  # both transformers 4 and 5 know it by this name
GENERIC_CLASSES = (GENERIC_CLASS, "TokenizersBackend")
# Keys of tokenizer_config.json that do not bear on text → ids.
_OTHER_KEYS = {
    *("chat_template", "model_max_length", "padding_side", "name_or_path", "tokenizer_class"),
    *("model_input_names", "add_bos_token"),
    *("backend", "is_local", "local_files_only", "transformers_version", "tokenizer_file"),
    *("extra_special_tokens", "additional_special_tokens", ORIGIN),  # tokenizer.json has them
}
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
_TRIAL = "Tokens, 12 of them:\n\té 漢 🙂"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def _marks(names: ControlNames) -> dict[str, str]:
    """A noncharacter of Unicode for each character that a name begins with."""
    return dict(zip(names.firsts, _NONCHARACTERS, strict=False))


class HuggingFaceTokenizer(Tokenizer):
    """What transformers makes of a folder, or of a `tokenizer.json`."""

    def __init__(self, path: str | os.PathLike):
        """Loads a folder that `AutoTokenizer` reads, or a `tokenizer.json` file.

        A `tokenizer.json` with a `tokenizer_config.json` beside it is read with it; alone, it has
        neither BOS nor EOS.

        Raises:
          UserError: nothing there, damaged, or a tokenizer that needs code of its own.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(
                f"{self.path}: no such file or folder; expected a Hugging Face tokenizer"
            )
        self._folder = self.path if self.path.is_dir() else None
        beside = self.path.parent
        if self.path.name == TOKENIZER_JSON and (beside / CONFIG_FILE).is_file():
            self._folder = beside
        config = read_tokenizer_config(self._folder) if self._folder else {}
        loaded = _load(self.path, self._folder, config)
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{self.path}: {type(loaded).__name__} is not backed by the tokenizers library; "
                "expected a folder with a tokenizer.json"
            )
        self._markup, self._plain = copy.deepcopy(backend), copy.deepcopy(backend)
        for tokenizer, plain in ((self._markup, False), (self._plain, True)):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = plain
        if self._spells_control_tokens():
            self._plain = self._renamed
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise UserError(f"{self.path}: the vocabulary is empty; expected a tokenizer")
        self.bos_id, self.eos_id = loaded.bos_token_id, loaded.eos_token_id
        candidates = (loaded.pad_token_id, loaded.unk_token_id, self.eos_id, 0)
        self.pad_id = next(i for i in candidates if i is not None)
        added = backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | set(loaded.all_special_ids)
        self.special_ids = frozenset(special)
        self.special_tokens = {
            name: token
            for name, token in loaded.special_tokens_map.items()
            if isinstance(token, str)
        }
        template = loaded.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.chat_template = template
        if template is None and self._folder is not None:
            self.chat_template = read_chat_template(self._folder, config)
        self.adds_bos = self.bos_id is not None and self.encode_prompt("a")[:1] == [self.bos_id]
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """SHA-256 over what bears on text → ids; chat template and context length do not."""
        contents = self.files()
        config = json.loads(contents.get(CONFIG_FILE, b"{}"))
        sums = {
            name: hashlib.sha256(data).hexdigest()
            for name, data in contents.items()
            if name in DEFINING_FILES and name != SPECIAL_TOKENS_MAP
        }
        essential = {
            key: value
            for key, value in config.items()
            if key not in _OTHER_KEYS and not key.endswith("_token")
        }
        return file_tools.sha256_json(
            {
                "files": sums,
                "config": essential | {"tokenizer_class": GENERIC_CLASS},
                "frame": [self.bos_id, self.eos_id, self.adds_bos],
                "special": sorted(self.special_ids),
            }
        )

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return self._frame(ids, bos, eos)

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int = 0
    ) -> list[list[int]]:
        if threads == 1:
            return [self.encode(text, bos=bos, eos=eos) for text in texts]
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._frame(one.ids, bos, eos) for one in encoded]

    def encode_markup(self, text: str) -> list[int]:
        return self._encode_markup(text).ids

    def encode_markup_spans(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._encode_markup(text)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        ends = with_the_next(ends, begins == ends).tolist()
        return encoding.ids, ends

    def _spells_control_tokens(self) -> bool:
        """Whether plain text can become a control token by its vocabulary, as Unigram's can."""
        names = self._control_names.names
        texts = [text for name in names for text in (name, f"a {name} b", f"a{name}b")]
        ids = {self._markup.token_to_id(name) for name in names}
        encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return any(ids & set(one.ids) for one in encoded)

    def _encode_markup(self, text: str) -> tokenizers.Encoding:
        if not is_shielded(text):
            return self._markup.encode(text, add_special_tokens=False)
        names, marks = self._control_names, _marks(self._control_names)
        strange = next((mark for mark in marks.values() if mark in text), None)
        if strange is not None:
            raise UserError(
                f"a text holds U+{ord(strange):04X}, which is no character, beside the name of a "
                "control token; expected it without"
            )
        text = names.unshield(names.mark(text, marks))
        return self._renamed.encode(text, add_special_tokens=False)

    def control_names(self) -> ControlNames:
        return self._control_names

    @functools.cached_property
    def _control_names(self) -> ControlNames:
        added = self._markup.get_added_tokens_decoder().values()
        return ControlNames(token.content for token in added if token.special)

    @functools.cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with marks for the first characters of its control tokens' names.

        Under these names they are what they were; the names that people write mean nothing to it.
        """
        spec, names = json.loads(self._markup.to_str()), self._control_names
        new = {name: names.mark(name, _marks(names)) for name in names.names}
        for token in spec["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {new.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[new.get(piece, piece), *rest] for piece, *rest in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
        renamed = tokenizers.Tokenizer.from_str(json.dumps(spec))
        for old, name in new.items():
            ids = [
                tokenizer.encode(text, add_special_tokens=False).ids
                for tokenizer, text in ((self._markup, old), (renamed, name))
            ]
            if ids[0] != ids[1]:
                raise UserError(
                    f"{self.path}: cannot tell the control token {old!r} from a text that spells "
                    "it; expected messages that do not"
                )
        return renamed

    def encode_prompt(self, text: str) -> list[int]:
        return self._markup.encode(text).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids]
        return self._markup.decode(known)

    def piece(self, token_id: int) -> str:
        return self._markup.id_to_token(int(token_id)) or ""

    def token_byte_lengths(self) -> np.ndarray:
        return self._byte_lengths.copy()

    @functools.cached_property
    def _byte_lengths(self) -> np.ndarray:
        spec = json.loads(self._markup.to_str())
        kinds = set(_types(spec["decoder"])) | set(_types(spec["pre_tokenizer"]))
        pieces = "Metaspace" in kinds or SPACE in json.dumps(spec["decoder"], ensure_ascii=False)
        if "ByteLevel" not in kinds and not pieces:
            raise UserError(
                f"{self.path}: cannot tell how many bytes a token stands for; expected byte-level "
                "BPE or a tokenizer in the manner of SentencePiece"
            )
        added = {token["id"] for token in spec["added_tokens"]}
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in set(range(self.vocab_size)) - self.special_ids:
            piece = self.piece(i)
            if i in added:
                lengths[i] = len(piece.encode())
            elif "ByteLevel" in kinds:
                lengths[i] = len(piece)  # one character a byte
            elif _BYTE_PIECE.fullmatch(piece) and "ByteFallback" in kinds:
                lengths[i] = 1
            else:
                lengths[i] = len(piece.replace(SPACE, " ").encode())
        return lengths

    def files(self) -> dict[str, bytes]:
        if self._folder is None:
            out = {TOKENIZER_JSON: self.path.read_bytes()}
        else:
            names = (*DEFINING_FILES, CONFIG_FILE)
            found = [self._folder / name for name in names]
            out = {path.name: path.read_bytes() for path in found if path.is_file()}
        if TOKENIZER_JSON not in out:
            out[TOKENIZER_JSON] = self._markup.to_str(pretty=True).encode()
        if CONFIG_FILE in out or self.special_tokens:
            out[CONFIG_FILE] = self._generic_config(out.get(CONFIG_FILE, b"{}"))
        if self.chat_template is not None:
            out[CHAT_TEMPLATE_FILE] = self.chat_template.encode()
        elif CONFIG_FILE in out:
            config = json.loads(out[CONFIG_FILE])
            if config.pop("chat_template", None) is not None:
                out[CONFIG_FILE] = json.dumps(config, indent=2, ensure_ascii=False).encode()
        return out

    def _generic_config(self, stored: bytes) -> bytes:
        """tokenizer_config.json with the generic class, and the special tokens of its own class."""
        config = json.loads(stored)
        if config.get("tokenizer_class") in GENERIC_CLASSES:
            return stored
        config["tokenizer_class"] = GENERIC_CLASS
        for name in _SPECIAL_NAMES:
            if name in self.special_tokens and config.get(name) is None:
                config[name] = self.special_tokens[name]
        return json.dumps(config, indent=2, ensure_ascii=False).encode()


def is_made_of_sentencepiece(folder: Path) -> bool:
    """Whether our own export made `tokenizer.json` from `tokenizer.model`, and neither changed."""
    origin = read_tokenizer_config(folder).get(ORIGIN)
    names = (MODEL_FILE, TOKENIZER_JSON)
    return isinstance(origin, dict) and all(
        (folder / name).is_file() and file_tools.sha256_file(folder / name) == origin.get(name)
        for name in names
    )


def is_changed_since_export(folder: Path) -> bool:
    """Whether a file that our own export wrote into `folder` is there with other contents."""
    origin = read_tokenizer_config(folder).get(ORIGIN)
    return isinstance(origin, dict) and any(
        (folder / name).is_file() and file_tools.sha256_file(folder / name) != origin.get(name)
        for name in (MODEL_FILE, TOKENIZER_JSON)
    )


def _load(path: Path, folder: Path | None, config: dict) -> Any:
    """The object of transformers, without network."""
    from transformers import PreTrainedTokenizerFast

    try:
        if folder is None:
            return _tried(PreTrainedTokenizerFast(tokenizer_file=str(path)))
        if "auto_map" in config:
            raise UserError(
                f"{folder}: the tokenizer needs Python code of its own (auto_map), which is not "
                "run; expected a plain tokenizer.json"
            )
        if (folder / TOKENIZER_JSON).is_file():
            return _tried(
                PreTrainedTokenizerFast.from_pretrained(
                    str(folder), local_files_only=True, **_class_defaults(folder, config)
                )
            )
        from transformers import AutoTokenizer

        return _tried(
            AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        )
    except (UserError, Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain ones, and the panics of a library in Rust
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as a tokenizer ({reason}); expected files that transformers' "
            "AutoTokenizer loads"
        ) from None


def _tried(loaded: Any) -> Any:
    """The tokenizer, once it has encoded and decoded a little."""
    loaded.decode(loaded(_TRIAL)["input_ids"])
    vocabulary = loaded.get_vocab()
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError("two pieces of the vocabulary have one id")
    return loaded


def _class_defaults(folder: Path, config: dict) -> dict[str, str]:
    """Special tokens that the folder leaves to its tokenizer's class, such as Llama's `</s>`."""
    import transformers

    kind = config.get("tokenizer_class")
    if kind is None or kind in GENERIC_CLASSES:
        return {}
    path = folder / SPECIAL_TOKENS_MAP
    stated = {**(json.loads(path.read_bytes()) if path.is_file() else {}), **config}
    kind = getattr(transformers, kind, None) or getattr(transformers, f"{kind}Fast", None)
    parameters = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    defaults = {name: parameters[name].default for name in _SPECIAL_NAMES if name in parameters}
    missing = {name: t for name, t in defaults.items() if isinstance(t, str) and name not in stated}
    if missing:  # a token that the vocabulary lacks would be added to it
        vocabulary = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        missing = {n: t for n, t in missing.items() if vocabulary.token_to_id(t) is not None}
    return missing


def _types(node: Any) -> list[str]:
    """The types of a node of tokenizer.json and of all nodes in it."""
    if isinstance(node, dict):
        inner = [kind for value in node.values() for kind in _types(value)]
        return [node["type"], *inner] if isinstance(node.get("type"), str) else inner
    if isinstance(node, list):
        return [kind for item in node for kind in _types(item)]
    return []
