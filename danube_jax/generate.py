"""Continue a text, or answer a question, with a trained model.

Example:
  python -m danube_jax.generate --model=runs/demo --prompt="The river" --temperature=0.8
  python -m danube_jax.generate --model=DIR --chat --prompt="Why is drinking water so healthy?"
  python -m danube_jax.generate --model=DIR --batch_file=prompts.jsonl --output=answers.jsonl

A model is a workdir (its latest checkpoint), one checkpoint step, or a Hugging Face folder. A batch
file is JSON lines of {"prompt": ...} or {"messages": [...]}, each perhaps with an "id", or text
with a prompt a line.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from absl import flags

from danube_jax import command_line, files
from danube_jax.console import info, progress
from danube_jax.errors import UserError, printable
from danube_jax.inference import sampling_flags
from danube_jax.interruption import handled

_MODEL = flags.DEFINE_string("model", None, "A workdir, a checkpoint step, or a HF folder.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to be continued.")
_BATCH_FILE = flags.DEFINE_string("batch_file", None, "File of prompts, .jsonl or text.")
_OUTPUT = flags.DEFINE_string("output", None, "Where JSON lines are written; default: shown.")
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are questions, put in the chat format.")
_SYSTEM = flags.DEFINE_string("system", "", "System text, with --chat.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "danube, danube2, danube3 or a Jinja file; default: the model's."
)
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be given repeatedly.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on past the end-of-text token.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers a prompt.")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs", 0, "Show each token's log-probability and those of so many likeliest."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts generated at once.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "Show a JSON object an answer.")
_STREAM = flags.DEFINE_bool("stream", None, "Show text as it comes; default: on a terminal.")
sampling_flags.define_flags(sampling_flags.GENERATE_DEFAULTS)


def main(argv: Sequence[str]) -> int:
    """Parses flags, generates, and returns the exit status."""
    command_line.parse_flags(argv, __doc__, required=("model",))
    _check_flags()
    requests = _read_requests()
    from danube_jax.inference.loading import open_text_model, quiet_broken_pipe
    from danube_jax.inference.requests import to_prompt
    from danube_jax.inference.sampling import SamplingConfig

    model = open_text_model(_MODEL.value, _CHAT_TEMPLATE.value)
    given = sampling_flags.given_settings()
    settings = sampling_flags.resolve_settings(
        given, model.source.generation, sampling_flags.GENERATE_DEFAULTS
    )
    sampling = SamplingConfig(
        **settings,
        stop_tokens=() if _IGNORE_EOS.value else model.source.eos_ids(),
        stop_strings=tuple(_STOP.value),
        num_samples=_NUM_SAMPLES.value,
        logprobs=_LOGPROBS.value,
    )
    prompts = [
        to_prompt(
            request,
            model.tokenizer,
            context=model.context,
            max_tokens=sampling.max_tokens,
            exact="max_tokens" in given,
        )
        for request in requests
    ]
    with quiet_broken_pipe(), _open_output(_OUTPUT.value) as file:
        generator = model.generator(sampling_flags.dtype(), sampling_flags.cache_dtype())
        started = time.monotonic()
        if _streams():
            tokens = _show_stream(generator, prompts[0], sampling)
        else:
            rows = _generate(generator, prompts, sampling, bool(_BATCH_FILE.value))
            tokens = sum(len(row["tokens"]) for row in rows)
            _show(rows, file, model.tokenizer)
        seconds = time.monotonic() - started
        info(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    return 0


def _check_flags() -> None:
    """Refuses flags that do not go together, before anything is read."""
    if (_PROMPT.value is None) == (_BATCH_FILE.value is None):
        given = "both are given" if _PROMPT.value is not None else "neither is given"
        raise UserError(f"--prompt or --batch_file: {given}; expected one of them")
    if _SYSTEM.value and not _CHAT.value:
        raise UserError("--system: needs --chat")
    if _OUTPUT.value is not None and (not _OUTPUT.value or Path(_OUTPUT.value).is_dir()):
        raise UserError(f"--output: {_OUTPUT.value!r} is a folder; expected the name of a file")
    single = _PROMPT.value is not None and _NUM_SAMPLES.value == 1 and not _LOGPROBS.value
    if _STREAM.value and not (single and _OUTPUT.value is None and not _JSON.value):
        raise UserError(
            "--stream: needs --prompt, one sample, and none of --output, --json and --logprobs"
        )


def _streams() -> bool:
    if _STREAM.value is not None:
        return _STREAM.value
    plain = _PROMPT.value is not None and _OUTPUT.value is None and not _JSON.value
    return plain and _NUM_SAMPLES.value == 1 and not _LOGPROBS.value and sys.stdout.isatty()


def _read_requests() -> list:
    from danube_jax.inference.requests import Request, as_question, check_text, read_requests

    check_text(_SYSTEM.value, "--system")
    if _BATCH_FILE.value is not None:
        return read_requests(_BATCH_FILE.value, chat=_CHAT.value, system=_SYSTEM.value)
    request = Request(0, "--prompt", prompt=check_text(_PROMPT.value, "--prompt"))
    return [as_question(request, _SYSTEM.value) if _CHAT.value else request]


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
        return
    try:
        with files.atomic_writer(path) as file:
            yield file
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output: {path!r} is inside a file; expected a folder") from None


def _for_reader(text: str) -> str:
    """A terminal is not to be steered by a model's words; a pipe gets what it wrote."""
    return printable(text) if sys.stdout.isatty() else text


