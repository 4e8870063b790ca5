"""Tiny random models and small local tasks, for the tests of evaluation."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import yaml
from tokenizer_models import byte_level_folder

CONTEXT = 160
WINDOW = 40  # of Mistral's
WORDS = [word for text in list(topics.values())[40:60] for word in text.split()]
TEXTS = [text for _, text in sorted(topics.items())][60:]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(folder: Path, architecture: str, *, chat: bool = False, **changes) -> Path:
    """A random model that transformers wrote, with a byte-level tokenizer of 600 ids.

    Mistral's has a window of 40 and a tokenizer that puts BOS in front; Llama's is tied and has
    neither.
    """
    import torch
    import transformers

    fields = {
        "vocab_size": 608,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    torch.manual_seed(3)
    if architecture == "mistral":
        config = transformers.MistralConfig(**fields, sliding_window=WINDOW)
        model = transformers.MistralForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**fields, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    if chat:
        tokenizer["chat_template"] = CHAT_TEMPLATE
    return byte_level_folder(folder, tokenizer, bos_first=architecture == "mistral")


def choice_rows(count: int) -> list[dict]:
    """Questions with two to five options of one to nine words, some the beginning of others."""
    rows = []
    for i in range(count):
        words = WORDS[17 * i : 17 * i + 200]
        options = [" ".join(words[40 + 10 * k : 41 + 10 * k + (3 * k + i) % 9]) for k in range(4)]
        options.append(options[0] + " " + words[190])
        rows.append(
            {
                "question": " ".join(words[: 4 + 5 * (i % 6)]),
                "options": options[: 2 + i % 4],
                "answer": i % 2,
            }
        )
    return rows


def write_tasks(folder: Path) -> Path:
    """YAML files of five small tasks, one a kind."""
    folder.mkdir(parents=True)
    _write_rows(folder / "choice.jsonl", choice_rows(24))
    _write_rows(folder / "examples.jsonl", choice_rows(31)[24:])
    texts = [TEXTS[i][: 40 + 700 * (i % 3)] for i in range(6)]
    _write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    questions = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{options}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    letters = questions | {"doc_to_choice": ["A", "B"]}
    # No control token's name holds a stop string: transformers' criterion would stop on it.
    generation = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n", "c"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    _write_task(folder, "tiny_choice", "choice", questions)
    _write_task(folder, "tiny_letters", "choice", letters | {"num_fewshot": 2})
    _write_task(folder, "tiny_fewshot", "choice", questions | {"num_fewshot": 1})
    _write_task(folder, "tiny_generation", "choice", generation)
    _write_task(folder, "tiny_shots", "choice", generation | {"num_fewshot": 1})
    _write_task(folder, "tiny_rolling", "texts", rolling)
    return folder


def _write_task(folder: Path, name: str, rows: str, config: dict) -> None:
    data = {"test": str(folder / f"{rows}.jsonl"), "train": str(folder / "examples.jsonl")}
    if rows == "texts":
        data.pop("train")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1},
        **config,
    }
    if "train" in data:
        task |= {"training_split": "train", "fewshot_split": "train"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
