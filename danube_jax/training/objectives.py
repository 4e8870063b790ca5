"""Objectives: how a micro-batch becomes a loss.

Pretraining, SFT and DPO differ in their objective alone. An objective is a pure function
``(weights, microbatch, frozen) -> (loss_sum, metric_sums)`` of sums over what the micro-batch
counts: its valid tokens, or its preference pairs. The training step divides by their number in the
whole step, over all devices and micro-batches, so that accumulation and sharding change nothing.

`weights` are what is trained: all of the model's, or adapters on the `frozen` ones.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from danube_jax.config import DpoConfig
from danube_jax.models.decoder import Decoder, head_kernel
from danube_jax.models.lora import COLLECTION, LoraConfig, adapter_collection
from danube_jax.training.losses import chunked_cross_entropy, token_nll
from danube_jax.training.preference_loss import (
    answer_sums,
    preference_losses,
    reward_rounding,
    share_preferred,
)

Batch = Mapping[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model that is trained.

    Attributes:
      decoder: the model.
      lora: set where adapters are trained.
      seed: of the adapters' dropout, which falls where the batch numbers its rows (`sequence`).
    """

    decoder: Decoder
    lora: LoraConfig | None = None
    seed: int = 0

    def hidden_states(
        self, weights: Any, batch: Batch, frozen: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Final states [B, T, D], and the head [D, V]."""
        if self.lora is None:
            return self.plain_states(weights, batch), head_kernel(weights)
        keys_B = None
        if self.lora.dropout and "sequence" in batch:
            root = jax.random.key(self.seed)
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(root, batch["sequence"])
        adapters = adapter_collection(weights, self.lora, self.decoder.dtype, keys_B)
        return self.plain_states(frozen, batch, {COLLECTION: adapters}), head_kernel(frozen)

    def plain_states(
        self, params: Any, batch: Batch, collections: Mapping[str, Any] | None = None
    ) -> jax.Array:
        """Final states [B, T, D] under whole parameters."""
        return self.decoder.apply(
            {"params": params, **(collections or {})},
            batch["tokens"],
            positions_BT=batch.get("positions"),
            segment_ids_BT=batch.get("segment_ids"),
            method="hidden_states",
        )


def language_modeling(
    decoder: Decoder,
    *,
    z_loss: float,
    chunk_tokens: int,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Objective:
    """Next-token cross-entropy with an optional z-loss (PaLM, section 5): pretraining and SFT.

    The micro-batch holds `tokens`, `targets` int32 [B, T], `weights` float32 [B, T], where
    documents are masked `segment_ids` int32 [B, T], and where they begin at 0 `positions`.
    """
    policy = Policy(decoder, lora, seed)

    def objective(
        weights: Any, batch: Batch, frozen: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden_BTD, head_DV = policy.hidden_states(weights, batch, frozen)
        loss, aux = chunked_cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head_DV,
            batch["targets"].reshape(-1),
            batch["weights"].reshape(-1),
            chunk_tokens=chunk_tokens,
            z_loss=z_loss,
        )
        return loss, {"nll": aux["nll_sum"], "z_loss": aux["z_loss_sum"]}

    return objective


def answer_log_probs(
    hidden_BTD: jax.Array, head_DV: jax.Array, batch: Batch, chunk_tokens: int
) -> jax.Array:
    """Log-probability of each answer of packed pairs, summed over its tokens; float32 [B, P, 2]."""
    nll_M = token_nll(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        head_DV,
        batch["targets"].reshape(-1),
        chunk_tokens=chunk_tokens,
    )
    logp_BT = -nll_M.reshape(batch["targets"].shape) * batch["weights"]
    return answer_sums(logp_BT, batch["segment_ids"], batch["pairs"].shape[1])


def preference_optimization(
    decoder: Decoder,
    config: DpoConfig,
    *,
    chunk_tokens: int,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Objective:
    """DPO or IPO over the pairs of packed rows (`packing.pack_pairs`).

    Where the micro-batch holds no `reference` [B, P, 2], the reference is the model with the
    `frozen` weights, adapters left out, in the same precision.

    The sums, all over pairs: `reward_chosen`, `reward_rejected`, `margin` (their difference),
    `accuracy` (margin above 0; a half where it is 0 but for rounding), `log_prob_chosen`,
    `log_prob_rejected` (the policy's), `likelihood_accuracy` (chosen likelier than rejected, with
    no reference).
    """
    policy = Policy(decoder, lora, seed)

    def objective(
        weights: Any, batch: Batch, frozen: Any = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        states = policy.hidden_states(weights, batch, frozen)
        policy_BP2 = answer_log_probs(*states, batch, chunk_tokens)
        reference_BP2 = batch.get("reference")
        if reference_BP2 is None:
            states = policy.plain_states(frozen, batch), head_kernel(frozen)
            reference_BP2 = answer_log_probs(*states, batch, chunk_tokens)
        reference_BP2 = jax.lax.stop_gradient(reference_BP2)
        pairs_BP = batch["pairs"]
        tokens_BP2 = answer_sums(batch["weights"], batch["segment_ids"], pairs_BP.shape[1])
        loss_BP, rewards_BP2 = preference_losses(policy_BP2, reference_BP2, tokens_BP2, config)
        chosen_BP, rejected_BP = rewards_BP2[..., 0], rewards_BP2[..., 1]
        rounding_BP = reward_rounding(policy_BP2, config.beta)
        metrics = {
            "reward_chosen": chosen_BP,
            "reward_rejected": rejected_BP,
            "margin": chosen_BP - rejected_BP,
            "accuracy": share_preferred(chosen_BP, rejected_BP, rounding_BP),
            "log_prob_chosen": policy_BP2[..., 0],
            "log_prob_rejected": policy_BP2[..., 1],
            "likelihood_accuracy": share_preferred(policy_BP2[..., 0], policy_BP2[..., 1]),
        }
        sums = {key: jnp.sum(pairs_BP * value) for key, value in metrics.items()}
        return jnp.sum(pairs_BP * loss_BP), sums

    return objective


def counted(batch: Batch) -> jax.Array:
    """What a batch's losses are means over: 1 for each pair that there is, or for each token."""
    return batch["pairs"] if "pairs" in batch else batch["weights"]
