"""Files from others: none of them runs code, leaves its folder, or takes all time and memory."""

import ast
import contextlib
import json
import pickle
import shutil
import sqlite3
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from safetensors.numpy import load_file
from tiny_folder import CONFIG, copy_without
from tokenizer_models import byte_level_folder

from danube_jax.data import chat, template_process
from danube_jax.data.conversations import read_conversations
from danube_jax.data.message_trees import best_conversations, ranked_pairs, tree_message
from danube_jax.data.row_files import convert_rows
from danube_jax.data.token_store import TokenStore
from danube_jax.data.token_store_writer import TokenStoreWriter
from danube_jax.data.tokenizer import open_tokenizer
from danube_jax.errors import UserError
from danube_jax.evaluation.mt_bench import JudgePrompt, MTBench, Question, judge_messages
from danube_jax.interop import hf_config, safetensors_file
from danube_jax.interop.import_hf import import_model
from danube_jax.interop.model_source import open_model
from danube_jax.untrusted import parse_json

QUESTION = [{"role": "user", "content": "Why?"}]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("form", ["zip", "before PyTorch 1.6"])
def test_pickled_weights_run_nothing(form, commands, tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    trap, path = tmp_path / "trap", tmp_path / "model" / "pytorch_model.bin"
    copy_without(tiny_model, path.parent, "model.safetensors")
    state = {"model.norm.weight": torch.ones(32), "x": Evil(trap)}
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    pickle.loads(pickle.dumps(Evil(trap))).close()
    assert trap.exists()  # the trap works
    trap.unlink()
    done = commands.run("tools/convert_from_hf.py", f"--model={path.parent}", f"--output={trap}x")
    done.assert_refused(f"{path}: damaged or no PyTorch weights")
    assert not trap.exists()


def test_a_plain_pickle_under_the_name_of_weights_runs_nothing(tiny_model, tmp_path):
    pytest.importorskip("torch")
    trap = tmp_path / "trap"
    for name in ("pytorch_model.bin", "model.safetensors"):
        model = copy_without(tiny_model, tmp_path / name, "model.safetensors")
        (model / name).write_bytes(pickle.dumps(Evil(trap)))
        with pytest.raises(UserError, match=name):
            import_model(model, tmp_path / "out")
    assert not trap.exists()


def test_safetensors_come_before_pickled_weights(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "trap")))
    import_model(model, tmp_path / "out")
    assert not (tmp_path / "trap").exists()


def test_damaged_contents_of_a_zip_of_weights_are_noticed(tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    model = copy_without(tiny_model, tmp_path / "model", "model.safetensors")
    tensors = load_file(tiny_model / "model.safetensors")
    path = model / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    data = bytearray(path.read_bytes())
    at = data.find(tensors["model.embed_tokens.weight"].tobytes()[:64])
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"pytorch_model.bin: damaged \(Bad CRC-32"):
        import_model(model, tmp_path / "out")
    # PyTorch can be told to write no checksums: then there is nothing to compare with.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        stored = any(entry.CRC for entry in archive.infolist())
    if not stored:
        import_model(model, tmp_path / "out")


