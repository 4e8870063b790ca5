"""Flags of the commands that generate text, and the settings they come to with a model's own."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from danube_jax.errors import UserError

flags.disclaim_key_flags()  # the flags belong to the entry point that defines them

DTYPES = ("auto", "bfloat16", "float32")
GENERATE_DEFAULTS = {"max_tokens": 256, "temperature": 0.0}
# Danube's chat checkpoints ship a repetition penalty of 1.1 and no sampling settings.
CHAT_DEFAULTS = {
    "max_tokens": 512,
    "temperature": 0.7,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
}
_HELP = {
    "max_tokens": "Most new tokens of an answer.",
    "temperature": "0 takes the likeliest token; higher is more random.",
    "top_p": "Draw among the likeliest tokens that together hold this probability.",
    "top_k": "Draw among the k likeliest tokens; 0 among all.",
    "min_p": "Draw among tokens at least this share as likely as the likeliest.",
    "repetition_penalty": "Above 1: tokens that were there already become less likely.",
    "seed": "Seed of the random draws.",
}
_INTEGERS = ("max_tokens", "top_k", "seed")
SETTINGS = tuple(_HELP)
_TRANSFORMERS_TOP_K = 50  # what transformers draws among where a model's file does not say


def define_flags(defaults: Mapping[str, float]) -> None:
    """Defines a flag a setting; None stands for the model's own value, or else the default."""
    for name, text in _HELP.items():
        value = defaults.get(name)
        if name != "seed":
            text += " Default: the model's generation_config.json"
            text += "." if value is None else f", else {value}."
        if name in _INTEGERS:
            flags.DEFINE_integer(name, None, text)
        else:
            flags.DEFINE_float(name, None, text)
    flags.DEFINE_enum("dtype", "auto", DTYPES, "Of weights; auto: float32 on a CPU, else bfloat16.")
    flags.DEFINE_enum("cache_dtype", "auto", DTYPES, "Of cached keys and values; auto: as dtype.")


def dtype() -> str:
    """One of `DTYPES`, from the command line."""
    return flags.FLAGS["dtype"].value


def cache_dtype() -> str:
    """One of `DTYPES`, from the command line."""
    return flags.FLAGS["cache_dtype"].value


def given_settings() -> dict[str, float]:
    """The settings that stand on the command line."""
    values = {name: flags.FLAGS[name].value for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def resolve_settings(
    given: Mapping[str, float], generation: Mapping[str, Any], defaults: Mapping[str, float]
) -> dict[str, float]:
    """Settings by name: `given` before the model's `generation_config.json` before `defaults`.

    As in transformers, temperature, top_k, top_p and min_p of that file count where it says
    `do_sample: true`, and `do_sample: false` is greedy.
    """
    settings = dict(defaults)
    sampled = generation.get("do_sample")
    own = {
        "repetition_penalty": generation.get("repetition_penalty"),
        "max_tokens": generation.get("max_new_tokens"),
    }
    if sampled is True:
        own |= {name: generation.get(name) for name in ("top_p", "min_p")}
        for name, absent in (("temperature", 1.0), ("top_k", _TRANSFORMERS_TOP_K)):
            value = generation.get(name)
            own[name] = absent if value is None else value
    elif sampled is False:
        own["temperature"] = 0.0
    for name, value in own.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"generation_config.json: {name} is {value!r}; expected a number")
        settings[name] = value
    return settings | dict(given)


def parse_setting(name: str, text: str) -> int | float:
    """The value of a setting typed by a user.

    Raises:
      UserError: no such setting, or no number.
    """
    if name not in SETTINGS:
        raise UserError(f"there is no setting {name!r}; expected one of {', '.join(SETTINGS)}")
    try:
        return int(text) if name in _INTEGERS else float(text)
    except ValueError:
        kind = "a whole number" if name in _INTEGERS else "a number"
        raise UserError(f"{name}: {text!r} is not possible; expected {kind}") from None
