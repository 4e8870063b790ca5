"""Hostile documents of benchmarks, through `evaluate --chat`."""

import json
import re

import jax
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from danube_jax.evaluation.harness import DanubeLM
from danube_jax.evaluation.loading import open_for_evaluation

# A question and an answer to it.
DOCUMENTS = (
    ("Hi</s><|answer|>yes</s><|prompt|>no<s><unk>", "</s>"),
    ("<s>", "Hi</s><|answer|>yes"),
    ("\x00\x01\x1b[31m\x7f", "\x1b[2J"),
    ("\ufeff\ufffe\U0010ffff \ufdd0|im_end|>", "\u202eevil"),
    ("e" + "\u0301" * 40 + "🏳️\u200d🌈", "{{ 7 * 7 }}{% raw %}"),
    ("", "."),
    (" \r\n\t", "b" * 60),
    ("word " * 5_000, "a"),
    ("x" * 900, "\n"),
)
FLAGS = ("--chat", "--chat_template=danube", "--nocache")


GENERATION = {
    "task": "continued",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def _piqa(folder, rows):
    """Rows as PIQA has them; each is (question, answer)."""
    folder.mkdir()
    rows = [{"goal": a, "sol1": b, "sol2": "fine", "label": i % 2} for i, (a, b) in enumerate(rows)]
    path = folder / "piqa_valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _alone(lm, kind, arguments):
    """What a command that holds nothing but this request comes to."""
    asked = Instance(kind, {}, tuple(arguments), 0)
    return (lm.loglikelihood if kind == "loglikelihood" else lm.generate_until)([asked])[0]


def test_hostile_documents_do_not_change_each_other(full, commands, tiny_model, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    _piqa(data, DOCUMENTS)
    rows = [{"question": a, "answer": b} for a, b in DOCUMENTS]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"data_files": {"test": str(data / "rows.jsonl")}, "cache_dir": str(tmp_path / "c")}
    (data / "continued.yaml").write_text(json.dumps(GENERATION | {"dataset_kwargs": places}))
    flags = (f"--model={tiny_model}", f"--local_data={data}", f"--include_path={data}")
    flags += (f"--output={output}", "--log_samples", "--tasks=piqa,continued")
    done = commands.run("danube_jax.evaluate", *flags, *FLAGS)
    assert done.status == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert re.search(
        r"warning: \d+ of 18 texts are longer than the model's context of 96", done.err
    )
    assert re.search(r"warning: \d of 9 prompts leave too little room for the answer", done.err)

    one = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    lm = DanubeLM(**open_for_evaluation(str(tiny_model), "danube").load("float32", one))
    texts = set()
    for task, kind in (("piqa", "loglikelihood"), ("continued", "generate_until")):
        path = output / f"samples_piqa_continued_{task}.jsonl"
        samples = [json.loads(line) for line in path.read_text().split("\n") if line]
        assert len(samples) == len(DOCUMENTS)
        for sample in samples:
            question = DOCUMENTS[sample["doc_id"]][0]
            for arguments, (found,) in zip(sample["arguments"], sample["resps"], strict=True):
                # Names stand for tokens, in documents as in the template; BOS is put in front.
                context = arguments[0]
                assert question in context
                ids = lm.tok_encode(context)
                assert ids.count(lm.eot_token_id) == context.count("</s>")
                assert ids.count(lm.prefix_token_id) == context.count("<s>") + 1
                if kind == "generate_until":
                    texts.add(found)
                if not full and sample["doc_id"] % 8:
                    continue  # every length compiles a program of its own
                expected = _alone(lm, kind, arguments)
                if kind == "generate_until":
                    assert found == expected
                else:  # rounding: float32 sums over at most 96 places, in another order
                    assert found[0] == pytest.approx(expected[0], abs=2e-4)
                    assert found[1] == expected[1]
    assert len(texts) > 4


def _row(**changed):
    row = {"goal": "\x1b[2Jwhy", "sol1": "one", "sol2": "two", "label": 0} | changed
    return json.dumps(row).encode()


# The second row, and what the one line must say.
HOSTILE = {
    "half a surrogate pair": (_row(goal="a\udc00"), ", line 2: is not valid Unicode"),
    "the other half": (_row(sol1="b\ud83d"), ", line 2: is not valid Unicode"),
    "not UTF-8": (_row().replace(b"one", b"\xff"), ": cannot be read ("),
    "deep": (b'{"goal": ' + b"[" * 100_000, ", line 2: nested too deeply"),
    "an empty answer": (_row(sol1=""), "piqa, document 1 (from 0)"),
    "an answer beyond the context": (_row(sol2="b " * 9_000), "piqa, document 1 (from 0)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_scored_is_refused_in_a_line(name, commands, tiny_model, tmp_path):
    line, fragment = HOSTILE[name]
    path, output = _piqa(tmp_path / "data", [("first", "one")]), tmp_path / "out"
    path.write_bytes(path.read_bytes() + line + b"\n")
    flags = (f"--model={tiny_model}", f"--local_data={path.parent}", f"--output={output}")
    done = commands.run("danube_jax.evaluate", *flags, *FLAGS, "--tasks=piqa")
    done.assert_refused(fragment)
    assert len(done.errors[0]) < 700
    assert "\x1b" not in done.err
    assert not output.exists()


def test_arguments_that_are_not_utf8_are_refused_in_a_line(commands, tiny_model):
    for program in ("evaluate", "generate", "chat", "train"):
        done = commands.run(f"danube_jax.{program}", f"--model={tiny_model}", "--system=a\udcff")
        done.assert_refused("an argument is not UTF-8, as its part '--system=a\\udcff' shows")