def test_lm_evals_cache_of_answers_is_no_pickle(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import CachingLM

    from danube_jax.evaluation.answer_cache import decode, encode, without_pickle

    class Model:
        def set_cache_hook(self, hook):
            pass

    trap, path = tmp_path / "trap", tmp_path / "cache.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        row = ("a", sqlite3.Binary(pickle.dumps(Evil(trap))))
        database.execute("INSERT INTO unnamed VALUES (?, ?)", row)
    with without_pickle():
        cache = CachingLM(Model(), str(path)).dbdict
        with pytest.raises(sqlite3.DatabaseError, match="damaged, or of another program"):
            cache["a"]
        cache["b"] = (-1.5, True)
        assert cache["b"] == (-1.5, True)
        cache.close()
    assert not trap.exists()
    for answer in ((-0.1 - 0.2, False), (float("-inf"), True), "text é", -7.25):
        assert decode(encode(answer)) == answer
    stored = encode((-1.5, True))
    for i in range(len(stored)):
        with pytest.raises(sqlite3.DatabaseError):
            decode(stored[:i] + chr(ord(stored[i]) ^ 1) + stored[i + 1 :])


# Templates that reach for the interpreter, or for all time and memory.
TEMPLATES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch TRAP') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format_map": "{{ '{a.__class__.__base__}'.format_map({'a': 1}) }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "a changed list": "{{ messages.append(messages) }}",
    "range": "{{ range(10**9)|list }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "repeated text": "{{ 'a' * 10**11 }}",
    "doubled text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "width": "{{ 'a'.ljust(300000000) }}",
    "long output": "{% for i in range(99999) %}" + "x" * 500 + "{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep": "{{ " + "(" * 4_000 + "1" + ")" * 4_000 + " }}",
    "a long complaint": "{{ raise_exception('x' * 10000000) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_kept_in_bounds(name, tmp_path, monkeypatch):
    monkeypatch.setattr(template_process, "CPU_SECONDS", 1.0)
    trap = tmp_path / "trap"
    begin = time.process_time()
    with pytest.raises(UserError, match="chat template") as refusal:
        chat.render(TEMPLATES[name].replace("TRAP", str(trap)), QUESTION, {"eos_token": "</s>"})
    assert len(str(refusal.value)) < 700
    assert not trap.exists()
    assert time.process_time() - begin < 2  # of this process: the work is done in another
    # The next one is rendered as if nothing had been.
    plain = "{{ messages[0].content }}{{ eos_token }}"
    assert chat.render(plain, QUESTION, {"eos_token": "</s>"}) == "Why?</s>"


def test_rendering_apart_is_rendering_here():
    conversation = [*QUESTION, {"role": "assistant", "content": "So é\udc00\udc01\n"}]
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    for template in (*chat.TEMPLATES.values(), marked):
        for options in ({"add_generation_prompt": True}, {"return_assistant_tokens_mask": True}):
            arguments = (template, conversation, {"eos_token": "</s>"}, options)
            here = template_process.render_here(*arguments)
            assert template_process.render_apart(*arguments) == here


def test_a_hostile_template_of_a_model_is_one_line(commands, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATES["repeated text"])
    done = commands.run("danube_jax.generate", f"--model={model}", "--prompt=a", "--chat")
    done.assert_refused("--prompt: the chat template needs more than 512 MiB of memory")


def test_code_beside_a_model_is_not_run(commands, tiny_model, tmp_path):
    trap = tmp_path / "trap"
    code = f"open({str(trap)!r}, 'w')\nclass Evil: pass\n"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "evil.py").write_text(code)
    (model / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "evil.E"}}))
    done = commands.run("danube_jax.generate", f"--model={model}", "--prompt=a")
    done.assert_refused("auto_map")
    tokens = byte_level_folder(tmp_path / "tokens", {"tokenizer_class": "Evil"})
    (tokens / "evil.py").write_text(code)
    for content in (
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        {"tokenizer_class": "Evil"},
    ):
        (tokens / "tokenizer_config.json").write_text(json.dumps(content))
        with contextlib.suppress(UserError):
            open_tokenizer(tokens)
    assert not trap.exists()


def test_code_beside_a_classifier_is_not_run(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("datatrove")
    from danube_jax.data.corpus.quality import ClassifierScorer

    trap = tmp_path / "trap"
    model = byte_level_folder(tmp_path / "model", {})
    (model / "evil.py").write_text(f"open({str(trap)!r}, 'w')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
    (model / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    with pytest.raises(UserError, match="not a sequence classifier"):
        ClassifierScorer(str(model))
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_shards_do_not_leave_their_folder(name, tiny_model, tmp_path):
    model = copy_without(tiny_model, tmp_path / "a" / "model", "model.safetensors")
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "a")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (model / index).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(UserError, match=r"expected a file name|missing"):
            import_model(model, tmp_path / "out")
        (model / index).unlink()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../tokens.npy"),
        ("offsets_file", "/etc/passwd"),
        ("dtype", "O"),
        ("dtype", "int64"),
    ],
)
def test_a_token_stores_manifest_does_not_leave_its_folder(key, value, tmp_path):
    store = tmp_path / "store"
    with TokenStoreWriter(store, vocab_size=300, tokenizer="t", provenance={}) as writer:
        writer.add([1, 2, 3], 3)
        writer.finish()
    shutil.copy(store / "tokens-00000.npy", tmp_path / "tokens.npy")
    manifest = json.loads((store / "store.json").read_text())
    (manifest if key == "dtype" else manifest["shards"][0])[key] = value
    (store / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"store\.json: "):
        TokenStore.open(store)


