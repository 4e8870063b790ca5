"""The README.md of an exported folder: what the model is, how it was made, how it is used."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.interop import hf_config
from danube_jax.interop.hf_weights import layout
from danube_jax.interop.model_source import ModelSource, open_model

METRICS = "metrics.jsonl"
_MAX_ANCESTORS = 16


def model_card(
    source: ModelSource,
    step: int | None,
    tokenizer: Tokenizer | None,
    *,
    license: str,
    dtype: str,
    base: str = "",
) -> str:
    """The card as Markdown with the Hub's YAML front matter.

    Args:
      source: the model.
      step: the checkpoint that was exported.
      tokenizer: what is exported beside it, or None.
      license: as the Hub spells it; '' means apache-2.0, or 'other' for weights that were imported.
      dtype: of the exported tensors.
      base: for an adapter, what it calls its base.
    """
    run = source.saved.get("config", {}) if source.kind == "workdir" else {}
    name = run.get("name") or source.path.resolve().name
    chain = lineage(source, step)
    license = license or ("other" if is_published(chain) else "apache-2.0")
    parts = [
        _front_matter(license, base, chat=tokenizer is not None and bool(tokenizer.chat_template)),
        f"# {name}\n",
        _introduction(source, base),
        _architecture(source, dtype),
        _history(chain),
    ]
    parts += [_heldout(source.path, step), _tokenizer(tokenizer), _use(tokenizer, base)]
    return "\n".join(part for part in parts if part)


def _front_matter(license: str, base: str, chat: bool) -> str:
    lines = ["---", f"license: {license}", "language:", "- en"]
    lines += ["library_name: peft" if base else "library_name: transformers"]
    lines += ["pipeline_tag: text-generation"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["tags:", "- danube_jax", "- llm", *(["- lora"] if base else [])]
    lines += ["- conversational"] if chat else []
    return "\n".join([*lines, "---", ""])


def _introduction(source: ModelSource, base: str) -> str:
    if base:
        lora = source.lora
        assert lora is not None
        kind = "rank-stabilised LoRA" if lora.rslora else "LoRA"
        return (
            f"A {kind} adapter of rank {lora.rank} (alpha {lora.alpha:g}) on "
            f"{', '.join(lora.targets)} for `{base}`.\n"
        )
    family = hf_config.architecture(source.config).capitalize()
    merged = " A LoRA adapter is merged into it." if source.lora is not None else ""
    return f"A {family}-architecture language model exported by danube_jax.{merged}\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _architecture(source: ModelSource, dtype: str) -> str:
    config = source.config
    parameters = sum(tensor.size for leaf in layout(config) for tensor in leaf.tensors)
    window = f"{config.sliding_window:,}" if config.sliding_window else "none"
    rows = [
        ("parameters", f"{parameters:,}"),
        ("layers", config.num_hidden_layers),
        ("hidden size", f"{config.hidden_size:,}"),
        ("feed-forward size", f"{config.intermediate_size:,}"),
        (
            "attention heads / KV heads",
            f"{config.num_attention_heads} / {config.num_key_value_heads}",
        ),
        ("head size", config.head_size),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,}"),
        ("sliding window", window),
        ("RoPE theta", f"{config.rope_theta:,g}"),
        ("tied embeddings", "yes" if config.tie_word_embeddings else "no"),
        ("dtype of the files", dtype),
    ]
    return "## Model\n\n" + _table(("", ""), rows)


def lineage(source: ModelSource, step: int | None) -> list[tuple[ModelSource, int | None]]:
    """The models that led to a checkpoint, the first one first, as far as their folders are here.

    Args:
      source: the model.
      step: its checkpoint.
    """
    chain = [(source, step)]
    while len(chain) < _MAX_ANCESTORS and (parent := _parent(*chain[0])) is not None:
        chain.insert(0, parent)
    return chain


def _parent(source: ModelSource, step: int | None) -> tuple[ModelSource, int | None] | None:
    if source.base is not None:
        return source.base, source.base.step
    origin = source.meta(step).get("init_from") if step is not None else None
    if not origin:
        return None
    for wanted in (origin["step"], None):  # the checkpoint itself may be gone, the run not
        with contextlib.suppress(UserError):
            return open_model(origin["path"], wanted), origin["step"]
    return None


def _history(chain: Sequence[tuple[ModelSource, int | None]]) -> str:
    """How the model was trained: a section, with a part for each run where there were several."""
    parts = [part for source, step in chain if (part := _run_part(source, step))]
    if not parts:
        return ""
    if len(parts) == 1:
        (_, text) = parts[0]
        return f"## {'Origin' if is_published(chain) else 'Training'}\n\n{text}"
    numbered = [f"### {i}. {title}\n\n{text}" for i, (title, text) in enumerate(parts, 1)]
    return "## Training\n\n" + "\n".join(numbered)


def is_published(chain: Sequence[tuple[ModelSource, int | None]]) -> bool:
    """Whether the first model of a chain was not trained here, but imported."""
    source, step = chain[0]
    return source.kind == "huggingface" or (
        step is not None and bool(source.meta(step).get("imported_from"))
    )


def _run_part(source: ModelSource, step: int | None) -> tuple[str, str] | None:
    """(title, text) of one model of the chain; None where nothing is known of it."""
    run = source.saved.get("config", {}) if source.kind == "workdir" else {}
    meta = source.meta(step) if step is not None else {}
    name = run.get("name") or source.path.resolve().name
    if run.get("rounds"):
        return f"{name}: {_objective(run)}, {run['rounds'][0]['name']}", _tuning(run, meta)
    if run.get("phases"):
        return f"{name}: pretraining", f"{_training(run, meta)}\n{_phases(run)}"
    if not is_published([(source, step)]):
        return None
    origin = Path(str(meta.get("imported_from", source.path)))
    return f"{name}: published weights", f"Imported from the folder `{origin.resolve().name}`.\n"


def _objective(run: Mapping[str, Any]) -> str:
    return "supervised fine-tuning" if run["objective"] == "sft" else "DPO"


def _training(run: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    optimizer, training = run.get("optimizer", {}), run.get("training", {})
    precision = run.get("precision", {})
    origin = meta.get("init_from")
    began = "random weights"
    if origin:
        step = "" if origin["step"] is None else f", step {origin['step']:,}"
        taken = origin["take"].replace("_", " ")
        began = f"{taken} of {Path(origin['path']).name}{step}"
    rows = [
        ("began with", began),
        ("tokens seen", f"{meta.get('tokens', 0):,}"),
        ("steps", f"{meta.get('step', 0):,}"),
        ("batch", f"{training.get('batch_tokens', 0):,} tokens"),
        (
            "optimizer",
            f"AdamW, beta1 {optimizer.get('b1')}, beta2 {optimizer.get('b2')}, "
            f"weight decay {optimizer.get('weight_decay')}, "
            f"gradient norm clipped at {optimizer.get('clip_norm')}",
        ),
        (
            "learning rate",
            f"{optimizer.get('learning_rate'):g} after {optimizer.get('warmup_tokens'):,} tokens "
            f"of linear warm-up, cosine to {optimizer.get('final_learning_rate'):g}",
        ),
        ("precision", f"linear layers {precision.get('linear')}, else {precision.get('compute')}"),
    ]
    return _table(("", ""), rows)


def _tuning(run: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    row, chat, lora = run["rounds"][0], run["chat"], run["lora"]
    optimizer, dpo = run["optimizer"], run["dpo"]
    method = "all weights"
    if lora["rank"]:
        method = (
            f"LoRA of rank {lora['rank']}, alpha {lora['alpha']:g}, "
            f"dropout {lora['dropout']:g}, on "
            f"{', '.join(lora['targets'])}"
        )
    rows = [
        ("objective", _objective(run)),
        ("began with", Path(run["init_from"]["path"]).name or "random weights"),
        ("data", ", ".join(row["sources"])),
        ("trained", method),
        ("epochs", f"{row['epochs']:g}"),
        ("steps", f"{meta.get('step', 0):,}"),
        ("tokens seen, with padding", f"{meta.get('tokens', 0):,}"),
        ("rows a step, tokens a row", f"{row['batch_size']:,}, {row['context_length']:,}"),
        ("learning rate", f"{optimizer['learning_rate']:g}, cosine"),
        ("loss on", "answers" if chat["mask_prompt"] else "all tokens"),
    ]
    if run["objective"] == "dpo":
        smoothing = (
            f", label smoothing {dpo['label_smoothing']:g}" if dpo["label_smoothing"] else ""
        )
        rows.append(("preference loss", f"{dpo['loss']}, beta {dpo['beta']:g}{smoothing}"))
    return _table(("", ""), rows)


def _phases(run: Mapping[str, Any]) -> str:
    rows = []
    for phase in run["phases"]:
        total = sum(phase["mixture"].values()) or 1.0
        mixture = ", ".join(f"{n} {w / total:.1%}" for n, w in phase["mixture"].items() if w)
        rows.append(
            (phase["name"], f"{phase['tokens']:,}", f"{phase['context_length']:,}", mixture)
        )
    return "Phases:\n\n" + _table(("phase", "tokens", "context", "mixture"), rows)


def _heldout(workdir: Path, step: int | None) -> str:
    """The last evaluation up to the exported step."""
    last: Mapping[str, Any] | None = None
    try:
        for line in (workdir / METRICS).read_text().splitlines():
            row = json.loads(line)
            if row.get("kind") == "evaluation" and (step is None or row["step"] <= step):
                last = row
    except (OSError, ValueError, KeyError):
        return ""
    if last is None:
        return ""
    names = [key.removeprefix("loss/") for key in last if key.startswith("loss/")]
    if any(f"accuracy/{name}" in last for name in names):
        rows = [(n, f"{last[f'loss/{n}']:.4f}", f"{last[f'accuracy/{n}']:.1%}") for n in names]
        title = f"### Held-out preferences, step {last['step']:,}\n\n"
        return title + _table(("source", "loss", "accuracy"), rows)
    rows = [
        (name, f"{last[f'loss/{name}']:.4f}", f"{last.get(f'bits_per_byte/{name}', 0):.4f}")
        for name in names
    ]
    title = f"### Held-out text, step {last['step']:,}, context {last.get('context', 0):,}\n\n"
    return title + _table(("source", "loss (nats a token)", "bits a byte"), rows)


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "## Tokenizer\n\nNone is included.\n"
    text = f"## Tokenizer\n\n{tokenizer.vocab_size:,} ids"
    text += "; a prompt begins with BOS." if tokenizer.adds_bos else "; no BOS before a prompt."
    if tokenizer.chat_template is None:
        return text + " This is a base model without a chat format.\n"
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    rendered = tokenizer.render_chat(messages)
    return (
        f"{text} Chat format (`chat_template.jinja`), one question:\n\n```text\n{rendered}\n```\n"
    )


def _use(tokenizer: Tokenizer | None, base: str) -> str:
    chat = tokenizer is not None and tokenizer.chat_template is not None
    model = "AutoPeftModelForCausalLM" if base else "AutoModelForCausalLM"
    package = "peft" if base else "transformers"
    first = f"from {package} import {model}"
    lines = [first, "from transformers import AutoTokenizer", ""]
    if not base:
        lines = [f"from transformers import {model}, AutoTokenizer", ""]
    lines += [
        'folder = "path/of/this/folder"',
        f'model = {model}.from_pretrained(folder, dtype="auto")',
    ]
    if tokenizer is None:
        return "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if chat:
        lines += [
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("The most important thing about", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"
    if base:
        return text
    return (
        text + "\nvLLM serves the folder as it is (`vllm serve FOLDER`), and llama.cpp's "
        "`convert_hf_to_gguf.py FOLDER` makes a GGUF file of it.\n"
    )
