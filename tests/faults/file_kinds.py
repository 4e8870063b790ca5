"""Files that come from outside, and the command that reads each: what `check` damages."""

import functools
import gzip
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from file_damage import Kind, Result, other_json, other_lines
from fork_commands import ForkServer
from safetensors.numpy import load_file, save_file
from scripted_judge import ScriptedJudge, completion
from tiny_folder import CONFIG, write_tiny_folder
from tokenizer_models import LINES, byte_level_folder
from tuning_config import conversation_rows, write_config, write_rows

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
# Values of a config.json that nothing else in the folder confirms, and others that are not used.
FREE = (
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


def _model(tmp: Path) -> Path:
    folder = write_tiny_folder(tmp / "model")
    config = {"temperature": 0.9, "do_sample": True, "top_k": 7, "max_new_tokens": 6}
    (folder / "generation_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "chat_template": CHAT_TEMPLATE})
    )
    return folder


def _byte_level_model(tmp: Path) -> Path:
    folder = write_tiny_folder(tmp / "model")
    (folder / "tokenizer.model").unlink()
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return byte_level_folder(folder, tokens)


def _generate(server: ForkServer, folder: Path, *arguments: str) -> Result:
    done = server.run("danube_jax.generate", f"--model={folder}", "--json", *arguments)
    return done, done.out


def _asked(server: ForkServer, tmp: Path, name: str, means_other, build=_model, *flags) -> Kind:
    """A file of a model's folder; the model answers."""
    folder = build(tmp)
    flags = flags or ("--prompt=The while é", "--max_tokens=6")
    run = functools.partial(_generate, server, folder, *flags)
    return Kind(folder / name, run, means_other, (name, str(folder)))


def convert(server: ForkServer, folder: Path, output: Path, *flags: str) -> Result:
    shutil.rmtree(output, ignore_errors=True)
    done = server.run("tools/convert_from_hf.py", f"--model={folder}", f"--output={output}", *flags)
    return done, _weights(output) if done.status == 0 else None


def _weights(workdir: Path) -> str:
    """A digest of a checkpoint's arrays."""
    from danube_jax.interop.step_params import StepParams

    params = StepParams(workdir / "checkpoints" / "0")
    digest = hashlib.sha256()
    for path, array in sorted(params.read(params.leaves).items()):
        digest.update(repr((path, array.shape, str(array.dtype))).encode() + array.tobytes())
    return digest.hexdigest()


def _other_payload(intact: bytes, damaged: bytes) -> bool:
    """Tensors of a safetensors file that differ in their bytes alone."""
    begin = 8 + struct.unpack("<Q", intact[:8])[0]
    return len(damaged) == len(intact) and damaged[:begin] == intact[:begin]


def _safetensors(server: ForkServer, tmp: Path) -> Kind:
    folder, output = write_tiny_folder(tmp / "model"), tmp / "out"
    run = functools.partial(convert, server, folder, output)
    names = ("model.safetensors", str(folder))
    return Kind(folder / names[0], run, _other_payload, names, output)


def _safetensors_header(server: ForkServer, tmp: Path) -> Kind:
    """Weights so small that most of the file is its header."""
    kind = _safetensors(server, tmp)
    config = CONFIG | {"hidden_size": 8, "intermediate_size": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 2, "num_hidden_layers": 6, "vocab_size": 600}
    (kind.path.parent / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.ones((600, 8), np.float16)}
    for i in range(6):
        prefix = f"model.layers.{i}."
        shapes = {"q_proj": (4, 8), "k_proj": (2, 8), "v_proj": (2, 8), "o_proj": (8, 4)}
        shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
        shapes |= {"mlp.gate_proj": (2, 8), "mlp.up_proj": (2, 8), "mlp.down_proj": (8, 2)}
        shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
        for number, (name, shape) in enumerate(shapes.items()):
            tensors[f"{prefix}{name}.weight"] = np.full(shape, 10 * i + number, np.float16)
    tensors["model.norm.weight"] = np.ones(8, np.float16)
    save_file(tensors, kind.path, metadata={"format": "pt"})
    return kind


def _index(server: ForkServer, tmp: Path) -> Kind:
    kind = _safetensors(server, tmp)
    folder = kind.path.parent
    tensors = load_file(kind.path)
    kind.path.unlink()
    names, files = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    path = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 1}, "weight_map": files}
    path.write_text(json.dumps(content, indent=1))
    never = other_json("total_size")  # nothing in it is free, but what is not used
    return Kind(path, kind.run, never, (path.name, str(folder)), kind.output)


