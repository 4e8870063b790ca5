"""From documents to token stores: held-out split, tokenizer, framing."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax import files
from danube_jax.config import BUILTIN_SOURCES, RunConfig
from danube_jax.console import progress
from danube_jax.data.corpus import builtin
from danube_jax.data.corpus.builtin import Document
from danube_jax.data.token_store import TokenStore, is_finished
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer, train_bpe
from danube_jax.errors import UserError

PLAN = "preparation.json"
PLAN_VERSION = 1
TOKENIZER = "tokenizer.model"
PARTS = ("train", "heldout")
CHUNK_DOCUMENTS = 256
SHINGLE_WORDS = 8
MIN_HELDOUT = 16  # documents, where that is no more than a tenth of them
NEAR_COPY = 0.3  # share of a held-out document's shingles that training text may hold


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Where a run's data is.

    Attributes:
      train: source name → folder of its training store.
      heldout: source name → folder of its held-out store, for sources that have one.
      tokenizer: the tokenizer's file or folder.
    """

    train: Mapping[str, str]
    heldout: Mapping[str, str]
    tokenizer: str


def prepare_builtin(run: RunConfig, directory: str | Path) -> PreparedData:
    """Makes token stores of the run's built-in sources; sources with paths are passed through.

    Writes `tokenizer.model`, where one is to be trained, and `SOURCE/train` and `SOURCE/heldout`.
    The tokenizer is trained on the training part alone. A second call finds everything done; after
    a killed one it goes on where that stopped.

    Args:
      run: the config.
      directory: folder of the prepared data.

    Raises:
      UserError: the directory holds data of other settings, or there is nothing to train a
        tokenizer on.
    """
    directory = Path(directory)
    chosen = {name: source.builtin for name, source in run.data.sources.items() if source.builtin}
    repeated = [kind for kind in set(chosen.values()) if [*chosen.values()].count(kind) > 1]
    if repeated:
        raise UserError(
            f"config.data.sources: built-in text {repeated[0]!r} is used by more than one source; "
            "expected one, or its held-out part would be trained on"
        )
    vocab_size = run.data.tokenizer.train_vocab_size
    if vocab_size and not chosen:
        raise UserError(
            "config.data.tokenizer.train_vocab_size: there is no built-in source to train on; "
            "expected tokenizer.path or tokenizer.builtin"
        )
    tokenizer = None if vocab_size else load_tokenizer(run.data.tokenizer)
    model = directory / TOKENIZER if tokenizer is None else tokenizer.path
    prepared = _resolve(run, directory, model)
    if not chosen:
        return prepared
    if tokenizer is not None:
        tokenizer.framing()  # refuses a tokenizer that cannot tell documents apart
    settings = {
        "version": PLAN_VERSION,
        "sources": chosen,
        "heldout_fraction": run.data.heldout_fraction,
        "tokenizer": tokenizer.fingerprint if tokenizer else f"trained, {vocab_size} ids",
    }
    plan = _read_plan(directory, settings)
    stores = {(name, part): directory / name / part for name in chosen for part in PARTS}
    if plan and model.exists() and all(map(is_finished, stores.values())):
        _say(f"data: already prepared in {directory}")
        return prepared
    split = _split_documents(chosen, run.data.heldout_fraction)
    _check_plan(directory, plan, settings, split)
    if tokenizer is None:
        tokenizer = _trained_tokenizer(model, vocab_size, split)
    for (name, part), path in stores.items():
        if not is_finished(path):
            _write_store(path, split[name, part], tokenizer, chosen[name], part)
    _say(f"data: prepared in {directory}")
    for (name, part), path in stores.items():
        store = TokenStore.open(path)
        _say(
            f"  {name}/{part}: {store.documents:,} documents, {store.bytes / 1e6:.2f} MB, "
            f"{store.tokens:,} tokens, {store.bytes / store.tokens:.2f} bytes a token"
        )
    return prepared


