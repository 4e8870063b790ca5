"""The published recipes of tuning: their numbers, and what rows they read."""

import json

import pytest
from test_config import load
from tokenizer_models import train_sentencepiece

from danube_jax.config import parse_config
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.data.tuning_data import open_tuning_data
from danube_jax.training.rounds import split_rounds

USER, ANSWER = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5."}
WRONG = {"role": "assistant", "content": "It is 6."}


def message(id, parent, role, text, rank):
    """A row of Oasst2."""
    keys = {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank}
    return keys | {"lang": "en", "user_id": "u", "deleted": False, "review_count": 3}


# A row, or several, with the columns that the data set has on the Hugging Face Hub.
ROWS = {
    "openorca": [
        {"id": "niv.1", "system_prompt": "", "question": "What is 2 + 3?", "response": "5."},
        {"id": "cot.2", "system_prompt": "Be brief.", "question": "And 4?", "response": "Four."},
        {"id": "cot.3", "system_prompt": "Be brief.", "question": "And 5?", "response": ""},
    ],
    "metamathqa": [
        {
            "type": "GSM_AnsAug",
            "query": "What is 2 + 3?",
            "original_question": "What is 2 + 2?",
            "response": "The answer is: 5",
        }
    ],
    "ultrachat": [{"prompt": USER["content"], "prompt_id": "f", "messages": [USER, ANSWER] * 2}],
    "oasst2": [
        message("q", None, "prompter", "What is 2 + 3?", None),
        message("a", "q", "assistant", "It is 5.", 0.0),
        message("b", "q", "assistant", "6, or 7.", 1.0),
    ],
    "ultrafeedback": [
        {
            "prompt": USER["content"],
            "prompt_id": "f",
            "chosen": [USER, ANSWER],
            "rejected": [USER, WRONG],
            "messages": [USER, ANSWER],
            "score_chosen": 8.0,
            "score_rejected": 3.5,
        }
    ],
    "orca": [
        {"system": "Be brief.", "question": "And 4?", "chosen": "Four.", "rejected": "Five."},
        {"system": "", "question": "And 4?", "chosen": "Four.", "rejected": "Four."},
    ],
    "math": [
        {
            "metadata": {"length": 1},
            "instruction": "And 4?",
            "chosen_response": "Four.",
            "chosen_rating": 9.0,
            "rejected_response": "Five.",
            "rejected_rating": 4.0,
        }
    ],
}
EXAMPLES = {
    "sft": {"openorca": 2, "metamathqa": 1, "ultrachat": 1, "oasst2": 1},
    "dpo": {"ultrafeedback": 1, "orca": 1, "math": 1, "oasst2": 1},
}


@pytest.mark.parametrize("generation", ["danube", "danube2"])
def test_sft_is_the_papers(generation):
    run = parse_config(load(f"{generation}_sft"))
    (row,) = run.rounds
    assert set(row.sources) == set(EXAMPLES["sft"])
    assert (row.epochs, row.batch_size, run.lora.rank) == (1.0, 8, 0)
    assert row.context_length == {"danube": 16_384, "danube2": 8_192}[generation]
    assert run.optimizer.learning_rate == 1e-5
    assert run.chat.mask_prompt
    assert run.chat.template == generation
    large = [source.max_examples for source in run.data.sources.values() if source.max_examples]
    assert 0.9 * 157_000 < sum(large) < 157_000  # Oasst2 is the rest


@pytest.mark.parametrize("generation", ["danube", "danube2"])
def test_dpo_is_the_papers(generation, tmp_path):
    run = parse_config(load(f"{generation}_dpo"))
    (first, _), (second, _) = split_rounds(run, tmp_path)
    assert first.rounds[0].sources == ("ultrafeedback", "orca", "math")
    assert second.rounds[0].sources == ("oasst2",)
    assert (first.optimizer.learning_rate, second.optimizer.learning_rate) == (1e-5, 3e-6)
    for one in (first, second):
        assert (one.rounds[0].epochs, one.rounds[0].batch_size) == (1.0, 2)
        assert (one.lora.rank, one.lora.alpha, one.lora.dropout) == (4, 16.0, 0.05)
        assert (one.dpo.beta, one.dpo.loss, one.dpo.label_smoothing) == (0.2, "sigmoid", 0.0)
        assert (one.dpo.average_log_probs, one.optimizer.final_learning_rate) == (False, 0.0)
    assert second.data.sources["oasst2"].language == "en"


@pytest.mark.parametrize("name", ["danube_sft", "danube_dpo", "danube2_sft", "danube2_dpo"])
def test_recipes_read_rows_of_their_data_sets(name, tmp_path):
    config = load(name)
    if name.endswith("dpo"):  # as the model it starts from brings
        config.chat.template = name.removesuffix("_dpo")
    for key, source in config.data.sources.items():
        source.path = str(tmp_path / f"{key}.jsonl")
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[key]))
    config.data.heldout_fraction = 0.0
    config.model.max_position_embeddings = 16_384
    tokenizer = open_tokenizer(train_sentencepiece(tmp_path / "tokenizer.model"))
    found = {}
    for one, _ in split_rounds(parse_config(config), tmp_path):
        found |= dict(open_tuning_data(one, tokenizer).schedule.phases[0].mixture)
    assert found == EXAMPLES[config.objective]
