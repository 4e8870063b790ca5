"""MT-Bench: two turns of 80 questions, answered by a chat model and graded by a judge.

Single-answer grading as in FastChat (arXiv 2306.05685): the temperature of an answer goes by the
question's category; math, reasoning and coding are graded beside a reference answer; each turn has
a score from 1 to 10. A reply of the judge without a score is never counted as one.

The files are the user's: questions, judge prompts and reference answers, as FastChat publishes
them.
"""

import dataclasses
import gzip
import json
import string
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from danube_jax import files
from danube_jax.console import progress, warn
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.evaluation.judge import Judge, JudgeError
from danube_jax.files import sha256_json
from danube_jax.inference.conversation import Conversation, fit
from danube_jax.inference.requests import trim_answer
from danube_jax.inference.sampling import SamplingConfig
from danube_jax.untrusted import READ_ERRORS, parse_json

TURNS = 2
MAX_TOKENS = 1_024
# FastChat's temperature_config; 0.7 for a category that is not here.
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
_PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of two turns, with reference answers where its category has them."""

    id: int
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told: a system text, and a template with FastChat's fields."""

    system: str
    template: str


@dataclasses.dataclass(frozen=True)
class MTBench:
    """The questions, and judge prompts by name."""

    questions: tuple[Question, ...]
    prompts: Mapping[str, JudgePrompt]


@dataclasses.dataclass(frozen=True)
class Grade:
    """The score of one turn; None, with the reason, where the judge gave none."""

    question: int
    category: str
    turn: int
    score: float | None
    text: str


def read_mt_bench(folder: str | Path) -> MTBench:
    """Reads FastChat's files from a folder.

    Expected are `*question*.jsonl`, `*judge_prompts*.jsonl` and `*reference*.jsonl`, each perhaps
    gzipped, or FastChat's `reference_answer/gpt-4.jsonl`.

    Raises:
      UserError: a file is missing or cannot be used, or a question lacks its reference.
    """
    folder = Path(folder)
    questions_path = _find(folder, "*question*", "the questions")
    references = {}
    path = _find(folder, "*reference*", "the reference answers", "reference_answer/gpt-4*")
    for where, row in _rows(path):
        try:
            id_, turns = row["question_id"], row["choices"][0]["turns"]
        except (LookupError, TypeError):
            raise UserError(f"{where}: expected question_id and choices[0].turns") from None
        references[_new_id(id_, references, where)] = _turns(turns, where, None)
    questions, ids = [], set()
    for where, row in _rows(questions_path):
        try:
            id_, category, turns = row["question_id"], row["category"], row["turns"]
        except (LookupError, TypeError):
            raise UserError(f"{where}: expected question_id, category and turns") from None
        id_, turns = _new_id(id_, ids, where), _turns(turns, where)
        ids.add(id_)
        if not isinstance(category, str):
            raise UserError(f"{where}: category is {category!r}; expected a text")
        found = references.get(id_, ()) if category in WITH_REFERENCE else ()
        if category in WITH_REFERENCE and len(found) != TURNS:
            raise UserError(
                f"{path}: no reference answer to question {id_} ({category}); expected {TURNS} "
                "turns"
            )
        questions.append(Question(id_, category, turns, found))
    return MTBench(tuple(questions), _read_prompts(folder))


def _new_id(id_: Any, known: Container[int], where: str) -> int:
    if type(id_) is not int or not 0 <= id_ < 2**40:
        raise UserError(f"{where}: question_id is {id_!r}; expected a whole number")
    if id_ in known:
        raise UserError(f"{where}: question_id {id_} stands in it twice")
    return id_


def _turns(turns: Any, where: str, count: int | None = TURNS) -> tuple[str, ...]:
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not texts or (count is not None and len(turns) != count):
        raise UserError(f"{where}: expected {TURNS} turns of text")
    return tuple(turns)


def _read_prompts(folder: Path) -> dict[str, JudgePrompt]:
    path = _find(folder, "*judge_prompts*", "the judge's prompts")
    prompts = {}
    for where, row in _rows(path):
        try:
            texts = row["name"], row["system_prompt"], row["prompt_template"]
        except (LookupError, TypeError):
            texts = (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: expected name, system_prompt and prompt_template")
        prompts[texts[0]] = JudgePrompt(*texts[1:])
        if texts[0] in _PROMPTS.values():
            _check_template(texts[0], texts[2], where)
    missing = [name for name in _PROMPTS.values() if name not in prompts]
    if missing:
        raise UserError(f"{path}: lacks the prompt {missing[0]!r}")
    return prompts


def _check_template(name: str, template: str, where: str) -> None:
    """Refuses a template that could not be filled in once the answers are there."""
    kinds = ("question", "answer", "ref_answer") if "math" in name else ("question", "answer")
    fields = ["question", "answer"]
    fields += [f"{kind}_{turn}" for kind in kinds for turn in range(1, TURNS + 1)]
    try:
        _fill_in(template, dict.fromkeys(fields, ""))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{where}: the judge's prompt {name!r} cannot be filled in: {error}; expected fields "
            f"of {', '.join(fields)}"
        ) from None