def _torch_bin(server: ForkServer, tmp: Path) -> Kind:
    torch = pytest.importorskip("torch")
    kind = _safetensors(server, tmp)
    path = kind.path.with_name("pytorch_model.bin")
    torch.save({name: torch.from_numpy(x) for name, x in load_file(kind.path).items()}, path)
    kind.path.unlink()
    return Kind(path, kind.run, lambda *_: False, (path.name, str(path.parent)), kind.output)


def _adapter(server: ForkServer, tmp: Path, name: str, means_other) -> Kind:
    base, folder, output = write_tiny_folder(tmp / "base"), tmp / "adapter", tmp / "out"
    folder.mkdir()
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}
    content |= {"lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    content |= {"base_model_name_or_path": str(base), "use_dora": False, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    tensors = {}
    for i in range(CONFIG["num_hidden_layers"]):
        for module, rows in (("q_proj", 32), ("v_proj", 16)):
            prefix = f"base_model.model.model.layers.{i}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = np.full((4, 32), i + 1, np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.full((rows, 4), i + 2, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def run() -> Result:
        done, weights = convert(server, folder, output, f"--base={base}")
        meta = output / "checkpoints" / "0" / "meta" / "metadata"
        return done, (weights, json.loads(meta.read_text())["lora"] if weights else None)

    return Kind(folder / name, run, means_other, (name, str(folder)), output)


def _prompts(server: ForkServer, tmp: Path) -> Kind:
    path, output = tmp / "prompts.jsonl", tmp / "answers.jsonl"
    rows = [{"prompt": "The while"}, {"id": "b", "messages": [{"role": "user", "content": "Hi"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = write_tiny_folder(tmp / "model")

    def run() -> Result:
        output.unlink(missing_ok=True)
        flags = (f"--batch_file={path}", f"--output={output}", "--max_tokens=4")
        done, _ = _generate(server, folder, *flags)
        return done, output.read_text() if done.status == 0 else None

    return Kind(path, run, other_lines, output=output)


def _saved_chat(server: ForkServer, tmp: Path) -> Kind:
    folder, path, copy = write_tiny_folder(tmp / "model"), tmp / "chat.json", tmp / "copy.json"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}]
    messages.append({"role": "assistant", "content": "Hello"})
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8")

    def run() -> Result:
        copy.unlink(missing_ok=True)
        words = f"/load {path}\n/save {copy}\n"
        done = server.run("danube_jax.chat", f"--model={folder}", stdin=words)
        if copy.exists():
            return done, copy.read_text()
        # The chat goes on after a mistake: two lines, since there is then nothing to be saved.
        assert done.errors[1:] == ["error: nothing was said yet"], done.err
        return _as_refusal(done), None

    return Kind(path, run, other_json("role", "content"))


def _as_refusal(done):
    return type(done)(done.arguments, 2, done.out, done.errors[0])


def _tuning(server: ForkServer, tmp: Path, name: str, means_other) -> Kind:
    path, base = tmp / name, write_tiny_folder(tmp / "base")
    rows = conversation_rows()
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    config = write_config(tmp / "config.py", objective="sft", base=base, data=path)
    workdir = tmp / "run"

    def run() -> Result:
        shutil.rmtree(workdir, ignore_errors=True)
        flags = ("--config.rounds[0].epochs=0.05", "--config.samples.prompts=()")
        done = server.run(
            "danube_jax.train", f"--config={config}", f"--workdir={workdir}", *flags, seconds=500
        )
        return done, _losses(workdir) if done.status == 0 else None

    return Kind(path, run, means_other)


def _losses(workdir: Path) -> list[float]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def _preparation(server: ForkServer, tmp: Path, name: str, means_other) -> Kind:
    path, output = tmp / "text" / name, tmp / "corpus"
    path.parent.mkdir()
    texts = ["\n".join(LINES[i : i + 8]) for i in range(0, 240, 8)]
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(_compressed(data, name))
    config = tmp / "corpus.py"
    config.write_text(CORPUS.format(output=output, path=path))

    def run() -> Result:
        shutil.rmtree(output, ignore_errors=True)
        done = server.run("tools/prepare_data.py", f"--config={config}", seconds=500)
        return done, _store_digest(output) if done.status == 0 else None

    return Kind(path, run, means_other)


def _compressed(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    if name.endswith(".zst"):
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    if name.endswith(".xz"):
        import lzma

        return lzma.compress(data)
    return data


CORPUS = """
from danube_jax.data.corpus.config import corpus_config, text_source

def get_config():
    config = corpus_config()
    config.output = "{output}"
    config.sources = {{"text": text_source(path="{path}")}}
    config.tokenizer.train_vocab_size = 400
    config.executor.workers = 1
    for step in ("language", "gopher_repetition", "gopher_quality", "fineweb", "masking"):
        config.steps[step].enabled = False
    return config
"""


def _store_digest(output: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((output / "stores").rglob("*.npy")):
        digest.update(str(path.relative_to(output)).encode() + path.read_bytes())
    return digest.hexdigest()


def _benchmark(server: ForkServer, tmp: Path, name: str, means_other) -> Kind:
    folder, path = write_tiny_folder(tmp / "model"), tmp / "data" / name
    path.parent.mkdir()
    rows = [{"goal": f"do {i}", "sol1": "this", "sol2": "that", "label": i % 2} for i in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if name.endswith(".gz") else text)
    flags = (f"--model={folder}", "--tasks=piqa", f"--local_data={path.parent}", "--nocache")

    def run() -> Result:
        output = tmp / "out"
        shutil.rmtree(output, ignore_errors=True)
        done = server.run(
            "danube_jax.evaluate", *flags, f"--output={output}", "--log_samples", seconds=500
        )
        samples = output / "samples_piqa_piqa.jsonl"
        return done, samples.read_text() if done.status == 0 else None

    return Kind(path, run, means_other)


def mt_bench(
    server: ForkServer, tmp: Path, name: str, means_other, judge: ScriptedJudge | None = None
) -> Kind:
    folder, data, output = write_tiny_folder(tmp / "model"), tmp / "bench", tmp / "out"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    data.mkdir()
    _write_mt_bench(data)
    kept = tmp / "kept.jsonl"  # answers and judgements of a run that was stopped

    def run() -> Result:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        if kept.is_file():
            shutil.copy(kept, output / name)
        flags = (f"--model={folder}", "--tasks=mt_bench", f"--mt_bench={data}", "--judge_model=j")
        script = judge or ScriptedJudge(lambda number, body: completion("Good. [[7]]"))
        with script.running():
            done = server.run(
                "danube_jax.evaluate",
                *flags,
                f"--output={output}",
                f"--judge_url={script.url}",
                "--judge_attempts=2",
                seconds=500,
            )
        result = output / "mt_bench.json"
        if done.status:
            return done, None
        summary = json.loads(result.read_text())
        del summary["judge"]
        answers = (output / "mt_bench_answers.jsonl").read_bytes().split(b"\n")
        # Rows, not bytes: \u001b and \u001B are the same character.
        rows = [json.loads(line) for line in answers if line]
        return done, (summary, sorted(rows, key=lambda row: row["question_id"]))

    if name in ("mt_bench_answers.jsonl", "mt_bench_judgments.jsonl"):
        finished, _ = run()
        assert finished.status == 0, finished.err
        shutil.copy(output / name, kept)
        return Kind(kept, run, means_other)
    return Kind(data / name, run, means_other)


def _write_mt_bench(folder: Path) -> None:
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice that?"]},
    ]
    answer = {"question_id": 111, "choices": [{"index": 0, "turns": ["2", "4"]}]}
    text = "{question}|{answer}"
    multi = "{question_1}|{answer_1}|{question_2}|{answer_2}"
    templates = {"single-v1": text, "single-math-v1": text + "|{ref_answer_1}"}
    templates |= {"single-v1-multi-turn": multi}
    templates |= {"single-math-v1-multi-turn": multi + "|{ref_answer_2}"}
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": text}
        for name, text in templates.items()
    ]
    write_rows(folder / "mt_bench_question.jsonl", rows)
    write_rows(folder / "mt_bench_reference.jsonl", [answer])
    write_rows(folder / "judge_prompts.jsonl", prompts)


def never(intact: bytes, damaged: bytes) -> bool:
    return False


def _always(intact: bytes, damaged: bytes) -> bool:
    """No file of this format can tell: it has neither checksum nor redundancy."""
    return True


Build = Callable[[ForkServer, Path], Kind]


def _of(build, *arguments) -> Build:
    return lambda server, tmp: build(server, tmp, *arguments)


QUICK: dict[str, Build] = {
    "safetensors": _safetensors,
    "safetensors header": _safetensors_header,
    "index": _index,
    "PyTorch weights": _torch_bin,
    "adapter_config.json": _of(
        _adapter, "adapter_config.json", other_json("lora_alpha", "lora_dropout", "use_rslora")
    ),
    "adapter weights": _of(_adapter, "adapter_model.safetensors", _other_payload),
}
SLOW: dict[str, Build] = {
    "config.json": _of(_asked, "config.json", other_json(*FREE)),
    "generation_config.json": _of(_asked, "generation_config.json", other_json()),
    "tokenizer_config.json": _of(_asked, "tokenizer_config.json", other_json()),
    "tokenizer.model": _of(_asked, "tokenizer.model", _always),
    "tokenizer.json": _of(_asked, "tokenizer.json", other_json(), _byte_level_model),
    "prompts": _prompts,
    "saved chat": _saved_chat,
    "tuning JSONL": _of(_tuning, "rows.jsonl", other_lines),
    "tuning gzip": _of(_tuning, "rows.jsonl.gz", never),
    "tuning Parquet": _of(_tuning, "rows.parquet", never),
    "corpus JSONL": _of(_preparation, "a.jsonl", other_lines),
    "corpus gzip": _of(_preparation, "a.jsonl.gz", never),
    "corpus Zstandard": _of(_preparation, "a.jsonl.zst", never),
    "corpus xz": _of(_preparation, "a.jsonl.xz", never),
    "corpus Parquet": _of(_preparation, "a.parquet", never),
    "benchmark JSONL": _of(_benchmark, "piqa_valid.jsonl", other_lines),
    "benchmark gzip": _of(_benchmark, "piqa_valid.jsonl.gz", never),
    "MT-Bench questions": _of(mt_bench, "mt_bench_question.jsonl", other_lines),
    "MT-Bench references": _of(mt_bench, "mt_bench_reference.jsonl", other_lines),
    "MT-Bench judge prompts": _of(mt_bench, "judge_prompts.jsonl", other_lines),
    "MT-Bench answers": _of(mt_bench, "mt_bench_answers.jsonl", never),
    "MT-Bench judgments": _of(mt_bench, "mt_bench_judgments.jsonl", never),
}
