"""The page in headless Chromium, where there is one: it runs, fits a phone, and prints."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report_folders import make_run

from danube_jax.report.page import write_comparison, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROBE = """
<script>
window.addEventListener("load", () => {
  const frame = document.querySelector("iframe");
  const page = frame.contentDocument;
  const figure = page.querySelector("figure.chart.wide .area");
  const box = figure.getBoundingClientRect();
  figure.dispatchEvent(new PointerEvent("pointermove",
    { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
  const shown = [...page.querySelectorAll(".tip")].filter((tip) => !tip.hidden);
  document.body.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    frame: frame.clientWidth,
    charts: [...page.querySelectorAll(".area svg")]
      .filter((svg) => svg.getBoundingClientRect().width > 100).length,
    tip: shown.map((tip) => tip.textContent).join("|"),
  });
});
</script>
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Runs the browser with arguments and returns what it printed."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    profile = tmp_path_factory.mktemp("profile")

    def run(*arguments):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        flags += ["--allow-file-access-from-files", "--virtual-time-budget=5000"]
        command = [path, *flags, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode:
            pytest.skip(f"{path} does not run here: {result.stderr[-300:]}")
        return result

    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / name) for name in ("a", "b")]
    return write_report(runs[0]), write_comparison(runs, folder / "comparison.html")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("which", [0, 1])
def test_the_page_fits_and_answers_the_pointer(chromium, pages, tmp_path, width, which):
    # An iframe, since a window cannot be as narrow as a phone.
    frame = f'<iframe src="{pages[which].as_uri()}" style="width:{width}px;height:800px;border:0">'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><body>{frame}</iframe>{PROBE}</body>")
    dom = chromium("--dump-dom", outer.as_uri()).stdout
    found = re.search(r"<body>(\{.*\})</body>", dom, re.S)
    assert found, dom[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["frame"] == width
    assert seen["width"] <= width
    assert seen["charts"] >= 5
    assert "tokens" in seen["tip"]


def test_it_prints(chromium, pages, tmp_path):
    output = tmp_path / "page.pdf"
    chromium(f"--print-to-pdf={output}", "--no-pdf-header-footer", pages[0].as_uri())
    content = output.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 15


def test_it_is_drawn_light_and_dark(chromium, pages, tmp_path):
    shots = []
    for extra in ((), ("--blink-settings=preferredColorScheme=0",)):
        output = tmp_path / f"shot{len(extra)}.png"
        chromium(f"--screenshot={output}", "--window-size=1280,1800", *extra, pages[0].as_uri())
        shots.append(output.read_bytes())
    assert all(shot.startswith(b"\x89PNG") and len(shot) > 30_000 for shot in shots)
    assert shots[0] != shots[1]
