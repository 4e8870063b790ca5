"""Files that appear complete or not at all."""

import os
from pathlib import Path

from danube_jax.errors import UserError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside `path`, syncs it, and renames it into place.

    Raises:
      UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
