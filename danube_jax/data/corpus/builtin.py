"""English text that every installation carries, so that a first run needs no download.

    language_reference    the Python language reference, from `pydoc_data.topics`
    docstrings            of the standard library and of the numerical packages installed
    package_descriptions  the long descriptions of the installed distributions

Reading them takes prose out of its surroundings: code, tables, badges and link targets go, and a
paragraph is a line. What there is depends on the versions installed; on one installation the
documents and their order are always the same. The licences are the packages' own.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

DOCSTRING_PACKAGES = (
    "absl",
    "etils",
    "flax",
    "grain",
    "jax",
    "ml_collections",
    "numpy",
    "optax",
    "orbax",
    "rich",
    "scipy",
)
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "testing", "tests")
)
OWN_DISTRIBUTION = "danube-jax"
MIN_CHARACTERS = 80
PIECE_CHARACTERS = 2_000  # long texts are cut, so that held-out documents can come from all of them
MIN_PROSE_WORDS = 8
PROSE_SHARE = 0.9  # letters and spaces in a paragraph; English has about 0.96, code 0.8 and less
PARTS = {"language_reference": 1, "docstrings": 4, "package_descriptions": 1}

WORDS = re.compile(r"(?:[^\W\d_]| )+")
HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
BADGE = re.compile(
    r"\[!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])\](\([^)]*\)|\[[^\]]*\])|!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])"
)
MARKDOWN_LINK = re.compile(
    r"\[([^\[\]\n]+)\]\((?:https?:|mailto:|[#./])(?:[^()\s]|\([^()\s]*\))*\)"
)
RST_LINK = re.compile(r"`([^`<>]+?)\s*<[^<>`]+>`__?")
HTML_TAG = re.compile(
    r"</?(?:a|b|br|center|code|details|div|em|h[1-6]|hr|i|img|kbd|li|ol|p|picture|source|span|strong"
    r"|sub|summary|sup|table|tbody|td|th|thead|tr|ul)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
IMAGE_DIRECTIVE = re.compile(r"\s*\.\. (\|[^|]+\| )?(image|figure|raw)::|\s*\.\. _[^:]+: http")
IMAGE_OPTION = re.compile(r"\s*:(target|alt|width|height|align|scale): ")
LINK_DEFINITION = re.compile(r"\s*\[[^\]]+\]: *(http|<)")
EMPTY_CELLS = re.compile(r"[\s|:-]*\|[\s|]*$")


class Document(NamedTuple):
    """A text and a name that is its own."""

    id: str
    text: str


def documents(source: str, part: int = 0) -> Iterator[Document]:
    """The documents of a part of a built-in source, in an order that is always the same.

    Args:
      source: one of `danube_jax.config.BUILTIN_SOURCES`.
      part: from 0 up to `PARTS[source]`; together the parts hold every document once.
    """
    found = prose(_READERS[source](part))
    return found if source in _WHOLE else cut(found)


def installed(source: str) -> str:
    """What a built-in source depends on, in a line: the same line, the same documents."""
    python = f"Python {platform.python_version()}"
    if source == "language_reference":
        return python
    found = {(d.metadata["Name"], d.version) for d in importlib.metadata.distributions()}
    rows = sorted(row for row in found if row[0] != OWN_DISTRIBUTION)
    return f"{python}, packages {hashlib.sha256(repr(rows).encode()).hexdigest()[:12]}"


def language_reference(part: int = 0) -> Iterator[Document]:
    """The topics of `pydoc`, whole."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"language_reference/{name}", _clean(text))


def docstrings(part: int = 0) -> Iterator[Document]:
    """Docstrings of modules, classes and functions, read from the source without importing it.

    A part has every so manieth file, since parsing them takes a while.
    """
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for name in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(name)
        folders = [] if spec is None else sorted(spec.submodule_search_locations or ())
        roots += [(name, Path(folder)) for folder in folders]
    for name, root in roots:
        for path in _source_files(root)[part :: PARTS["docstrings"]]:
            place = f"{name}/{path.relative_to(root).as_posix()}"
            for qualified_name, text in file_docstrings(path):
                yield Document(f"docstrings/{place}:{qualified_name}", _clean(text))


