"""Opens what a run reads: tokenizer, stores, phase schedule; prepares built-in text where asked."""

import dataclasses
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from danube_jax.config import RunConfig, TokenizerConfig
from danube_jax.console import warn
from danube_jax.data.corpus.prepare import PreparedData, prepare_builtin
from danube_jax.data.loader import open_stores
from danube_jax.data.phases import (
    PhaseSchedule,
    SourceUse,
    check_repetition,
    data_fingerprint,
    source_use,
)
from danube_jax.data.token_store import TokenStore
from danube_jax.data.tokenizer import Tokenizer, load_tokenizer
from danube_jax.errors import UserError
from danube_jax.training.workdir import PREPARED_DATA


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything a run reads, opened and checked."""

    tokenizer: Tokenizer
    train: dict[str, TokenStore]
    heldout: dict[str, TokenStore]
    schedule: PhaseSchedule
    use: dict[str, SourceUse]
    fingerprint: dict[str, str]


def open_run_data(run: RunConfig, workdir: Path) -> RunData:
    """Opens tokenizer and stores and builds the schedule; built-in sources are prepared first.

    In a run of several processes the first one prepares and the others wait.

    Raises:
      UserError: a file is missing, damaged or does not fit the others or the model.
    """
    schedule = PhaseSchedule.from_config(run)
    for name in run.data.sources.keys() - set(schedule.sources):
        warn(f"source {name!r} is in no phase's mixture and is not read")
    train_paths = {name: run.data.sources[name].path for name in schedule.sources}
    heldout_paths = {name: run.data.sources[name].heldout_path for name in schedule.sources}
    tokenizer_config = run.data.tokenizer
    if any(source.builtin for source in run.data.sources.values()):
        prepared = _prepare(run, workdir)
        train_paths |= {name: prepared.train[name] for name in train_paths}
        heldout_paths |= {name: prepared.heldout.get(name, "") for name in heldout_paths}
        tokenizer_config = TokenizerConfig(path=prepared.tokenizer)
    tokenizer = load_tokenizer(tokenizer_config)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size: {run.model.vocab_size} is not possible; the tokenizer has "
            f"{tokenizer.vocab_size} tokens, so at least that many are needed"
        )
    train = open_stores(run.data, train_paths, tokenizer.fingerprint)
    heldout_paths = {name: path for name, path in heldout_paths.items() if path}
    heldout = open_stores(run.data, heldout_paths, tokenizer.fingerprint)
    use = source_use(schedule, {name: store.tokens for name, store in train.items()})
    check_repetition(run, use)
    if not heldout:
        warn("no source has a held-out store: nothing will be evaluated")
    stores = {name: store.fingerprint for name, store in train.items()}
    fingerprint = data_fingerprint(run, stores, tokenizer.fingerprint)
    return RunData(tokenizer, train, heldout, schedule, use, fingerprint)


def _prepare(run: RunConfig, workdir: Path) -> PreparedData:
    """Prepares built-in text; process 0 does it, and the others find it done."""
    directory = Path(run.data.directory) if run.data.directory else workdir / PREPARED_DATA
    if jax.process_index() == 0:
        prepared = prepare_builtin(run, directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("built-in text prepared")
        prepared = prepare_builtin(run, directory)
    return prepared
