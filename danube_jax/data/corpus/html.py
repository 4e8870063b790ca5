"""The statistics as one HTML page, without scripts or files beside it."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from danube_jax import files
from danube_jax.data.corpus.statistics import STEP_NAMES, Statistics
from danube_jax.data.corpus.tally import SCORE_BINS

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .7rem;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child,td.l,th.l{text-align:left}
th{background:#f4f4f2}h2{margin-top:2.4rem;border-bottom:2px solid #2b6c8f}svg{display:block}
details{margin:.3rem 0 .3rem 1rem}summary{cursor:pointer}figure{display:inline-block;margin:.5rem
1.5rem .5rem 0;vertical-align:top}figcaption{font-weight:600}pre{white-space:pre-wrap;
background:#f7f7f4;padding:.6rem;border-left:4px solid #bbb;font-size:13px;overflow-wrap:anywhere}
pre.kept{border-color:#3a8f4d}pre.gone{border-color:#c0563b}.note{color:#666}
"""
WIDTH, HEIGHT, MARGIN = 420, 170, 34
BAR, ROW = 300, 22


def write_page(statistics: Statistics, path: Path) -> None:
    """Writes the page of a preparation, where it is not there as it should be."""
    data = page(statistics).encode("utf-8", "replace")
    if not path.is_file() or path.read_bytes() != data:
        files.write_bytes(path, data)


def page(statistics: Statistics) -> str:
    """The page: what stayed, what each step removed and why, plots, samples."""
    values = statistics.values
    name = escape(values["name"])
    sources = list(values["tally"]["steps"])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>{name}: corpus</title><style>{STYLE}</style><h1>{name}: corpus</h1>",
        _summary(statistics),
        "<h2>From text to tokens</h2>",
        "<p class=note>Bytes that reach each step, all sources together.</p>",
        _funnel(statistics),
        "<h2>Token stores</h2>",
        _stores(values["stores"]),
        "<h2>Steps</h2>",
        _steps(statistics.steps()),
    ]
    if len(sources) > 1:
        for source in sources:
            parts.append(f"<details><summary>{escape(source)} alone</summary>")
            parts.append(_steps(statistics.steps(source)) + "</details>")
    parts.append("<h2>Lengths, languages, scores</h2>")
    parts += [_plots(source, values) for source in sources]
    parts.append("<h2>Samples</h2><p class=note>Chosen by a hash of the document's name. Open a ")
    parts.append("reason and ask of every document: would I have removed it?</p>")
    parts += [_samples(source, values["tally"]["samples"].get(source, {})) for source in sources]
    parts.append(_bad_records(values["tally"]))
    return "\n".join(parts) + "\n</html>\n"


def _summary(statistics: Statistics) -> str:
    steps = dict(statistics.steps())
    read = steps["read"]
    rows = [row for parts in statistics.values["stores"].values() for row in parts.values()]
    documents, size, tokens = (sum(r[k] for r in rows) for k in ("documents", "bytes", "tokens"))
    return (
        f"<p>Read <b>{read['documents_in']:,}</b> documents, {_mb(read['bytes_in'])}. Kept "
        f"<b>{documents:,}</b> documents, {_mb(size)} "
        f"({size / max(1, read['bytes_in']):.0%} of the bytes): <b>{tokens:,}</b> tokens, "
        f"{size / max(1, tokens):.2f} bytes a token.</p>"
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = ()) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=l' if i in left else ''}>{cell}</{tag}>" for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"


def _stores(stores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [
            escape(f"{name}/{part}"),
            f"{row['documents']:,}",
            _mb(row["bytes"]),
            f"{row['tokens']:,}",
            f"{row['bytes'] / row['tokens']:.2f}",
        ]
        for name, parts in stores.items()
        for part, row in parts.items()
    ]
    return _table(["store", "documents", "text", "tokens", "bytes a token"], rows)