def package_descriptions(part: int = 0) -> Iterator[Document]:
    """Long descriptions of distributions, without badges and HTML."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = re.sub(r"[-_.]+", "-", metadata["Name"] or "").lower()
        text = metadata["Description"] or metadata.get_payload()
        if name and name != OWN_DISTRIBUTION and isinstance(text, str):
            found.setdefault(name, text)
    for name, text in sorted(found.items()):
        yield Document(f"package_descriptions/{name}", clean_description(text))


def file_docstrings(path: Path) -> list[tuple[str, str]]:
    """(qualified name, dedented docstring) for everything in a file that has one, in its order."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings(), _garbage_collection_off():
            warnings.simplefilter("ignore")
            return list(_walk(ast.parse(source), ()))
    except (SyntaxError, ValueError, RecursionError):
        return []  # templates and files for other versions of Python


def clean_description(text: str) -> str:
    """Drops badges, images, tags of HTML and link targets from Markdown or reST."""
    text = BADGE.sub("", HTML_TAG.sub("", HTML_COMMENT.sub("", text)))
    text = RST_LINK.sub(r"\1", MARKDOWN_LINK.sub(r"\1", text))
    noise = (IMAGE_DIRECTIVE, IMAGE_OPTION, LINK_DEFINITION, EMPTY_CELLS)
    lines = (line.rstrip() for line in text.splitlines())
    return _clean("\n".join(line for line in lines if not any(p.match(line) for p in noise)))


def prose(texts: Iterable[Document]) -> Iterator[Document]:
    """Keeps the paragraphs that are sentences, each on one line; code, tables and headings go."""
    for document in texts:
        paragraphs = (" ".join(p.split()) for p in re.split(r"\n[ \t]*\n", document.text))
        text = "\n\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))
        if len(text) >= MIN_CHARACTERS:
            yield Document(document.id, text)


def _is_prose(paragraph: str) -> bool:
    words = sum(map(len, WORDS.findall(paragraph)))
    return (
        len(paragraph.split()) >= MIN_PROSE_WORDS
        and words >= PROSE_SHARE * len(paragraph)
        and ">>>" not in paragraph
    )


def cut(texts: Iterable[Document]) -> Iterator[Document]:
    """Cuts long documents between paragraphs into pieces of about `PIECE_CHARACTERS`."""
    for document in texts:
        pieces, size = [[]], 0
        for paragraph in document.text.split("\n\n"):
            if size >= PIECE_CHARACTERS:
                pieces.append([])
                size = 0
            pieces[-1].append(paragraph)
            size += len(paragraph)
        for i, piece in enumerate(pieces):
            text = "\n\n".join(piece).strip("\n")
            if len(text) >= MIN_CHARACTERS:
                yield Document(f"{document.id}/{i}", text)


@functools.lru_cache(maxsize=64)
def _source_files(root: Path) -> list[Path]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(paths) if SKIPPED_FOLDERS.isdisjoint(path.parts)]


def _walk(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Docstrings under a node; looks only where a definition can stand."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        names = (*names, node.name) if hasattr(node, "name") else names
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_CHARACTERS:
            yield ".".join(names), text
    for child in getattr(node, "body", ()):
        if isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try
        ):
            yield from _walk(child, names)


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """A syntax tree has no cycles, and looking for some doubles the time of building it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clean(text: str) -> str:
    """Valid UTF-8 without NUL, and never more than two blank lines."""
    text = text.encode("utf-8", "ignore").decode().replace("\0", "").replace("\r\n", "\n")
    return re.sub(r"\n([ \t]*\n){3,}", "\n\n\n", text).strip("\n")


_READERS: dict[str, Callable[[int], Iterator[Document]]] = {
    "language_reference": language_reference,
    "docstrings": docstrings,
    "package_descriptions": package_descriptions,
}
_WHOLE = ("docstrings",)
