"""Command lines with absl flags: `--help` with an example, and one clear line for a mistake."""

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import ml_collections
from absl import flags
from absl import logging as absl_logging

from danube_jax.config import RunConfig, parse_config
from danube_jax.console import warn
from danube_jax.errors import UserError, exit_on_user_error
from danube_jax.interruption import Interrupted, exit_on_signal, leave


def parse_flags(
    argv: Sequence[str],
    doc: str | None,
    *,
    required: Sequence[str] = (),
    positional: bool = False,
) -> list[str]:
    """Parses `argv` into absl's flags.

    Args:
      argv: the program's name and its arguments.
      doc: the entry point's docstring, shown by `--help`.
      required: flags that must be given.
      positional: whether arguments that are no flags are wanted.

    Returns:
      The arguments that are no flags.

    Raises:
      UserError: an unknown flag, a bad value, a missing or broken config file, stray words, or
        bytes that are not UTF-8.
    """
    _refuse_other_bytes(argv)
    if {"--help", "-help", "-h", "--helpfull"} & set(argv[1:]):
        print((doc or "").strip(), end="\n\nFlags:\n")
        own = flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag(_any_flag()))
        print(own.strip().partition("\n")[2])  # without the module's name
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(list(argv))
        for name in required:
            if flags.FLAGS[name].value is None:
                raise UserError(f"--{name} is needed; --help shows an example")
    except UserError:
        raise
    except Exception as error:  # a config file may raise anything while it is read
        raise UserError(_one_line(error)) from error
    if len(rest) > 1 and not positional:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    return rest[1:]


def _refuse_other_bytes(argv: Sequence[str]) -> None:
    """Refuses what Python could only read into halves of surrogate pairs.

    No tokenizer takes them, and none of the files that we write.
    """
    for argument in argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = ascii(argument[max(0, error.start - 40) : error.end])
            raise UserError(
                f"an argument is not UTF-8, as its part {shown} shows; expected UTF-8"
            ) from None


def _any_flag() -> str:
    """A flag of the main module, by which absl finds its help text."""
    main = [
        f.name
        for m, fs in flags.FLAGS.flags_by_module_dict().items()
        for f in fs
        if m in ("__main__", sys.argv[0])
    ]
    return main[0] if main else "help"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    unknown = re.search(r'Key "?([\w.]+)"? does not exist', text)
    if unknown:
        meant = re.search(r'Did you mean "(\w+)"', text)
        hint = f"; did you mean {meant[1]!r}?" if meant else "; danube_jax/config.py lists the keys"
        return f"config: unknown key {unknown[1]!r}{hint}"
    if isinstance(error, FileNotFoundError):
        return f"{text}; --config takes a Python file such as configs/demo.py"
    if " " not in text:  # a KeyError says no more than the key
        text = f"the config file raised {type(error).__name__} {text}".rstrip()
        return f"{text}; expected a get_config() as in configs/demo.py"
    return text


def read_config(holder: flags.FlagHolder) -> RunConfig:
    """The validated config of a `--config` flag.

    Raises:
      UserError: the file is missing or broken, or what it says is not possible.
    """
    return parse_config(config_dict(holder))


def config_dict(holder: flags.FlagHolder) -> Mapping[str, Any]:
    """What the file of a `--config` flag returned.

    Raises:
      UserError: the file is missing or broken.
    """
    config = holder.value
    if not isinstance(config, ml_collections.ConfigDict):
        try:  # ml_collections keeps a file's error until the config is used
            config = config.to_dict()
        except Exception as error:  # whatever the file raised
            raise UserError(_one_line(error)) from error
    return config


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs an entry point and exits with its status.

    Libraries' own logs of errors are silenced: those errors also reach the entry point, as
    exceptions, and the user reads them once.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    # Or transformers says in every chat that PyTorch is missing, which only conversion needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: _on_background_error(args.exc_value)
    sys.unraisablehook = lambda args: _on_background_error(args.exc_value)
    sys.excepthook = _on_error
    try:
        with exit_on_user_error(), exit_on_signal():
            status = main(sys.argv)
    except SystemExit as error:
        status = error.code
    leave(status)


def _on_error(kind: type, error: BaseException, traceback: TracebackType | None) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, traceback)
    else:
        _on_background_error(error)


def _on_background_error(error: BaseException | None) -> None:
    """One line, and none for callbacks that come after a failed save has ended its event loop."""
    if isinstance(error, Interrupted):
        return  # raised while an object was finalised, which goes no further; it comes again
    if "Event loop is closed" not in str(error):
        warn(f"in the background: {' '.join(str(error).split())[:300]}")
