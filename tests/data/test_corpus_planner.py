"""Epochs, caps and the written phases."""

import pytest

from danube_jax.config import base_config, parse_config
from danube_jax.data.corpus import planner
from danube_jax.data.corpus.config import PlanConfig, StageConfig
from danube_jax.data.phases import PhaseSchedule, source_use
from danube_jax.errors import UserError

TOKENS = {"web": 100_000, "good": 10_000, "more": 40_000}
CAPS = PlanConfig(batch_tokens=1_000, max_epochs=2.0, source_max_epochs={"good": 3.0})
STAGES = (
    StageConfig("one", 80_000, 100, {"web": 3.0, "good": 1.0}),
    StageConfig("two", 40_200, 200, {"web": 0.25, "good": 0.5, "more": 0.25}),
)


def test_epochs_are_those_of_the_schedule_that_a_run_makes():
    plan = planner.plan_stages(STAGES, TOKENS, CAPS)
    assert plan.stages[0].epochs == pytest.approx({"web": 0.6, "good": 2.0})
    assert plan.stages[1].tokens == 40_000
    assert plan.stages[1].before == pytest.approx({"web": 0.6, "good": 2.0, "more": 0.0})
    config = base_config()
    namespace: dict = {}
    stores = {name: {"train": f"stores/{name}/train"} for name in TOKENS}
    exec(planner.as_python(plan, stores, CAPS), namespace)
    config.model.max_position_embeddings = 200
    config.data.tokenizer.path = "none"
    run = parse_config(namespace["set_data"](config))
    use = source_use(PhaseSchedule.from_config(run), TOKENS)
    for name, epochs in plan.total_epochs().items():
        # A run counts whole windows: here a fiftieth of the smallest store each.
        assert float(use[name].epochs) == pytest.approx(epochs, rel=0.025)
    assert run.data.sources["good"].path == "stores/good/train"


def test_repetition_beyond_the_cap_is_warned_of():
    plan = planner.plan_stages(STAGES, TOKENS, CAPS)
    assert any(
        "good is repeated 4.0 times" in line and "cap of 3" in line for line in plan.warnings
    )
    assert any("40,200 tokens are 40,000" in line for line in plan.warnings)


def test_rebalancing_keeps_every_cap_and_the_budget():
    plan = planner.plan_stages(STAGES, TOKENS, CAPS, rebalance=True)
    assert plan.total_epochs()["good"] == pytest.approx(3.0)
    for stage in plan.stages:
        assert sum(stage.mixture.values()) == pytest.approx(1.0)
    second = plan.stages[1].mixture
    assert second["good"] == pytest.approx(0.25)
    assert second["web"] == pytest.approx(second["more"])  # equal weights share what was cut
    for name, epochs in plan.total_epochs().items():
        assert epochs <= planner.cap_of(CAPS, name) + 1e-9


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig("x", 1_000, 10, {"wob": 1.0}), r"stages\[0\]\.mixture\.wob: no such store"),
        (StageConfig("x", 10**6, 10, {"web": 1.0}), "200,000 tokens left within their caps"),
    ],
)
def test_impossible_wishes_are_refused(stage, message):
    with pytest.raises(UserError, match=message):
        planner.plan_stages((stage,), TOKENS, CAPS, rebalance=True)
