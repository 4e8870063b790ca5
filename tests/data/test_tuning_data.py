"""Rows of a tuning run by step: every row once an epoch, shares of processes, widths, held-out."""

import numpy as np
import pytest
from tokenizer_models import train_sentencepiece
from tuning_config import (
    conversation_rows,
    load_config,
    preference_rows,
    write_config,
    write_rows,
)

from danube_jax.config import parse_config
from danube_jax.data import builtin_chat
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.data.tuning_data import RowSource, fixed_batches, limit_tokens, open_tuning_data
from danube_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model"))


@pytest.fixture
def open_run(tokenizer, tmp_path):
    """Opens a run's data; keyword arguments change its config by dotted key."""

    def open_data(objective="sft", **changes):
        rows = conversation_rows() if objective == "sft" else preference_rows()
        data = write_rows(tmp_path / "rows.jsonl", rows)
        path = write_config(tmp_path / "c.py", objective=objective, base=tmp_path, data=data)
        config = load_config(path)
        config.update_from_flattened_dict(changes)
        run = parse_config(config)
        return run, open_tuning_data(run, tokenizer)

    return open_data


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_every_epoch_visits_every_row_once_in_its_own_order(open_run, objective):
    run, data = open_run(objective)
    source, rows = RowSource(run, data), len(data.packed.rows)
    order = source.rows_of(np.arange(3 * rows)).reshape(3, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) > 1
    assert len(source) == -(-2 * rows // 2)
    batch = source[1]
    assert batch["sequence"].tolist() == [[2, 3]]
    assert batch["tokens"].shape == (1, 2, 96)
    if objective == "dpo":
        pairs = batch["pairs"].sum(axis=-1)
        np.testing.assert_array_equal(batch["segment_ids"].max(axis=-1), 2 * pairs)


def test_processes_and_micro_batches_share_a_step(open_run):
    run, data = open_run(**{"training.microbatch_tokens": 96})
    whole = RowSource(run, data)[0]
    assert whole["tokens"].shape == (2, 1, 96)
    run, data = open_run()
    parts = [RowSource(run, data, devices=2, process_index=i, process_count=2)[0] for i in range(2)]
    together = np.concatenate([part["tokens"] for part in parts], axis=1)
    np.testing.assert_array_equal(together.reshape(2, 96), whole["tokens"].reshape(2, 96))
    with pytest.raises(UserError, match=r"batch_size of 2 .* split over 8 devices"):
        RowSource(run, data, devices=8)


def test_without_packing_a_batch_is_as_wide_as_its_longest_row_needs(open_run, monkeypatch):
    from danube_jax.data import tuning_data

    monkeypatch.setattr(tuning_data, "MIN_WIDTH", 1)
    run, data = open_run(**{"chat.packing": "none"})
    assert [len(row) for row in data.packed.rows] == [1] * len(data.items)
    source = RowSource(run, data)
    for step in range(len(source)):
        batch = source[step]
        width = batch["tokens"].shape[-1]
        longest = (batch["segment_ids"] > 0).sum(axis=-1).max()
        assert width in (96, 48, 24, 12)
        assert longest <= width
        assert width == 96 or width % 2 or longest > width // 2


def test_held_out_questions_are_not_trained_on(open_run):
    _, data = open_run()
    (held,) = data.heldout.values()
    total = len(conversation_rows())
    assert len(held) + len(data.items) == total
    assert 0 < len(held) < total / 2
    trained = {tuple(item.ids) for item in data.items}
    assert not trained & {tuple(item.ids) for item in held}
    batches = list(fixed_batches(held, context=96, batch_rows=2, pad_id=0))
    assert sum(b["weights"].sum() for b, _ in batches) == sum(item.trained for item in held)
    assert len(limit_tokens(held, 1)) == 1
    assert len(limit_tokens(held, 10**6)) == len(held)


def test_the_fingerprint_tells_what_changed(open_run):
    _, data = open_run()
    _, same = open_run()
    assert data.fingerprint == same.fingerprint
    _, other = open_run(**{"data.sources.rows.max_examples": 10})
    changed = {k for k in data.fingerprint if data.fingerprint[k] != other.fingerprint[k]}
    assert changed == {"source rows"}
    _, other = open_run(**{"chat.mask_prompt": False})
    assert other.fingerprint["source rows"] != data.fingerprint["source rows"]


def test_what_leaves_nothing_to_train_on_is_refused(open_run):
    with pytest.raises(UserError, match="no example is left"):
        open_run(**{"chat.max_length": 3, "chat.truncation": "drop"})
    with pytest.raises(UserError, match=r"config.chat.max_length: 90 .*two answers share a row"):
        open_run("dpo", **{"chat.max_length": 90})
    with pytest.raises(UserError, match="expected one of auto, pairs, ranked, oasst"):
        open_run("dpo", **{"data.sources.rows.format": "alpaca"})
    with pytest.raises(
        UserError, match=r"rows.columns: 'promt' is not possible; expected .*prompt"
    ):
        open_run(**{"data.sources.rows.columns": {"promt": "frage"}})


def test_system_texts_that_the_template_refuses(open_run, tmp_path):
    rows = [row | {"system": "Be brief."} for row in conversation_rows()]
    other = str(write_rows(tmp_path / "system.jsonl", rows))
    changes = {"data.sources.rows.path": other, "chat.template": "danube2"}
    with pytest.raises(UserError, match=r"System role .*--config.chat.system_text=merge"):
        open_run(**changes)
    _, merged = open_run(**changes, **{"chat.system_text": "merge"})
    _, plain = open_run()
    assert len(merged.items) + len(merged.heldout["rows"]) == len(rows)
    assert merged.items[0].trained == plain.items[0].trained


def test_built_in_chat_is_the_same_every_time_and_right():
    conversations, pairs = builtin_chat.conversations(), builtin_chat.preferences()
    assert conversations == builtin_chat.conversations()
    assert len({pair.prompt[0]["content"] for pair in pairs}) == len(pairs)
    answers = {pair.prompt[0]["content"]: {pair.chosen, pair.rejected} for pair in pairs}
    asked = 0
    for conversation in conversations:
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
            assert answer["content"] in answers[question["content"]]
            asked += 1
    assert asked == len(pairs)
    assert all(len(pair.chosen) > len(pair.rejected) for pair in pairs)
