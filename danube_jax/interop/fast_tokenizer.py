"""A SentencePiece BPE model as a `tokenizers.Tokenizer` that gives the same ids.

How SentencePiece segments, and what stands for it:

- It merges the pair whose piece has the highest score, the leftmost among equals. `tokenizers`
  merges by rank, so each piece contributes every split of it into two pieces, ordered by the
  piece's score. Among equal scores (the runs of spaces in Mistral's model all have one) the longest
  result comes first, and then the longest left part: a run grows from its left end, as it does
  where the leftmost pair wins.
- It puts a space before the text where the model says so (`add_dummy_prefix`), also before a text
  that begins with a space. That is a normaliser here; the pre-tokeniser `Metaspace` would leave
  such texts alone.
- User-defined symbols are cut out after normalisation, so that no space comes between; they are
  words of their own, and taken whole.
- Characters outside the vocabulary are spelt in bytes, or stand for one unknown token together.

Control tokens are recognised in text, as everywhere in Hugging Face's world; each part between them
gets a space of its own in front, as Llama's and Mistral's published tokenizers do.
"""

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from danube_jax.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer
from danube_jax.errors import UserError

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_Trainer = sentencepiece_model_pb2.TrainerSpec

# Runs of these lengths are compared with SentencePiece before a conversion counts as done.
_RUN_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 23, 31, 32, 33, 47, 65)
_HARD_TEXTS = (
    "",
    " ",
    "a",
    "Hello  world",
    "  leading and trailing  ",
    "line\nline\r\n\n\n\tTab\t\tTabs \u00a0 no-break",
    "\u2581 is the mark of a space\u2581\u2581",
    "naïve café cafe\u0301 Ångström \u1e9b\u0323 \ufb01 ½ \uff12",
    "漢字かな交じり文 한국어 العربية עברית हिन्दी ไทย",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🙂🏽 🇩🇪",
    "\x00\x01\x7f\x1b[0m\ufeff\ufffd\ue000\U0010ffff",
    "def f(x):\n    return x ** 2  # 1234567890\n\n\n        if x:\n",
    "<0x0A> <|prompt|>Why?<|answer|>",
)


def to_fast_tokenizer(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Converts a SentencePiece BPE model.

    Args:
      tokenizer: a BPE model with identity normalisation.

    Raises:
      UserError: the model has something that `tokenizers` cannot do in just the same way, named;
        or its ids differ on one of a set of hard texts.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.files()["tokenizer.model"])
    _check_convertible(proto, tokenizer)
    pieces = proto.pieces
    fast = tokenizers.Tokenizer(
        models.BPE(
            {piece.piece: i for i, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=tokenizer.special_tokens.get("unk_token"),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            ignore_merges=any(piece.type == _Piece.USER_DEFINED for piece in pieces),
        )
    )
    fast.add_special_tokens(
        [
            tokenizers.AddedToken(pieces[i].piece, normalized=False, special=True)
            for i in sorted(tokenizer.special_ids)
        ]
    )
    fast.normalizer = _normalizer(proto.normalizer_spec)
    split = _user_defined_split(pieces)
    if split is not None:
        fast.pre_tokenizer = split
    fast.decoder = _decoder(proto)
    bos = tokenizer.special_tokens["bos_token"]
    first = f"{bos} " if tokenizer.adds_bos else ""
    second = f"{bos}:1 " if tokenizer.adds_bos else ""
    fast.post_processor = processors.TemplateProcessing(
        single=f"{first}$A",
        pair=f"{first}$A {second}$B:1",
        special_tokens=[(bos, tokenizer.bos_id)],
    )
    _check_same(fast, tokenizer, pieces)
    return fast


def _check_convertible(
    proto: sentencepiece_model_pb2.ModelProto, tokenizer: SentencePieceTokenizer
) -> None:
    """Refuses, by name, what has no exact counterpart."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = _Trainer.ModelType.Name(trainer.model_type).lower()
    defined = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED]
    refused = {
        f"a {kind} model (only BPE is converted)": kind != "bpe",
        f"the normaliser {normalizer.name or 'of its own'!r} (only 'identity' is converted)": (
            bool(normalizer.precompiled_charsmap) or bool(normalizer.normalization_rule_tsv)
        ),
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "a denormaliser": bool(proto.denormalizer_spec.precompiled_charsmap),
        "unused pieces": any(piece.type == _Piece.UNUSED for piece in proto.pieces),
        "a user-defined symbol with a space in it": any(" " in piece for piece in defined),
        "user-defined symbols beside remove_extra_whitespaces": bool(
            defined and normalizer.remove_extra_whitespaces
        ),
        "user-defined symbols beside pieces that hold '<0'": bool(defined)
        and any("<0" in piece.piece for piece in proto.pieces if piece.type == _Piece.NORMAL),
    }
    for what, there in refused.items():
        if there:
            raise UserError(
                f"{tokenizer.model_path}: has {what}, which tokenizer.json cannot express with the "
                "same ids; expected a BPE model such as Llama's, Mistral's or ours"
            )


def _merges(pieces: list) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which they are to be merged."""
    usable = {
        piece.piece: i
        for i, piece in enumerate(pieces)
        if piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED)
    }
    ranked = []
    for text in usable:
        piece = pieces[usable[text]]
        if piece.type == _Piece.USER_DEFINED:
            continue
        for k in range(1, len(text)):
            left, right = text[:k], text[k:]
            if left in usable and right in usable:
                ranked.append((-piece.score, -len(text), usable[text], -k, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> normalizers.Normalizer:
    steps = []
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(SPACE + r"+\z"), ""))
    return normalizers.Sequence(steps)


