"""A corpus with plants: every step's recall and precision against what was planted."""

import json
import random
from pydoc_data.topics import topics

import pytest
from corpus_config import make, write_jsonl
from datatrove.data import Document

from danube_jax.data.corpus.config import corpus_config
from danube_jax.data.corpus.pipeline import prepare
from danube_jax.data.corpus.tokenizer_sample import read_documents

WORDS = sorted({w for text in topics.values() for w in text.lower().split() if w.isalpha()})
OPENERS = ("The reader", "A program", "This chapter", "Every value", "The old parser", "Our team")
VERBS = ("explains", "keeps", "describes", "returns to", "looks after", "depends on", "replaces")
JOINS = ("and that", "because", "while the others say that", "although", "so that", "and with it")
GERMAN = (
    "Der Leser wird in diesem Kapitel alles finden, was er über die Sprache wissen muss. "
    "Wer sich damit noch nicht beschäftigt hat, sollte zuerst das vorige Kapitel lesen. "
)
FRENCH = (
    "Le lecteur trouvera dans ce chapitre tout ce qu'il doit savoir de la langue. "
    "Celui qui ne la connaît pas encore devrait d'abord lire le chapitre précédent. "
)
MIS_DECODED = " The café’s naïve façade — they say."  # noqa: RUF001
BOILERPLATE = (
    "All rights are reserved by the owners of this page, who answer for nothing that is said here."
)


def prose(rng: random.Random, sentences: int = 22) -> str:
    """English sentences of random words, in paragraphs."""
    out = []
    for i in range(sentences):
        words = rng.sample(WORDS, 10)
        out.append(
            f"{rng.choice(OPENERS)} {rng.choice(VERBS)} the {' '.join(words[:4])} of the "
            f"{words[4]} "
            f"{rng.choice(JOINS)} the {' '.join(words[5:8])} have to be {words[8]} to {words[9]}."
        )
        out.append("\n\n" if i % 6 == 5 else " ")
    return "".join(out).strip()