def _find(folder: Path, pattern: str, what: str, *others: str) -> Path:
    for name in (pattern, *others):
        for suffix in (".jsonl", ".jsonl.gz"):
            found = sorted(folder.glob(name + suffix))
            if found:
                return found[0]
    raise UserError(f"--mt_bench: {folder} lacks {what} of MT-Bench; expected {pattern}.jsonl[.gz]")


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", parse_json(line)
    except (*READ_ERRORS, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected JSON lines") from None


def judge_messages(
    bench: MTBench, question: Question, answers: Sequence[str], turn: int
) -> list[dict[str, str]]:
    """What the judge reads to grade turn 1 or 2.

    Raises:
      UserError: the template has a field that FastChat's have not.
    """
    name = _PROMPTS[turn, bool(question.references)]
    prompt = bench.prompts[name]
    fields = {
        "question": question.turns[0],
        "answer": answers[0],
        **{f"question_{i}": text for i, text in enumerate(question.turns, 1)},
        **{f"answer_{i}": text for i, text in enumerate(answers, 1)},
        **{f"ref_answer_{i}": text for i, text in enumerate(question.references, 1)},
    }
    try:
        text = _fill_in(prompt.template, fields)
    except (KeyError, ValueError) as error:
        raise UserError(f"the judge's prompt {name!r} cannot be filled in: {error}") from None
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]


def _fill_in(template: str, fields: Mapping[str, str]) -> str:
    """`str.format` for names alone: no attributes, no widths of a billion characters."""
    out = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        out.append(text)
        if name is not None:
            if spec or conversion:
                raise ValueError(f"{{{name}}} asks for a format; expected a name alone")
            out.append(fields[name])
    return "".join(out)


def answer_questions(
    questions: Sequence[Question],
    generate: Callable[[list[list[int]], SamplingConfig], list[str]],
    tokenizer: Tokenizer,
    *,
    context: int,
    sampling: SamplingConfig,
    batch: int,
    on_answers: Callable[[Question, tuple[str, ...]], None],
    temperature: float | None = None,
    known: Container[int] = (),
) -> None:
    """Answers both turns of every question that is not known.

    Batches are made of all questions, known or not, and those that hold an unknown one are answered
    whole: what a question is answered does not depend on what was answered before.

    Args:
      questions: all of them.
      generate: prompts and settings → continuations.
      tokenizer: with a chat template.
      context: tokens that the model takes.
      sampling: everything but the temperature.
      batch: questions at once.
      on_answers: called once an unknown question.
      temperature: of all categories; None means each its own.
      known: numbers of the questions that have answers.
    """
    groups: dict[float, list[Question]] = {}
    for question in questions:
        own = TEMPERATURES.get(question.category, 0.7) if temperature is None else temperature
        groups.setdefault(own, []).append(question)
    batches = [
        (heat, members[begin : begin + batch])
        for heat, members in groups.items()
        for begin in range(0, len(members), batch)
    ]
    wanted = [(heat, now) for heat, now in batches if any(q.id not in known for q in now)]
    with progress("answers", sum(len(now) for _, now in wanted) * TURNS, "turns") as advance:
        for heat, now in wanted:
            talks = [Conversation() for _ in now]
            settings = dataclasses.replace(sampling, temperature=heat)
            for turn in range(TURNS):
                talks = [
                    talk.say(question.turns[turn])
                    for talk, question in zip(talks, now, strict=True)
                ]
                prompts = [
                    fit(talk, tokenizer.encode_chat, context=context, max_tokens=MAX_TOKENS)[1]
                    for talk in talks
                ]
                numbers = [1_000 * question.id + turn for question in now]
                answers = _answer_turn(prompts, numbers, generate, context, settings)
                talks = [
                    talk.say(trim_answer(answer))
                    for talk, answer in zip(talks, answers, strict=True)
                ]
                advance(len(now))
            for question, talk in zip(now, talks, strict=True):
                if question.id not in known:
                    on_answers(question, talk.turns[1::2])


