"""Runs lm-eval's tasks on a `DanubeLM`."""

import contextlib
import functools
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.errors import UserError
from danube_jax.evaluation.answer_cache import without_pickle
from danube_jax.evaluation.harness import DanubeLM


def run_tasks(
    lm: DanubeLM,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    multiturn: bool = True,
    cache: Path | None = None,
    seed: int = 1234,
    samples: bool = False,
) -> Mapping[str, Any]:
    """What `lm_eval.simple_evaluate` returns.

    Args:
      lm: the model.
      tasks: objects that `tasks.load_tasks` gave; they can be run once.
      limit: documents a task; None means all.
      chat: whether prompts are put in the model's chat format, with `system` text if given and
        few-shot examples as turns of their own where `multiturn`.
      system: system text; without `chat` it stands before the prompt, as in lm-eval.
      multiturn: see `chat`.
      cache: beginning of the name of a file that keeps answers, so that a run that was killed
        goes on; greedy generation and log-likelihoods only.
      seed: of the choice of few-shot examples.
      samples: whether the results hold every document with its answers.

    Raises:
      UserError: the chat format is wanted and the model has none, or the cache cannot be used.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if chat and not lm.template:
        raise UserError(
            "the model has no chat template, so it is a base model; leave out --chat, or name a "
            "template with --chat_template"
        )
    with _usable(cache), without_pickle(), _cheap_questions():
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=TaskManager(include_defaults=False),  # an index of thousands is not needed
            limit=limit,
            use_cache=None if cache is None else str(cache),
            apply_chat_template=chat,
            system_instruction=system,
            fewshot_as_multiturn=chat and multiturn,
            fewshot_random_seed=seed,
            log_samples=samples,
        )


@contextlib.contextmanager
def _usable(cache: Path | None) -> Iterator[None]:
    """Names the file where the cache's database is damaged or cannot be written."""
    try:
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (sqlite3.DatabaseError, PermissionError, NotADirectoryError, FileNotFoundError) as error:
        raise UserError(
            f"{cache}_rank0.db: the cache of answers cannot be used ({error}); delete it, name "
            "another --output, or give --nocache"
        ) from None


@contextlib.contextmanager
def _cheap_questions() -> Iterator[None]:
    """What lm-eval asks of the machine in every evaluation: without git's complaints, and once."""
    from lm_eval import evaluator

    git, machine = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = _git_commit
    evaluator.add_env_info = lambda results: results.update(_machine(machine))
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = git, machine


def _git_commit() -> str | None:
    """The commit of the current folder; None outside a repository, where git would complain."""
    command = ["git", "describe", "--always"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


@functools.cache
def _machine(ask: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What lm-eval says of the machine, which takes it seconds to find out."""
    found: dict[str, Any] = {}
    ask(found)
    return found
