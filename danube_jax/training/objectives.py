"""Objectives: how a micro-batch becomes a loss.

Pretraining and fine-tuning differ in their objective alone. An objective is a pure function
``(variables, microbatch) -> (loss_sum, metric_sums)`` of sums over the micro-batch's valid tokens;
the training step divides by the valid tokens of the whole step, over all devices and
micro-batches, so that accumulation and sharding change nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from danube_jax.models.decoder import Decoder, head_kernel
from danube_jax.training.losses import chunked_cross_entropy

Objective = Callable[[Any, Mapping[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def language_modeling(decoder: Decoder, *, z_loss: float, chunk_tokens: int) -> Objective:
    """Next-token cross-entropy with an optional z-loss (PaLM, section 5).

    The micro-batch holds `tokens`, `targets` int32 [B, T], `weights` float32 [B, T], and
    `segment_ids` int32 [B, T] where documents are masked.
    """

    def objective(
        variables: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden_BTD = decoder.apply(
            variables,
            batch["tokens"],
            segment_ids_BT=batch.get("segment_ids"),
            method="hidden_states",
        )
        loss, aux = chunked_cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head_kernel(variables["params"]),
            batch["targets"].reshape(-1),
            batch["weights"].reshape(-1),
            chunk_tokens=chunk_tokens,
            z_loss=z_loss,
        )
        return loss, {"nll": aux["nll_sum"], "z_loss": aux["z_loss_sum"]}

    return objective