def split_heldout(
    texts: Iterable[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits documents by hash and shuffles each part.

    Where a document goes and where it stands depends on its id and text; a small source holds out
    `MIN_HELDOUT` documents, and each part gets one at least.

    Args:
      texts: documents, two at least.
      fraction: about this share of them is held out.

    Returns:
      (training, held-out) documents.
    """
    ranked = sorted((_hash("heldout", text), text) for text in texts)
    if len(ranked) < 2:
        raise UserError(f"{len(ranked)} documents cannot be split; expected two at least")
    bound = int(fraction * 2**64)
    cut = sum(rank < bound for rank, _ in ranked)
    cut = min(max(cut, 1, min(MIN_HELDOUT, len(ranked) // 10)), len(ranked) - 1)

    def shuffled(part: list[tuple[int, Document]]) -> list[Document]:
        return [text for _, text in sorted((_hash("order", text), text) for _, text in part)]

    return shuffled(ranked[cut:]), shuffled(ranked[:cut])


def drop_near_copies(heldout: Sequence[Document], train: Iterable[Document]) -> list[Document]:
    """Drops held-out documents much of whose text stands in the training documents too.

    A document goes when more than `NEAR_COPY` of its runs of eight words occur in one or another
    training document; where all would go, the least alike stays.
    """
    shingles = [set(_shingles(text)) for text in heldout]
    wanted = set().union(*shingles)
    found = set()
    for text in train:
        found |= wanted.intersection(_shingles(text))
    alike = [len(own & found) / max(1, len(own)) for own in shingles]
    bound = max(NEAR_COPY, min(alike))
    return [text for text, share in zip(heldout, alike, strict=True) if share <= bound]


def _shingles(text: Document) -> Iterable[tuple[str, ...]]:
    """Runs of eight words, or the few words there are."""
    words = re.findall(r"\w+", text.text.casefold())
    size = max(1, min(SHINGLE_WORDS, len(words)))
    return zip(*(words[i:] for i in range(size)), strict=False)


def _hash(purpose: str, text: Document) -> int:
    data = json.dumps([purpose, *text]).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _resolve(run: RunConfig, directory: Path, model: Path) -> PreparedData:
    train, heldout = {}, {}
    for name, source in run.data.sources.items():
        folder = directory / name
        train[name] = str(folder / "train") if source.builtin else source.path
        heldout[name] = str(folder / "heldout") if source.builtin else source.heldout_path
    return PreparedData(train, {k: path for k, path in heldout.items() if path}, str(model))


def _read_plan(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier preparation noted; refused where its settings differ."""
    path = directory / PLAN
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in settings if plan["settings"].get(key) != settings[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); delete {directory}") from None
    if changed:
        key = changed[0]
        raise UserError(
            f"{directory}: was prepared with {key} {plan['settings'].get(key)!r}, the config asks "
            f"for {settings[key]!r}; delete it or set config.data.directory to another folder"
        )
    return plan


def _split_documents(
    chosen: Mapping[str, str], fraction: float
) -> dict[tuple[str, str], list[Document]]:
    """(source, part) → documents; every paragraph of some length is in one place only."""
    seen: set[bytes] = set()
    split = {}
    with progress("read built-in text", len(chosen), "sources") as advance:
        for name in sorted(chosen, key=lambda name: BUILTIN_SOURCES.index(chosen[name])):
            train, heldout = split_heldout(builtin.documents(chosen[name], seen), fraction)
            split[name, "train"], split[name, "heldout"] = train, heldout
            advance(1)
    train = [text for (_, part), texts in split.items() if part == "train" for text in texts]
    for name in chosen:
        split[name, "heldout"] = drop_near_copies(split[name, "heldout"], train)
    return split


def _check_plan(
    directory: Path,
    plan: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    split: Mapping[tuple[str, str], list[Document]],
) -> None:
    """Notes what is to be prepared, or compares it with what a killed preparation noted."""
    digest = hashlib.sha256()
    for key, texts in sorted(split.items()):
        digest.update(json.dumps([key, texts]).encode())
    if plan is None:
        files.write_json(
            directory / PLAN, {"settings": settings, "text_sha256": digest.hexdigest()}
        )
    elif plan.get("text_sha256") != digest.hexdigest():
        raise UserError(
            f"{directory}: the installed packages changed since its preparation began; delete it "
            "to start anew"
        )


def _trained_tokenizer(
    path: Path, vocab_size: int, split: Mapping[tuple[str, str], list[Document]]
) -> Tokenizer:
    if path.is_file():
        return open_tokenizer(path)
    texts = [text.text for (_, part), group in split.items() if part == "train" for text in group]
    megabytes = sum(map(len, texts)) / 1e6
    _say(f"data: training a tokenizer of {vocab_size:,} ids on {megabytes:.1f} M characters")
    return train_bpe(texts, path, vocab_size)


def _write_store(
    path: Path, texts: list[Document], tokenizer: Tokenizer, source: str, part: str
) -> TokenStore:
    provenance = {
        "source": f"built-in text {source!r}, {part} part",
        "steps": [
            "repeated paragraphs dropped",
            "held-out documents split off by hash, without near copies of training text",
            "documents shuffled by hash",
            f"each framed by {tokenizer.framing()}",
        ],
        "python": sys.version.split()[0],
    }
    total = sum(len(text.text) for text in texts)
    with (
        progress(f"tokenise {path.parent.name}/{part}", total, "MB") as advance,
        TokenStoreWriter(
            path,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            provenance=provenance,
        ) as writer,
    ):
        done = writer.documents_done
        advance(sum(len(text.text) for text in texts[:done]))
        for begin in range(done, len(texts), CHUNK_DOCUMENTS):
            plain = [text.text for text in texts[begin : begin + CHUNK_DOCUMENTS]]
            for text, ids in zip(
                plain, tokenizer.encode_batch(plain, bos=True, eos=True), strict=True
            ):
                writer.add(ids, len(text.encode()))
            advance(sum(map(len, plain)))
        return writer.finish()