def _answer_turn(
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    generate: Callable[[list[list[int]], SamplingConfig], list[str]],
    context: int,
    sampling: SamplingConfig,
) -> list[str]:
    """Continuations of a batch; a long prompt does not shorten the answers to the others.

    Those that are generated together draw from the seed that their first one's number gives.
    """
    rooms = [min(MAX_TOKENS, context - len(ids)) for ids in prompts]
    answers = [""] * len(prompts)
    for room in dict.fromkeys(rooms):
        members = [i for i, own in enumerate(rooms) if own == room]
        seed = sampling.seed + numbers[members[0]]
        settings = dataclasses.replace(sampling, max_tokens=room, seed=seed)
        for i, answer in zip(
            members, generate([prompts[i] for i in members], settings), strict=True
        ):
            answers[i] = answer
    return answers


def grade_answers(
    bench: MTBench,
    answers: Mapping[int, Sequence[str]],
    judge: Judge,
    known: Iterable[tuple[int, int]],
    on_grade: Callable[[Grade], None],
) -> None:
    """Has every turn graded but the `known` ones, given as (question, turn).

    `on_grade` is called from one thread, as grades arrive.
    """
    known = set(known)
    wanted = [
        (question, turn)
        for question in bench.questions
        for turn in range(1, TURNS + 1)
        if question.id in answers and (question.id, turn) not in known
    ]

    def grade(question: Question, turn: int) -> Grade:
        messages = judge_messages(bench, question, answers[question.id], turn)
        try:
            verdict = judge.grade(messages)
        except JudgeError as error:
            return Grade(question.id, question.category, turn, None, f"the judge {error}")
        return Grade(question.id, question.category, turn, verdict.score, verdict.text)

    with (
        progress("judge", len(wanted), "turns") as advance,
        ThreadPoolExecutor(judge.config.workers) as pool,
    ):
        futures = [pool.submit(grade, *item) for item in wanted]
        try:
            for future in as_completed(futures):
                on_grade(future.result())
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarize(grades: Sequence[Grade]) -> dict[str, Any]:
    """Mean scores a turn and a category, over graded turns only.

    `average` is the mean of all graded turns, as FastChat's. `average_without_coding` is the mean
    of the other categories' averages, as the first Danube report's.
    """
    categories = {
        category: _means([grade for grade in grades if grade.category == category])
        for category in sorted({grade.category for grade in grades})
    }
    others = [
        scores["average"]
        for category, scores in categories.items()
        if category != "coding" and scores["average"] is not None
    ]
    ungraded = [
        {"question_id": grade.question, "turn": grade.turn, "reason": grade.text}
        for grade in sorted(grades, key=lambda g: (g.question, g.turn))
        if grade.score is None
    ]
    return {
        **_means(grades),
        "average_without_coding": sum(others) / len(others) if others else None,
        "categories": categories,
        "graded": len(grades) - len(ungraded),
        "ungraded": ungraded,
    }


def _means(grades: Sequence[Grade]) -> dict[str, float | None]:
    def mean(turns: Sequence[int]) -> float | None:
        scores = [g.score for g in grades if g.turn in turns and g.score is not None]
        return sum(scores) / len(scores) if scores else None

    return {"turn_1": mean([1]), "turn_2": mean([2]), "average": mean([1, 2])}


class Journal:
    """Rows appended to a JSONL file as they come, so that a stopped run goes on.

    Only rows with the same `key` count: another model or judge begins anew. The others stay in the
    file, so that going back to the first judge costs nothing.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        """Reads what is there; damaged rows, and a last one that was cut off, are dropped."""
        self._path, self._key = path, sha256_json(key)[:16]
        self.rows: list[dict[str, Any]] = []
        kept, damaged = [], 0
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            row = _intact(line)
            if row is not None and "key" in row:
                kept.append(line + b"\n")
                if row["key"] == self._key:
                    self.rows.append(row)
            elif line.strip():
                damaged += 1
        if damaged:
            warn(f"{path}: {damaged} damaged rows are left out, and made again")
        files.write_bytes(path, b"".join(kept))

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row."""
        row = {"key": self._key, **row}
        self.rows.append(row)
        row = {"checksum": sha256_json(row)[:16], **row}
        with self._path.open("ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _intact(line: bytes) -> dict[str, Any] | None:
    """The row of a line without its checksum, or None where that is not the row's."""
    try:
        row = parse_json(line, strict=True)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    checksum = row.pop("checksum", None)
    return row if checksum == sha256_json(row)[:16] else None