def _steps(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = []
    for step, counts in steps:
        reasons = sorted(counts["removed"].items(), key=lambda item: -item[1][1])
        why = [f"{escape(r)}: {number:,} ({_mb(size)})" for r, (number, size) in reasons]
        why += [f"{escape(what)}: {n:,}" for what, n in sorted(counts["edited"].items())]
        gone = counts["documents_in"] - counts["documents_out"]
        share = gone / max(1, counts["documents_in"])
        rate = counts["bytes_in"] / counts["seconds"] / 1e6 if counts["seconds"] else 0
        rows.append(
            [
                STEP_NAMES[step],
                f"{counts['documents_in']:,}",
                _mb(counts["bytes_in"]),
                f"{gone:,} ({share:.1%})" if gone else "",
                f"{rate:,.1f}" if rate else "",
                "<br>".join(why),
            ]
        )
    header = ["step", "documents", "text", "removed", "MB/s a core", "why, or what was changed"]
    return _table(header, rows, left=(5,))


def _funnel(statistics: Statistics) -> str:
    """Horizontal bars: what reaches a step, in its colour what goes there."""
    skipped = ("minhash_signatures", "masking", "read")
    steps = [(k, c) for k, c in statistics.steps() if k not in skipped]
    total = max(1, dict(statistics.steps())["read"]["bytes_in"])
    height = ROW * len(steps) + 4
    out = [f"<svg width=860 height={height} role=img aria-label='bytes by step'>"]
    for i, (step, counts) in enumerate(steps):
        y, full = i * ROW + 2, counts["bytes_in"] / total * BAR
        size = counts["bytes_in"] - counts["bytes_out"]
        gone = size / total * BAR
        label = _mb(counts["bytes_in"]) + (f", {_mb(size)} go" if size >= 5_000 else "")
        out.append(
            f"<text x=190 y={y + 14} text-anchor=end font-size=13>{STEP_NAMES[step]}</text>"
            f"<rect x=200 y={y} width={full:.1f} height={ROW - 5} fill=#2b6c8f />"
            f"<rect x={200 + full - gone:.1f} y={y} width={max(0, gone):.1f} height={ROW - 5} "
            "fill=#c0563b />"
            f"<text x={208 + full:.1f} y={y + 14} font-size=12>{label}</text>"
        )
    return "".join(out) + "</svg>"


def _plots(source: str, values: Mapping[str, Any]) -> str:
    bins = values["tally"]["histograms"].get(source, {})
    out = [f"<h3>{escape(source)}</h3>"]
    read, kept = bins.get("bytes_read", {}), bins.get("bytes_kept", {})
    if read:
        powers = range(min(map(int, read)), max(map(int, [*read, *kept])) + 1)
        series = [[rows.get(str(p), 0) for p in powers] for rows in (read, kept)]
        labels = [_size(2**p) for p in powers]
        out.append(_histogram("bytes a document: read (grey), kept (blue)", labels, series))
    tokens = bins.get("tokens", {})
    if tokens:
        powers = range(min(map(int, tokens)), max(map(int, tokens)) + 1)
        labels = [_size(2**p) for p in powers]
        out.append(
            _histogram("tokens a document", labels, [[tokens.get(str(p), 0) for p in powers]])
        )
    scores = bins.get("quality", {})
    if scores:
        labels = [f"{i / SCORE_BINS:.1f}" for i in range(SCORE_BINS)]
        counts = [[scores.get(str(i), 0) for i in range(SCORE_BINS)]]
        marks = [bound * SCORE_BINS for bound in values["bucket_bounds"]]
        out.append(_histogram("quality score; lines: the buckets' bounds", labels, counts, marks))
    for key in ("language", "contaminated by"):
        if bins.get(key):
            rows = sorted(bins[key].items(), key=lambda item: -item[1])[:12]
            out.append(f"<figure><figcaption>{key}</figcaption>")
            out.append(_table([key, "documents"], [[escape(k), f"{n:,}"] for k, n in rows]))
            out.append("</figure>")
    return "".join(out)


def _size(value: int) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1024:
            return f"{value}{unit}"
        value //= 1024
    return f"{value}T"


def _histogram(
    title: str, labels: Sequence[str], series: Sequence[Sequence[int]], marks: Sequence[float] = ()
) -> str:
    """Bars from the first of a bin to the last; the first series lies behind the second."""
    top = max(1, *(max(row) for row in series))
    width, height = WIDTH - MARGIN, HEIGHT - MARGIN
    step = width / max(1, len(labels))
    colours = ["#c9c9c4", "#2b6c8f"] if len(series) > 1 else ["#2b6c8f"]
    out = [
        f"<figure><figcaption>{escape(title)}</figcaption>",
        f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='{escape(title)}'>",
        f"<text x={MARGIN - 4} y=12 text-anchor=end font-size=10>{_size(top)}</text>",
        f"<line x1={MARGIN} y1={height} x2={WIDTH} y2={height} stroke=#888 />",
    ]
    for row, colour in zip(series, colours, strict=True):
        for i, count in enumerate(row):
            bar = count / top * (height - 6)
            out.append(
                f"<rect x={MARGIN + i * step:.1f} y={height - bar:.1f} width="
                f"{max(1, step - 1):.1f} height={bar:.1f} fill={colour} "
                f"fill-opacity=.85><title>{escape(labels[i])}: {count:,}</title></rect>"
            )
    every = max(1, len(labels) // 10)
    for i in range(0, len(labels), every):
        out.append(
            f"<text x={MARGIN + i * step:.1f} y={height + 14} font-size=10>{labels[i]}</text>"
        )
    for mark in marks:
        x = MARGIN + mark * step
        out.append(f"<line x1={x:.1f} y1=0 x2={x:.1f} y2={height} stroke=#c0563b />")
    return "".join(out) + "</svg></figure>"


def _samples(source: str, steps: Mapping[str, Mapping[str, Sequence]]) -> str:
    out = [f"<h3>{escape(source)}</h3>"]
    order = [step for step in ("kept", *STEP_NAMES) if step in steps]
    for step in order:
        for reason, rows in sorted(steps[step].items()):
            kept = step == "kept" or reason.startswith("score ")
            title = "kept" if step == "kept" else f"{STEP_NAMES[step]}: {reason}"
            out.append(f"<details><summary>{escape(title)}</summary>")
            for _, name, text in rows:
                style = "kept" if kept else "gone"
                out.append(
                    f"<p class=note>{escape(name)}</p><pre class={style}>{escape(text)}</pre>"
                )
            out.append("</details>")
    return "".join(out)


def _bad_records(tally: Mapping[str, Any]) -> str:
    if not tally["num_bad_records"]:
        return ""
    rows = [[escape(where), escape(reason)] for where, reason in tally["bad_records"][:100]]
    return (
        f"<h2>Bad records</h2><p>{tally['num_bad_records']:,} were skipped; the first of them:</p>"
        + _table(["where", "why"], rows, left=(0, 1))
    )