def near_copy(rng: random.Random, text: str) -> str:
    """The text with one word in fifty replaced."""
    words = text.split(" ")
    for i in rng.sample(range(len(words)), len(words) // 50):
        words[i] = rng.choice(WORDS)
    return " ".join(words)


def gibberish(rng: random.Random) -> str:
    letters = "bcdfghjklmnpqrstvwxz0123456789#%&=+"
    return " ".join("".join(rng.choices(letters, k=rng.randint(3, 14))) for _ in range(150))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(what was planted: kind → ids, kept rows by id, all texts by id, statistics)."""
    rng = random.Random(7)
    folder = tmp_path_factory.mktemp("planted")
    plants: dict[str, dict[str, str]] = {"clean": {}}
    for i in range(120):
        plants["clean"][f"clean{i}"] = prose(rng)
    originals = list(plants["clean"].values())
    plants["near"] = {f"near{i}": near_copy(rng, originals[i]) for i in range(30)}
    plants["exact"] = {
        f"exact{i}": f" {originals[40 + i].replace(' the ', '  The ')}\n" for i in range(10)
    }
    plants["gibberish"] = {f"gibberish{i}": gibberish(rng) for i in range(15)}
    plants["german"] = {f"german{i}": GERMAN * 4 + str(i) for i in range(8)}
    plants["french"] = {f"french{i}": FRENCH * 4 + str(i) for i in range(8)}
    repeat = "Buy the best of all the things that we have to sell to you and be happy.\n"
    plants["repetition"] = {f"repetition{i}": repeat * 30 + prose(rng, 4) for i in range(10)}
    plants["bullets"] = {
        f"bullets{i}": "\n".join(f"- {line}." for line in " ".join(prose(rng).split()).split(". "))
        for i in range(10)
    }
    plants["unpunctuated"] = {
        f"unpunctuated{i}": "\n".join(line.strip() for line in prose(rng).split("."))
        for i in range(10)
    }
    plants["personal"] = {
        f"personal{i}": prose(rng) + f" Write to jane.doe{i}@mail{i}.co.uk or to 8.8.{i}.4 today."
        for i in range(15)
    }
    plants["boilerplate"] = {
        f"boilerplate{i}": f"{prose(rng)}\n\n{BOILERPLATE}\n\n{prose(rng, 6)}" for i in range(15)
    }
    plants["mojibake"] = {
        f"mojibake{i}": prose(rng) + MIS_DECODED.encode().decode("cp1252") for i in range(8)
    }
    questions = [" ".join(rng.sample(WORDS, 20)) for _ in range(12)]
    (folder / "sets").mkdir()
    rows = "".join(json.dumps({"question": q, "answer": "yes"}) + "\n" for q in questions)
    (folder / "sets" / "exam.jsonl").write_text(rows)
    plants["contaminated"] = {
        f"contaminated{i}": f"{prose(rng, 10)} {q.capitalize()}? {prose(rng, 10)}"
        for i, q in enumerate(questions)
    }
    plants["blocked"] = {f"blocked{i}": prose(rng) + " Forbiddenword." for i in range(5)}
    (folder / "words.txt").write_text("# words\nforbiddenword\n")
    first = plants["clean"] | plants["boilerplate"]
    second = {k: v for kind in plants for k, v in plants[kind].items() if k not in first}
    order = rng.sample(sorted(second), len(second))
    write_jsonl(folder / "first.jsonl", list(first.values()), key=list(first))
    write_jsonl(folder / "second.jsonl.gz", [second[k] for k in order], key=order)
    sources = {
        "first": {"path": str(folder / "first.jsonl"), "id_column": "key"},
        "second": {"path": str(folder / "second.jsonl.gz"), "id_column": "key"},
    }
    corpus = make(
        folder / "out",
        sources,
        off=(),
        keep_removed=True,
        heldout_fraction=0.1,
        steps__lists__enabled=True,
        steps__lists__blocked_words=str(folder / "words.txt"),
        steps__repeated_text__enabled=True,
        steps__decontamination__enabled=True,
        steps__decontamination__path=str(folder / "sets"),
    )
    statistics = prepare(corpus)
    kept = {row["id"]: row["text"] for row in read_documents(folder / "out" / "documents")}
    removed = {
        row["id"]: row["metadata"]["filter_reason"]
        for stage in (folder / "out" / "removed").iterdir()
        for row in read_documents(stage)
    }
    return plants, kept, removed, first | second, statistics


# Step → the plants that it has to find.
STEPS = {
    "language": ("german", "french", "gibberish"),
    "minhash": ("near",),
    "exact": ("exact",),
    "gopher_repetition": ("repetition",),
    "gopher_quality": ("bullets", "gibberish"),
    "fineweb": ("unpunctuated",),
    "decontamination": ("contaminated",),
    "lists": ("blocked",),
}


@pytest.mark.parametrize("step", STEPS)
def test_recall_and_precision_of_removal(planted, step):
    plants, _, removed, _, _ = planted
    wanted = {name for kind in STEPS[step] for name in plants[kind]}
    found = {name for name, reason in removed.items() if reason.startswith(f"{step}:")}
    if step in ("language", "gopher_quality"):  # gibberish goes by one or the other
        wanted -= {name for name in plants["gibberish"] if name not in found}
    if step == "minhash":
        # At a similarity of 0.82, which one word in fifty leaves of runs of five, the chance that
        # two texts share a bucket is 0.96.
        assert len(found & wanted) >= 0.85 * len(wanted)
    else:
        assert wanted - found == set()
    assert found - wanted == set()


def test_gibberish_goes_and_clean_text_stays(planted):
    plants, kept, _, _, _ = planted
    assert set(plants["gibberish"]).isdisjoint(kept)
    assert set(plants["clean"]) <= set(kept)
    for name, text in plants["clean"].items():
        assert kept[name] == text


def test_personal_data_is_masked_and_nothing_else(planted):
    plants, kept, _, _, statistics = planted
    for i, (name, text) in enumerate(plants["personal"].items()):
        expected = text.replace(f"jane.doe{i}@mail{i}.co.uk", "email@example.com")
        assert kept[name] == expected.replace(f"8.8.{i}.4", "192.0.2.1")
    edited = dict(statistics.steps())["masking"]["edited"]
    assert edited == {"e-mail addresses": 15, "IP addresses": 15}


def test_repeated_boilerplate_stands_once(planted):
    plants, kept, _, _, _ = planted
    assert sum(BOILERPLATE in text for text in kept.values()) == 1
    for name, text in plants["boilerplate"].items():
        without = text.replace(f"\n\n{BOILERPLATE}", "")
        assert kept[name] in (text, without)


def test_mis_decoded_text_is_repaired(planted):
    plants, kept, _, _, _ = planted
    for name in plants["mojibake"]:
        assert kept[name].endswith(MIS_DECODED)


def test_near_copies_across_sources_go_from_the_later_source(planted):
    _, kept, _, _, _ = planted
    assert all(f"clean{i}" in kept for i in range(30))


PAGE_LINES = (
    "Please enable Javascript to see this page as it is meant to be seen.",
    "By reading on you accept the terms of use of this page and its owners.",
    "Two words",
)


def test_pages_and_addresses(tmp_path):
    """C4's rules and the lists of addresses, which take lines and pages of the web away."""
    rng = random.Random(8)
    clean = {f"clean{i}": prose(rng).replace("\n\n", "\n") for i in range(40)}
    noisy = {}
    for i in range(10):
        lines = prose(rng).replace("\n\n", "\n").split("\n")
        lines.insert(1 + i % 3, PAGE_LINES[i % 3])
        noisy[f"noisy{i}"] = "\n".join(lines)
    gone = {f"latin{i}": f"{prose(rng)}\nLorem ipsum dolor sit amet." for i in range(6)}
    gone |= {f"code{i}": f"{prose(rng)}\nif (x) {{ return; }} is code." for i in range(6)}
    gone |= {f"short{i}": f"The {i}th page has one sentence alone." for i in range(6)}
    hosts = {f"host{i}": prose(rng) for i in range(6)}
    words = {f"word{i}": prose(rng) for i in range(6)}
    texts = clean | noisy | gone | hosts | words
    urls = dict.fromkeys(texts, "https://fine.example.org/page.html")
    urls |= {name: f"https://www{name[-1]}.bad.example.com/" for name in hosts}
    urls |= {name: f"http://example.org/online-casino/{name}" for name in words}
    (tmp_path / "hosts.txt").write_text("bad.example.com\n")
    (tmp_path / "words.txt").write_text("casino\n")
    path = write_jsonl(tmp_path / "a.jsonl", [*texts.values()], key=[*texts], url=[*urls.values()])
    corpus = make(
        tmp_path / "out",
        {"a": {"path": str(path), "id_column": "key", "url_column": "url"}},
        keep_removed=True,
        steps__minhash__enabled=False,
        steps__c4__enabled=True,
        steps__lists__enabled=True,
        steps__lists__blocked_domains=str(tmp_path / "hosts.txt"),
        steps__lists__blocked_url_words=str(tmp_path / "words.txt"),
    )
    statistics = prepare(corpus)
    kept = {row["id"]: row["text"] for row in read_documents(tmp_path / "out" / "documents")}
    assert kept.keys() == clean.keys() | noisy.keys()
    for name, text in (clean | noisy).items():
        lines = [line for line in text.split("\n") if line not in PAGE_LINES]
        assert kept[name] == "\n".join(line.strip() for line in lines)
    removed = dict(statistics.steps())
    assert {k: v[0] for k, v in removed["c4"]["removed"].items()} == {
        **{"lorem_ipsum": 6, "curly_bracket": 6, "few_sentences": 6}
    }
    assert {k: v[0] for k, v in removed["lists"]["removed"].items()} == {
        **{"blocked domain": 6, "blocked word in address": 6}
    }
    assert removed["c4"]["edited"]["lines dropped"] == 10


def test_a_step_that_is_off_leaves_everything(tmp_path):
    rng = random.Random(9)
    texts = [gibberish(rng), GERMAN, "short", "a@mail.org at 8.8.8.8", "same", "same", ""]
    path = write_jsonl(tmp_path / "a.jsonl", texts * 3)
    off = [name for name, step in corpus_config().steps.items() if step.enabled]
    statistics = prepare(make(tmp_path / "out", {"a": path}, off=off, min_heldout_documents=0))
    assert [name for name, _ in statistics.steps()] == ["read", "tokenise"]
    kept = [row["text"] for row in read_documents(tmp_path / "out" / "documents")]
    assert kept == [text for text in texts * 3 if text]
    assert dict(statistics.steps())["read"]["removed"] == {"empty": [3, 0]}


def test_recall_is_that_of_datatroves_own_minhash(planted, tmp_path):
    """datatrove's four stages over the same clean texts and near copies."""
    pytest.importorskip("spacy", reason="datatrove's own word splitter needs spacy")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    from danube_jax.data.corpus.config import MinHashStep
    from danube_jax.data.corpus.minhash import datatrove_config

    plants, _, removed, texts, _ = planted
    names = [*plants["clean"], *plants["near"]]
    documents = [Document(texts[name], name) for name in names]
    config = datatrove_config(MinHashStep())
    sig, pairs, gone = (str(tmp_path / name) for name in ("sig", "pairs", "gone"))
    for number, (steps, tasks) in enumerate(
        [
            ([documents, MinhashDedupSignature(sig, config)], 1),
            ([MinhashDedupBuckets(sig, pairs, config=config)], config.num_buckets),
            ([MinhashDedupCluster(pairs, gone, config)], 1),
        ]
    ):
        logs = str(tmp_path / f"log{number}")
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=logs).run()
    left = {document.id for document in MinhashDedupFilter(gone).run(iter(documents))}
    theirs = len(names) - len(left)
    ours = sum(reason.startswith("minhash") for reason in removed.values())
    assert theirs >= 20
    assert abs(ours - theirs) <= 5  # thirty copies, each found with a chance of 0.9 or more
