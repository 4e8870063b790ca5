"""A strict reader of the report's HTML: tags nest, ids are unique, nothing comes from outside."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
BY_SELF = {"path", "rect"}  # of SVG: written with a slash
PARENTS = {"li": {"ul", "ol"}, "tr": {"thead", "tbody", "table"}, "dt": {"div"}, "dd": {"div"}}
PARENTS |= {"td": {"tr"}, "th": {"tr"}, "figcaption": {"figure"}, "summary": {"details"}}


class Page(HTMLParser):
    """What a page holds.

    Attributes:
      elements: (tag, attributes, ancestors) in order.
      scripts: text of every script that a browser would run; `data` of those that it would not.
      text: everything that is shown.
    """

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.scripts: list[str] = []
        self.data: list[str] = []
        self._open: list[str] = []
        self._raw: list[str] | None = None
        self._shown: list[str] = []
        assert html.startswith("<!doctype html>")
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = "".join(self._shown)
        ids = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        allowed = PARENTS.get(tag)
        assert allowed is None or self._open[-1] in allowed, f"<{tag}> in <{self._open[-1]}>"
        self.elements.append((tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            kind = dict(attrs).get("type")
            assert kind in (None, "application/json")
            self._raw = self.data if kind else self.scripts
            self._raw.append("")

    def handle_startendtag(self, tag, attrs):
        assert tag in BY_SELF, f"<{tag}/>"
        self.elements.append((tag, dict(attrs), tuple(self._open)))

    def handle_endtag(self, tag):
        assert self._open[-1:] == [tag], f"</{tag}> while {self._open} are open"
        self._open.pop()
        self._raw = None

    def handle_data(self, data):
        if self._raw is not None:
            self._raw[-1] += data
        elif "style" not in self._open:
            self._shown.append(data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every element of this name."""
        return [attributes for tag, attributes, _ in self.elements if tag == name]

    def assert_alone(self, html: str) -> None:
        """Nothing is loaded, linked or run but what the page itself carries."""
        for tag, attributes, _ in self.elements:
            assert tag not in {"img", "link", "iframe", "object", "embed", "form", "base"}, tag
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                assert name not in {"src", "srcset", "xlink:href", "action"}, (tag, name)
                assert name != "href" or (value or "").startswith("#"), (tag, value)
                assert name != "style" or "url(" not in (value or "")
        style = re.search(r"<style>(.*?)</style>", html, re.S)
        assert style
        assert "url(" not in style[1]
        assert "@import" not in style[1]