def _show_stream(generator: Any, prompt: Any, sampling: Any) -> int:
    from danube_jax.inference.requests import trim_answer

    count, shown, text = 0, 0, ""
    sampling = dataclasses.replace(sampling, max_tokens=prompt.max_tokens)
    try:
        for chunk in generator.stream(prompt.tokens, sampling):
            text += chunk.text
            visible = text if prompt.request.messages is None else trim_answer(text)
            print(_for_reader(visible[shown:]), end="", flush=True)
            shown, count = len(visible), count + len(chunk.tokens)
    except KeyboardInterrupt as stop:
        handled(stop)
    print(flush=True)
    return count


def _generate(generator: Any, prompts: list, sampling: Any, show_progress: bool) -> list[dict]:
    """A row a completion, in the order of the prompts."""
    from danube_jax.inference.requests import batches, to_row

    done: dict[int, list[dict]] = {}
    bar = progress("generate", len(prompts), "prompts") if show_progress else None
    with bar or contextlib.nullcontext(lambda amount: None) as advance:
        for group in batches(prompts, _BATCH_SIZE.value):
            completions = generator.generate(
                [prompts[i].tokens for i in group],
                dataclasses.replace(
                    sampling,
                    max_tokens=prompts[group[0]].max_tokens,
                    seed=sampling.seed + group[0],  # batches draw differently
                ),
            )
            for i, samples in zip(group, completions, strict=True):
                done[i] = [
                    to_row(prompts[i], n, completion, logprobs=bool(sampling.logprobs))
                    for n, completion in enumerate(samples)
                ]
            advance(len(group))
    return [row for i in range(len(prompts)) for row in done[i]]


def _show(rows: list[dict], file: BinaryIO | None, tokenizer: Any) -> None:
    """Writes rows to the output file, or shows them as JSON or as text."""
    if file is not None or _JSON.value or _BATCH_FILE.value:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if file is None:
            sys.stdout.writelines(lines)
        else:
            file.writelines(line.encode() for line in lines)
        return
    for row in rows:
        if len(rows) > 1:
            print(f"--- sample {row['sample'] + 1}")
        print(_for_reader(row["text"]))
        for i, token in enumerate(row["tokens"] if _LOGPROBS.value else ()):
            likeliest = " ".join(
                f"{tokenizer.piece(other)!r}:{logprob:.3f}"
                for other, logprob in row["top_logprobs"][i]
                if logprob is not None
            )
            print(f"{row['token_logprobs'][i]:9.4f}  {tokenizer.piece(token)!r}  ({likeliest})")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command_line.run(main)
