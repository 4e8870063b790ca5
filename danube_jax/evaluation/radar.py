"""A radar plot as inline SVG: scores a category, ours beside others."""

import html
import math
from collections.abc import Mapping, Sequence

COLORS = ("#d97706", "#2563eb", "#059669", "#7c3aed", "#dc2626", "#64748b")
RINGS = (2.0, 4.0, 6.0, 8.0, 10.0)
_SIZE, _RADIUS = 640, 220


def radar_svg(
    series: Sequence[tuple[str, Mapping[str, float | None]]],
    categories: Sequence[str],
    *,
    highest: float = 10.0,
    title: str = "",
) -> str:
    """An SVG that stands alone and follows a page's colour of text.

    Args:
      series: (name, category → score); the first is drawn boldest. Where a score is missing, the
        outline passes it by.
      categories: the spokes, clockwise from the top.
      highest: score at the rim.
      title: for screen readers.
    """
    middle, height = _SIZE / 2, _SIZE + 24 * len(series)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIZE} {height}" role="img" '
        f'aria-label="{html.escape(title, quote=True)}" font-family="system-ui, sans-serif" '
        'font-size="15" fill="currentColor">'
    ]

    def point(index: int, score: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(categories) - math.pi / 2
        radius = _RADIUS * score / highest
        return middle + radius * math.cos(angle), middle + radius * math.sin(angle)

    def corners(scores: Sequence[float | None]) -> str:
        there = [(i, score) for i, score in enumerate(scores) if score is not None]
        return " ".join("{:.1f},{:.1f}".format(*point(i, score)) for i, score in there)

    for ring in RINGS:
        parts.append(
            f'<polygon points="{corners([ring] * len(categories))}" fill="none" '
            'stroke="currentColor" stroke-opacity="0.2"/>'
        )
        x, y = point(0, ring)
        parts.append(f'<text x="{x + 4:.1f}" y="{y - 3:.1f}" font-size="11">{ring:g}</text>')
    for i, category in enumerate(categories):
        (x, y), (label_x, label_y) = point(i, highest), point(i, highest * 1.12)
        offset = label_x - middle
        anchor = "middle" if abs(offset) < 20 else "start" if offset > 0 else "end"
        parts.append(
            f'<line x1="{middle}" y1="{middle}" x2="{x:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.2"/>'
            f'<text x="{label_x:.1f}" y="{label_y + 5:.1f}" text-anchor="{anchor}">'
            f"{html.escape(category)}</text>"
        )
    # The first series lies on top of the others.
    for number, (_, scores) in reversed(list(enumerate(series))):
        color, width = COLORS[number % len(COLORS)], 3 if number == 0 else 1.5
        fill = 0.15 if number == 0 else 0.0
        parts.append(
            f'<polygon points="{corners([scores.get(c) for c in categories])}" fill="{color}" '
            f'fill-opacity="{fill}" stroke="{color}" stroke-width="{width}"/>'
        )
    for number, (name, _) in enumerate(series):
        y = _SIZE + 24 * number
        parts.append(
            f'<rect x="40" y="{y}" width="22" height="10" fill="{COLORS[number % len(COLORS)]}"/>'
            f'<text x="70" y="{y + 10}">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
