"""What a row of a benchmark's file must hold, so that lm-eval's tasks can use it."""

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Check = Callable[[Row], bool]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _index(value: Any, count: int) -> bool:
    return isinstance(value, int) and 0 <= value < count  # a boolean counts as 0 or 1


def all_texts(*keys: str) -> Check:
    """Whether these keys hold texts."""
    return lambda row: all(isinstance(row.get(key), str) for key in keys)


def labelled_choices(question: str) -> Check:
    """ARC's and OpenBookQA's form: texts with labels, one of which is the answer's."""

    def check(row: Row) -> bool:
        choices = row.get("choices")
        if not isinstance(row.get(question), str) or not isinstance(choices, dict):
            return False
        texts, labels = choices.get("text"), choices.get("label")
        return (
            _texts(texts)
            and _texts(labels)
            and len(texts) == len(labels) == len(set(labels))
            and row.get("answerKey") in labels
        )

    return check


def one_of(count: int, key: str, *texts: str) -> Check:
    """Whether `key` holds a number below `count`, and the others hold texts."""
    return lambda row: _index(row.get(key), count) and all_texts(*texts)(row)


def hellaswag(row: Row) -> bool:
    """Either the official columns, or query, choices and gold."""
    if "query" in row:
        choices = row.get("choices")
        return all_texts("query")(row) and _texts(choices) and _index(row.get("gold"), len(choices))
    endings, label = row.get("endings"), row.get("label")
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    texts = all_texts("ctx_a", "ctx_b", "activity_label")(row)
    return texts and _texts(endings) and _index(label, len(endings))


def mmlu(row: Row) -> bool:
    """Four choices and the number of the right one."""
    choices = row.get("choices")
    texts = all_texts("question", "subject")(row)
    return texts and _texts(choices) and len(choices) == 4 and _index(row.get("answer"), 4)


def aliases(row: Row) -> bool:
    """TriviaQA's form: an object with all forms of the answer."""
    answer = row.get("answer")
    return (
        all_texts("question")(row)
        and isinstance(answer, dict)
        and isinstance(answer.get("value"), str)
        and _texts(answer.get("aliases"))
    )


def answers(row: Row) -> bool:
    """NQ-Open's form: the answers that count."""
    return all_texts("question")(row) and _texts(row.get("answer"))


def truthful(key: str) -> Check:
    """TruthfulQA's form: choices, and for each whether it is true; the first one must be."""

    def check(row: Row) -> bool:
        targets = row.get(key)
        if not isinstance(row.get("question"), str) or not isinstance(targets, dict):
            return False
        choices, labels = targets.get("choices"), targets.get("labels")
        return (
            _texts(choices)
            and isinstance(labels, list)
            and len(labels) == len(choices)
            and all(_index(label, 2) for label in labels)
            and labels[0] == 1
        )

    return check


def winogrande(row: Row) -> bool:
    """A sentence with a gap, two options, and the number of the right one as text."""
    texts = all_texts("sentence", "option1", "option2")(row)
    return texts and "_" in row["sentence"] and row.get("answer") in ("1", "2")


def wikitext(row: Row) -> bool:
    """An article, or a part of a split with its name."""
    if "page" in row:
        return all_texts("page")(row)
    return all_texts("text")(row) and row.get("source", "test") in ("train", "valid", "test")
