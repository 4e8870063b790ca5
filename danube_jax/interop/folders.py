"""Folders to write to."""

from pathlib import Path

from danube_jax.errors import UserError


def check_output(output: Path, overwrite: bool, flag: str = "--output") -> None:
    """Makes sure that a folder may be written.

    Raises:
      UserError: it is a file, or holds something and `overwrite` is False.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{flag}={output}: is a file; expected a folder to make")
    if any(output.iterdir()) and not overwrite:
        raise UserError(f"{flag}={output}: is not empty; choose another, or pass --overwrite")
