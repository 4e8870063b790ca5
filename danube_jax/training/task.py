"""What the training loop asks of an objective: where pretraining and tuning differ."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from danube_jax.config import RunConfig
from danube_jax.data.phases import PhaseSchedule
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.models.decoder import Decoder
from danube_jax.training.frozen_weights import FrozenWeights
from danube_jax.training.heldout import EvalStep
from danube_jax.training.init_from import Initialization
from danube_jax.training.objectives import Objective
from danube_jax.training.workdir import has_checkpoints

PyTree = Any
EVAL_TOKENS_PER_DEVICE = 16_384


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What an evaluation computes with."""

    step: EvalStep
    mesh: Mesh
    bytes_V: np.ndarray

    def rows(self, run: RunConfig, context: int) -> int:
        """Rows of an evaluation's global batch."""
        each = run.training.microbatch_tokens or EVAL_TOKENS_PER_DEVICE
        return self.mesh.size * max(1, each // context)


class Task(abc.ABC):
    """One objective with its data.

    Attributes:
      run: the config.
      workdir: the run's folder.
      tokenizer: kept in the workdir, with its chat template.
      schedule: phases, from which steps, tokens and the learning rate follow.
      fingerprint: of the data.
      has_frozen: whether the objective reads weights that are not trained.
      count_name: what losses are means of.
    """

    run: RunConfig
    workdir: Path
    tokenizer: Tokenizer
    schedule: PhaseSchedule
    fingerprint: Mapping[str, str]
    has_frozen = False
    count_name = "valid_tokens"

    @abc.abstractmethod
    def batch_source(self, devices: int) -> Any:
        """A Grain source whose element t is this process's share of step t's batch.

        Raises:
          UserError: batch and devices do not divide.
        """

    @abc.abstractmethod
    def fresh_params(self, key: jax.Array) -> PyTree:
        """Random parameters of what is trained, float32; traceable."""

    @abc.abstractmethod
    def train_objective(self, decoder: Decoder) -> Objective:
        """What is minimised."""

    @abc.abstractmethod
    def eval_objective(self, decoder: Decoder) -> Objective:
        """What held-out data is scored with."""

    @abc.abstractmethod
    def evaluate(
        self, params: PyTree, frozen: PyTree | None, evaluator: Evaluator, step: int
    ) -> dict[str, float]:
        """Figures of all held-out data, named figure/source."""

    @abc.abstractmethod
    def can_evaluate(self) -> bool:
        """Whether there is held-out data."""

    @abc.abstractmethod
    def notes(self) -> list[str]:
        """Lines about the data, for the start of the run."""

    def baselines(self) -> dict[str, float]:
        """Held-out losses of each source to compare with, those of its unigram distribution."""
        return {}

    @abc.abstractmethod
    def summarize(
        self, evaluations: Sequence[dict[str, Any]], baselines: Mapping[str, float]
    ) -> None:
        """Shows what the run came to, from all its evaluations and `baselines`."""

    def plan_initialization(self) -> Initialization | None:
        """Where the weights of a new run come from; None for random ones or a run that resumes.

        Raises:
          UserError: it cannot be read, or does not fit the run.
        """
        if self.run.init_from.path and not has_checkpoints(self.workdir):
            return Initialization.plan(self.run, self.tokenizer)
        return None

    def load_frozen(
        self, mesh: Mesh, dtype: jnp.dtype, expected: Mapping[str, str] | None
    ) -> FrozenWeights | None:
        """The weights that are read and not trained, where there are some."""
        del mesh, dtype, expected
        return None

    def begin(self, source: Any, frozen: FrozenWeights | None, evaluator: Evaluator) -> Any:
        """Called once before the first step; returns the batch source to train from."""
        del frozen, evaluator
        return source

    def checkpoint_meta(self, frozen: FrozenWeights | None) -> dict[str, Any]:
        """What the metadata of checkpoints holds besides the loop's own."""
        del frozen
        return {}

    def whole_params(self, params: PyTree, frozen: PyTree | None) -> PyTree:
        """The parameters of a plain decoder, to generate with."""
        del frozen
        return params

    def encode_prompt(self, prompt: str) -> list[int]:
        """A sample's prompt as tokens."""
        return self.tokenizer.encode(prompt, bos=True)

    def sample_text(self, prompt: str, prompt_ids: Sequence[int], new: Sequence[int]) -> str:
        """What is shown of a sample."""
        del prompt
        return self.tokenizer.decode([*prompt_ids, *new])

    def batch_metrics(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures of a batch on the host."""
        del batch
        return {}
