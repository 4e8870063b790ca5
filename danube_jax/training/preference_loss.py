"""DPO and IPO: from log-probabilities of answers to losses.

Direct preference optimisation: Rafailov et al., arXiv 2305.18290, equation 7; with label smoothing,
"conservative DPO" (Mitchell, 2023); IPO: Azar et al., arXiv 2310.12036, equation 17.

Shape suffixes: N pairs; 2 sides, chosen and rejected; B rows, T places, P pairs of a row.
"""

import jax
import jax.numpy as jnp

from danube_jax.config import DpoConfig


def preference_losses(
    policy_N2: jax.Array, reference_N2: jax.Array, tokens_N2: jax.Array, config: DpoConfig
) -> tuple[jax.Array, jax.Array]:
    """The loss of each pair, and its implicit rewards.

    With h = (policy - reference of chosen) - (policy - reference of rejected):

        sigmoid  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), s the label smoothing
        ipo      (h - 1 / (2 beta))²

    Args:
      policy_N2: log-probability of each answer, summed over its tokens.
      reference_N2: the same under the reference.
      tokens_N2: number of tokens of each answer; counts with `average_log_probs` only, which
        divides by it (TRL does so for IPO, not for DPO).
      config: beta, kind of loss, label smoothing.

    Returns:
      loss_N, and rewards_N2 = beta (policy - reference); float32.
    """
    ratios_N2 = policy_N2.astype(jnp.float32) - reference_N2.astype(jnp.float32)
    rewards_N2 = config.beta * ratios_N2
    if config.average_log_probs:
        ratios_N2 = ratios_N2 / jnp.maximum(tokens_N2, 1.0)
    h_N = ratios_N2[..., 0] - ratios_N2[..., 1]
    if config.loss == "ipo":
        return jnp.square(h_N - 1.0 / (2.0 * config.beta)), rewards_N2
    smoothing = config.label_smoothing
    right_N, wrong_N = jax.nn.log_sigmoid(config.beta * h_N), jax.nn.log_sigmoid(-config.beta * h_N)
    loss_N = -right_N if not smoothing else -(1.0 - smoothing) * right_N - smoothing * wrong_N
    return loss_N, rewards_N2


def answer_sums(values_BT: jax.Array, segment_ids_BT: jax.Array, pairs: int) -> jax.Array:
    """Sums over the tokens of each answer, [B, P, 2]; segments as `packing.pack_pairs` numbers."""
    rows = jnp.arange(values_BT.shape[0])[:, None]
    sums = jnp.zeros((values_BT.shape[0], 2 * pairs + 1), values_BT.dtype)
    sums = sums.at[rows, segment_ids_BT].add(values_BT)
    return sums[:, 1:].reshape(-1, pairs, 2)


def share_preferred(
    chosen: jax.Array, rejected: jax.Array, rounding: jax.Array | float = 0.0
) -> jax.Array:
    """1 where chosen is the larger, 0 where rejected is; a half where they are equal.

    Equal is what differs by `rounding` at most.
    """
    difference = chosen - rejected
    return jnp.where(jnp.abs(difference) <= rounding, 0.5, 0.5 * (1.0 + jnp.sign(difference)))


def reward_rounding(policy_N2: jax.Array, beta: float) -> jax.Array:
    """What float32 rounding of log-probabilities may do to a pair's margin; [N].

    So that a policy that is still its reference is right about no pair, and wrong about none.
    """
    return beta * 2.0**-20 * jnp.max(jnp.abs(policy_N2), axis=-1)
