"""Files that appear complete or not at all, and checksums."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from danube_jax.errors import UserError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")  # of a process
_ATTEMPTS = 20
_SYNCERS = 8  # they wait for the disk, which takes several at once


@contextlib.contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the disk in the block that name no file, as where it is full, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only once its block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place once the block ends without an error.

    What stood at `output` is replaced; where the block fails, it stays and the temporary goes.

    Raises:
      UserError: the folder cannot be made, or the disk does not take what the block writes into it.
    """
    output = Path(os.path.abspath(output))
    mark = f"{socket.gethostname()}-{os.getpid()}"
    temporary, old = (output.with_name(f".{output.name}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        _clear_leftovers(output)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made: {error.strerror or error}") from None
    try:
        yield temporary
        folders = [folder for folder, _, _ in os.walk(temporary)]
        with ThreadPoolExecutor(_SYNCERS) as syncers:
            list(syncers.map(sync_folder, folders))
        if output.exists():
            os.rename(output, old)
        os.rename(temporary, output)
        sync_folder(output.parent)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # of what is read
        raise UserError(
            f"{output}: cannot be written: {error.strerror or error}; make room or choose another "
            "folder and run the same command again"
        ) from error
    finally:
        if old.exists() and not output.exists():
            os.rename(old, output)
        for leftover in (temporary, old):
            _remove(leftover)


def _remove(folder: Path) -> None:
    """Removes a folder, to which a library's thread may still be adding a last file."""
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _clear_leftovers(output: Path) -> None:
    """Removes what killed processes of this machine left beside `output`.

    One that was killed between its two renames left the old folder under another name.
    """
    pattern = re.compile(
        rf"\.{re.escape(output.name)}\.{re.escape(socket.gethostname())}-(\d+)\.(tmp|old)"
    )
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found is None or _is_running(int(found[1])):
            continue
        if found[2] == "old" and not output.exists():
            os.rename(path, output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one under which `atomic_writer` writes."""
    return _TEMPORARY.fullmatch(name) is not None


def clear_temporaries(folder: Path) -> None:
    """Removes what processes that were killed within `atomic_writer` left in a folder."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def sync_folder(path: str | os.PathLike) -> None:
    """Makes renames inside the folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def sha256_file(path: str | os.PathLike) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hexadecimal SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


SEALED, SEAL = "sealed", "seal"
SUMS = "SHA256SUMS"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with a checksum of itself, which `check_seal` compares when it is read again."""
    plain = json.loads(json.dumps(content)) | {SEALED: "sha256"}
    return plain | {SEAL: sha256_json(plain)}


def check_seal(content: Mapping[str, Any], name: str) -> None:
    """Refuses what `seal` sealed and is no longer the same; what has no seal passes.

    Args:
      content: the JSON as read.
      name: of the file, for the message.

    Raises:
      UserError: a value was changed, or one of the two keys of the seal is missing.
    """
    if SEALED not in content and SEAL not in content:
        return
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEALED not in content or content.get(SEAL) != sha256_json(rest):
        raise UserError(
            f"{name}: is not what was written (its checksum differs): damaged, or edited by hand; "
            f"restore it from a copy, or, where the edit was meant, delete the keys {SEALED!r} and "
            f"{SEAL!r}"
        )


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS (as `sha256sum` does) for the files directly in a folder."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = (f"{sha256_file(path)}  {path.name}\n" for path in paths)
    write_bytes(folder / SUMS, "".join(lines).encode())


def check_sums(folder: Path) -> None:
    """Compares the files of a folder with its SHA256SUMS; one without it passes.

    Raises:
      UserError: a file is missing or is not what was written; names it.
    """
    sums = folder / SUMS
    if not sums.exists():
        return
    mend = f"restore it from a copy, or, where the change was meant, delete {sums}"
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name, digest in expected.items():
            if sha256_file(folder / name) != digest:
                raise UserError(f"{folder / name}: is not what was written: damaged; {mend}")
    except (OSError, ValueError) as error:
        raise UserError(f"{sums}: does not fit the files beside it ({error}); {mend}") from None