def _user_defined_split(pieces: list) -> pre_tokenizers.PreTokenizer | None:
    """Cuts out user-defined symbols, the longest first, as SentencePiece matches them.

    What is left between them is looked up whole before it is merged; a text that only looks like a
    byte piece ("<0x0A>") must not be found then, and is cut where no piece reaches across.
    """
    symbols = [piece.piece for piece in pieces if piece.type == _Piece.USER_DEFINED]
    if not symbols:
        return None
    symbols.sort(key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(_escape, symbols)))
    byte_piece = tokenizers.Regex(r"\A<(?=0x[0-9A-F]{2}>\z)")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.Split(byte_piece, "isolated")]
    )


def _escape(text: str) -> str:
    """`text` as a pattern of the Oniguruma library."""
    return "".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() or not c.isascii() else c for c in text)


def _decoder(proto: sentencepiece_model_pb2.ModelProto) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 2**31 - 1, 0))
    elif proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _check_same(fast: tokenizers.Tokenizer, tokenizer: SentencePieceTokenizer, pieces) -> None:
    """Compares ids on hard texts, on runs of characters, and on every user-defined symbol."""
    texts = [*_HARD_TEXTS]
    runs = {" ", "\n", "\t", "a", "-", "=", "漢"}
    runs |= {
        piece.piece[0] for piece in pieces if len(piece.piece) > 2 and len(set(piece.piece)) == 1
    }
    texts += [
        before + run * n + after
        for run in sorted(runs)
        for n in _RUN_LENGTHS
        for before, after in (("", ""), ("x", "y"))
    ]
    defined = [piece.piece for piece in pieces if piece.type == _Piece.USER_DEFINED]
    texts += [f"{symbol}a {symbol} {symbol}{symbol}<0x0A>{symbol}b" for symbol in defined]
    if defined:  # a whole segment is looked up before merging: it must be what merging gives
        texts += [
            defined[0] + piece.piece.replace(SPACE, " ")
            for piece in pieces
            if piece.type == _Piece.NORMAL
        ]
    for text, expected in zip(texts, tokenizer.model.encode(texts), strict=True):
        if fast.encode(text, add_special_tokens=False).ids != expected:
            raise UserError(
                f"{tokenizer.model_path}: cannot be converted to tokenizer.json with the same ids; "
                f"they differ on {text!r}"
            )
