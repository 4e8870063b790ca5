"""From wished stages and the stores there are to the phases of a training run.

A source's epochs follow from its share and its store's tokens. Where a cap on repetition binds,
the planner can cut the source down to the cap and hand what is missing to the others, in
proportion to their weights, until every cap holds.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from danube_jax.config import whole_steps
from danube_jax.data.corpus.config import PlanConfig, StageConfig
from danube_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """A stage with whole steps and a mix that sums to one.

    Attributes:
      epochs: source → passes over its store in this stage alone.
      before: source → passes in the stages before it.
    """

    name: str
    tokens: int
    context_length: int
    mixture: Mapping[str, float]
    epochs: Mapping[str, float]
    before: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """All stages, and what is to be said about them."""

    stages: tuple[PlannedStage, ...]
    warnings: tuple[str, ...]

    def total_epochs(self) -> dict[str, float]:
        """Source → passes over its store in the whole run."""
        out: dict[str, float] = {}
        for stage in self.stages:
            for name, epochs in stage.epochs.items():
                out[name] = out.get(name, 0.0) + epochs
        return out


def cap_of(plan: PlanConfig, source: str) -> float:
    """The epochs beyond which a source is not to be repeated."""
    return plan.source_max_epochs.get(source, plan.max_epochs)


def plan_stages(
    wished: Sequence[StageConfig],
    store_tokens: Mapping[str, int],
    plan: PlanConfig,
    *,
    rebalance: bool = False,
) -> StagePlan:
    """Turns wished stages into planned ones.

    Args:
      wished: in the order of training.
      store_tokens: source → tokens of its training store.
      plan: batch size and caps.
      rebalance: keep the caps by handing shares on to other sources; otherwise only warn.

    Raises:
      UserError: a stage names a source without a store, or the caps leave too little text.
    """
    if not wished:
        raise UserError("config.stages: (); expected at least one stage")
    used = dict.fromkeys(store_tokens, 0.0)  # tokens
    stages, warnings = [], []
    for i, row in enumerate(wished):
        unknown = sorted(set(row.mixture) - set(store_tokens))
        if unknown:
            raise UserError(
                f"config.stages[{i}].mixture.{unknown[0]}: no such store; expected some of "
                f"{', '.join(sorted(store_tokens))}"
            )
        tokens = whole_steps(row.tokens, plan.batch_tokens)
        if tokens != row.tokens:
            warnings.append(
                f"{row.name}: {row.tokens:,} tokens are {tokens:,} in whole steps of "
                f"{plan.batch_tokens:,}"
            )
        total = sum(row.mixture.values())
        mixture = {name: weight / total for name, weight in row.mixture.items() if weight > 0}
        if rebalance:
            room = {n: cap_of(plan, n) * store_tokens[n] - used[n] for n in mixture}
            asked, mixture = mixture, _fit(row.name, mixture, tokens, room)
            warnings += [
                f"{row.name}: {name} is cut from {asked[name]:.1%} to {mixture.get(name, 0):.1%} "
                f"to stay within {cap_of(plan, name):g} epochs"
                for name in asked
                if mixture.get(name, 0.0) < asked[name] - 1e-9
            ]
        before = {name: used[name] / store_tokens[name] for name in mixture}
        epochs = {name: share * tokens / store_tokens[name] for name, share in mixture.items()}
        for name, share in mixture.items():
            used[name] += share * tokens
            all_epochs = used[name] / store_tokens[name]
            if all_epochs > cap_of(plan, name) * (1 + 1e-9):
                warnings.append(
                    f"{row.name}: {name} is repeated {all_epochs:.1f} times by its end, above the "
                    f"cap of {cap_of(plan, name):g}; take less of it, or prepare more text"
                )
        stages.append(PlannedStage(row.name, tokens, row.context_length, mixture, epochs, before))
    return StagePlan(tuple(stages), tuple(warnings))


def _fit(
    stage: str, mixture: Mapping[str, float], tokens: int, room: Mapping[str, float]
) -> dict[str, float]:
    """Shares that keep to the room (in tokens) of every source; what is cut goes to the others."""
    there = sum(max(0.0, tokens_left) for tokens_left in room.values())
    if there < tokens * (1 - 1e-12):
        raise UserError(
            f"config.stages ({stage}): its sources have {there:,.0f} tokens left within "
            f"their caps, the stage asks for {tokens:,}; raise the caps, add "
            "sources, or ask for fewer tokens"
        )
    fixed: dict[str, float] = {}
    while True:
        free = {name: weight for name, weight in mixture.items() if name not in fixed}
        left = 1 - sum(fixed.values())
        total = sum(free.values())
        shares = {name: weight / total * left for name, weight in free.items()}
        full = [n for n, share in shares.items() if share * tokens > max(0.0, room[n])]
        if not full:
            found = fixed | shares
            return {name: found[name] for name in mixture if found[name] > 0}
        fixed |= {name: max(0.0, room[name]) / tokens for name in full}


def as_python(plan: StagePlan, stores: Mapping[str, Mapping[str, str]], caps: PlanConfig) -> str:
    """Lines for a training config: `config.data.sources` and `config.phases`.

    Args:
      plan: the stages.
      stores: source → part ('train', 'heldout') → folder.
      caps: the caps on repetition, which the run then keeps.
    """
    used = [name for name in stores if name in plan.total_epochs()]
    out = ["from danube_jax.config import phase, source", "", "", "def set_data(config):"]
    out.append('    """Sources and phases, as tools/plan_stages.py wrote them."""')
    out.append(f"    config.training.batch_tokens = {caps.batch_tokens:_}")
    out.append("    config.data.sources = {")
    for name in used:
        parts = stores[name]
        cap = max(cap_of(caps, name), plan.total_epochs()[name] * 1.01)
        out.append(f"        {_quoted(name)}: source(")
        out.append(f"            path={_quoted(parts['train'])},")
        if "heldout" in parts:
            out.append(f"            heldout_path={_quoted(parts['heldout'])},")
        out += [f"            max_epochs={cap:.2f},", "        ),"]
    out += ["    }", "    config.phases = ("]
    for stage in plan.stages:
        out += [
            "        phase(",
            f"            name={_quoted(stage.name)},",
            f"            tokens={stage.tokens:_},",
            f"            context_length={stage.context_length:_},",
            "            mixture={",
            *(
                f"                {_quoted(name)}: {share:.6f},"
                for name, share in stage.mixture.items()
            ),
            "            },",
            "        ),",
        ]
    return "\n".join([*out, "    )", "    return config", ""])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