def _safetensors(header, body=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "an endless header": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": _safetensors(b"{"),
    "not UTF-8": _safetensors(b'{"\xff": 1}'),
    "a list": _safetensors([]),
    "deep": _safetensors(b'{"a":' + b"[" * 100_000),
    "twice": _safetensors(
        b'{"a":' + json.dumps(_entry()).encode() + b',"a":' + json.dumps(_entry()).encode() + b"}",
        b"\0" * 4,
    ),
    "an infinite shape": _safetensors(
        json.dumps({"a": _entry()}).replace("[1]", "[1e999]").encode(), b"\0" * 4
    ),
    "a shape of truths": _safetensors({"a": _entry(shape=[True])}, b"\0" * 4),
    "a negative shape": _safetensors({"a": _entry(shape=[-1, -1])}, b"\0" * 4),
    "a huge shape": _safetensors({"a": _entry(shape=[2**62, 2**62])}, b"\0" * 4),
    "an overlap": _safetensors({"a": _entry(), "b": _entry(offsets=(2, 6))}, b"\0" * 6),
    "a hole": _safetensors({"a": _entry(), "b": _entry(offsets=(8, 12))}, b"\0" * 12),
    "an offset before the data": _safetensors({"a": _entry(offsets=(-4, 0))}),
    "too short": _safetensors({"a": _entry()}, b"\0" * 3),
    "too long": _safetensors({"a": _entry()}, b"\0" * 5),
    "unknown dtype": _safetensors({"a": _entry("F128")}, b"\0" * 4),
    "three offsets": _safetensors({"a": _entry(offsets=(0, 4, 4))}, b"\0" * 4),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused_in_a_line(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(UserError, match=r"model\.safetensors: "):
        safetensors_file.read_header(path)


CONFIGS = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a number of many digits": {"hidden_size": 10**400},
    "a theta of many digits": {"rope_theta": 10**400},
    "a theta in words": {"rope_theta": "many"},
    "two thetas": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": "x"}},
    "no number": {"rms_norm_eps": float("nan")},
    "infinite": {"rms_norm_eps": float("inf")},
    "a family that is a list": {"model_type": ["llama"]},
    "architectures that are text": {"architectures": "LlamaForCausalLM"},
    "architectures of lists": {"architectures": [["LlamaForCausalLM"]]},
    "layers of lists": {"layer_types": [["full_attention"]]},
    "layers that are a number": {"layer_types": 7},
    "a slip": {"rope_thetb": 5.0, "rope_theta": None, "tie_word_embeddingt": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused_in_a_line(name, tmp_path):
    content = {k: v for k, v in (CONFIG | CONFIGS[name]).items() if v is not None}
    if name == "a slip":
        del content["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: ") as refusal:
        hf_config.read_config(tmp_path)
    assert len(str(refusal.value)) < 1_000


@pytest.mark.parametrize("stated", ["2", [2, "3"], 2.0, True, -1, 2**40, {"a": 1}])
def test_hostile_ends_of_text_are_refused_in_a_line(stated, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(UserError, match="eos_token_id is"):
        open_model(model).eos_ids()


def test_a_judges_prompt_can_name_fields_and_no_more():
    question = Question(1, "writing", ("Q", "R"), ())

    def asked(template):
        prompts = {"single-v1": JudgePrompt("s", template)}
        return judge_messages(MTBench((question,), prompts), question, ("A", "B"), 1)

    assert asked("{{x}} {question}|{answer}")[1]["content"] == "{x} Q|A"
    for template in (
        "{question.__class__}",
        "{question[0]}",
        "{question:>1000000000}",
        "{question!r}",
        "{nothing}",
        "{",
        "{0}",
    ):
        with pytest.raises(UserError, match="'single-v1' cannot be filled in"):
            asked(template)


def test_trees_that_go_round_in_a_circle_end():
    rows = [
        {"message_id": i, "parent_id": parent, "text": "x", "role": role, "rank": rank}
        for i, parent, role, rank in (
            ("a", "b", "prompter", None),
            ("b", "a", "assistant", 0),
            ("c", "a", "assistant", 1),
            ("d", "d", "assistant", 0),
        )
    ]
    messages = [tree_message(row) for row in rows]
    assert best_conversations(messages) == []
    assert ranked_pairs(messages) == []
    with pytest.raises(UserError, match="'a' stands in two rows"):
        best_conversations([*messages, messages[0]])


def test_half_a_surrogate_pair_is_none_however_it_is_spelt():
    for value in range(0xD800, 0xE000, 0x55):
        for spelt in (f"\\u{value:x}", f"\\u{value:X}"):
            for text in (f'"{spelt}"', f'{{"a": ["b{spelt}c"]}}', f'{{"{spelt}": 1}}'):
                with pytest.raises(ValueError, match="half of a surrogate pair"):
                    parse_json(text)
    assert parse_json(r'"\ud83d\ude42 \\udc00 \u00e9"') == "🙂 \\udc00 é"


ROWS = {
    "a speaker that is a list": b'{"conversations": [{"from": ["human"], "value": "a"}]}',
    "deep": b'{"prompt": ' + b"[" * 100_000,
    "half a surrogate pair": rb'{"prompt": "a\ud800", "response": "b"}',
    "NaN": b"NaN",
    "a text": b'"a"',
    "a huge number": b'{"prompt": ' + b"9" * 5_000 + b', "response": "b"}',
    "text that is a number": b'{"prompt": 1, "response": 2}',
}


@pytest.mark.parametrize("name", ROWS)
def test_hostile_rows_are_refused_in_a_line(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS[name] + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: "):
        read_conversations(path)


def test_text_in_parquet_that_is_not_utf8_is_refused_by_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.utf8())
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), path)
    with pytest.raises(UserError, match=r"rows\.parquet, row 2: not UTF-8 \(byte 0xff at 0\)"):
        convert_rows(path, lambda row: [row])
    rows, skipped = convert_rows(path, lambda row: [row], on_bad_row="skip")
    assert (rows, skipped) == ([{"prompt": "good"}], 1)


def test_a_quality_model_that_was_changed_is_refused(tmp_path):
    pytest.importorskip("lightgbm")
    from danube_jax.data.corpus import quality_trees

    texts = [f"a text of {i} words and more of them, number {i}" for i in range(30)]
    path = tmp_path / "quality.json"
    quality_trees.train(texts, [text.upper() + "!!" for text in texts], rounds=2).save(path)
    quality_trees.TreesScorer.load(path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for at in random.choice(len(whole), 60, replace=False).tolist():
        changed = bytearray(whole)
        changed[at] ^= 1 << int(random.integers(7))
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            if json.loads(changed) == json.loads(whole):
                continue  # white space
        with pytest.raises(UserError, match=r"quality\.json: not a quality model"):
            quality_trees.TreesScorer.load(path)


FORBIDDEN = {
    "pickle": "unpickling runs what the file says",
    "dill": "unpickling runs what the file says",
    "marshal": "loads code",
    "shelve": "unpickles",
    "joblib": "unpickles",
    "eval": "runs text as code",
    "exec": "runs text as code",
}


def test_nothing_in_the_source_loads_code():
    """A net under the tests above: calls that would run what a file says do not come back."""
    paths = [*(ROOT / "danube_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert len(paths) > 150
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                names = {node.func.id} if isinstance(node.func, ast.Name) else set()
                _check_call(node, where)
            else:
                continue
            assert not names & FORBIDDEN.keys(), f"{where}: {names}"


# `parse` gives the events of a file and makes no object.
_SAFE_YAML = ("yaml.safe_load", "yaml.safe_dump", "yaml.parse")


def _check_call(node: ast.Call, where: str) -> None:
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    function = ast.unparse(node.func)
    assert options.get("shell", "False") == "False", where
    assert options.get("trust_remote_code", "False") == "False", where
    assert options.get("allow_pickle", "False") == "False", where
    if function.endswith("torch.load"):
        assert options.get("weights_only") == "True", where
    if function.startswith("yaml."):
        assert function.split("(")[0] in _SAFE_YAML, where
    if function.split(".")[-1] == "from_pretrained" and "Auto" in function:
        named = function.split(".")[-2]
        if named in ("AutoTokenizer", "AutoModelForSequenceClassification"):
            assert "trust_remote_code" in options or "verify" in where, where
