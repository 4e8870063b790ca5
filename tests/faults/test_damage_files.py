"""Flipped bits and truncation in files that come from outside, through the real command lines."""

import json
from pathlib import Path

import pytest
import sentencepiece
from file_damage import check, damages
from file_kinds import CORPUS, QUICK, SLOW, convert, mt_bench, never
from fork_commands import TRACEBACK
from scripted_judge import ScriptedJudge, completion
from sentencepiece import sentencepiece_model_pb2
from tiny_folder import write_tiny_folder
from tuning_config import conversation_rows, write_config, write_rows

pytest.importorskip("lm_eval")

FULL_QUICK, FULL_SLOW = 40, 10  # damages a kind in the full form


@pytest.mark.parametrize("name", QUICK)
def test_quick_damage(name, commands, tmp_path):
    assert sum(check(QUICK[name](commands, tmp_path), name, 4).values()) == 4


@pytest.mark.faults
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_damage(name, commands, tmp_path, figures):
    count = FULL_QUICK if name in QUICK else FULL_SLOW
    outcomes = check((QUICK | SLOW)[name](commands, tmp_path), name, count)
    assert sum(outcomes.values()) == count
    figures(f"damage of {name}", damages=count, outcomes=dict(outcomes))


def _piece_that_is_not_utf8(path: Path) -> None:
    """Damages a byte of the first piece of three ASCII letters in a SentencePiece model's file."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    piece = next(p.piece for p in proto.pieces if len(p.piece) == 3 and p.piece.isalpha())
    data, field = path.read_bytes(), b"\x0a\x03"  # field 1, three bytes
    assert data.count(field + piece.encode()) == 1
    damaged = data.replace(field + piece.encode(), field + piece[0].encode() + b"\xff" + b"e")
    assert sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(damaged)
    path.write_bytes(damaged)


def test_a_tokenizers_piece_that_is_not_utf8_is_refused_by_every_command(commands, tmp_path):
    """SentencePiece itself loads such a file, and fails when it is asked for the piece."""
    folder, run = write_tiny_folder(tmp_path / "model"), tmp_path / "run"
    done, _ = convert(commands, folder, run)
    assert done.status == 0, done.err
    rows = write_rows(tmp_path / "rows.jsonl", conversation_rows())
    tuning = write_config(tmp_path / "tuning.py", objective="sft", base=folder, data=rows)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "a b c"}) + "\n")
    corpus = tmp_path / "corpus.py"
    corpus.write_text(CORPUS.format(output=tmp_path / "corpus", path=text))
    for path in (folder / "tokenizer.model", run / "tokenizer" / "tokenizer.model"):
        _piece_that_is_not_utf8(path)
    named = str(folder / "tokenizer.model")
    (run / "tokenizer" / "SHA256SUMS").unlink()  # which would tell, too
    output = tmp_path / "output"
    for program, flags in {
        "danube_jax.generate": (f"--model={folder}", "--prompt=a"),
        "danube_jax.train": (f"--config={tuning}", f"--workdir={output}"),
        "tools/prepare_data.py": (
            f"--config={corpus}",
            f"--config.tokenizer.path={named}",
            "--config.tokenizer.train_vocab_size=0",
        ),
        "tools/convert_from_hf.py": (f"--model={folder}", f"--output={output}"),
        "tools/convert_to_hf.py": (f"--model={run}", f"--output={output}", "--noverify"),
    }.items():
        done = commands.run(program, *flags)
        assert done.status == 2, done
        assert TRACEBACK not in done.err
        path = run / "tokenizer" / "tokenizer.model" if "to_hf" in program else named
        (line,) = done.errors
        assert line.startswith(f"error: {path}: damaged or not a SentencePiece model; "), line
        assert not output.exists(), program


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 6))]
)
def test_damaged_replies_of_a_judge(seed, commands, tmp_path):
    """Every reply but the first is damaged; what is no verdict is asked for again."""
    reply = completion("It is fine.\\n\\nRating: [[7]]")[1]

    def script(number, body):
        damaged = list(damages(reply, f"reply {seed}", 1, number))
        return 200, damaged[0][1] if number else reply

    kind = mt_bench(commands, tmp_path, "mt_bench_question.jsonl", never, ScriptedJudge(script))
    done, _ = kind.run()
    assert done.status in (0, 2), done.err
    assert TRACEBACK not in done.err
    assert len(done.errors) == (done.status == 2), done.err
    for line in (tmp_path / "out" / "mt_bench_judgments.jsonl").read_text().splitlines():
        grade = json.loads(line)
        assert f"[{grade['score']:g}" in grade["text"]  # never one that no reply has
