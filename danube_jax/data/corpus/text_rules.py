"""Steps that repair, mask, recognise or list: Unicode, personal data, language, word lists."""

import functools
import ipaddress
import re
import unicodedata
from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document

from danube_jax.data.corpus.config import LanguageStep, ListStep, MaskingStep, UnicodeStep
from danube_jax.data.corpus.rule import SOURCE, Rule
from danube_jax.data.corpus.tally import Tally
from danube_jax.errors import UserError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
LINE_END = re.compile(r"\r\n?|\x85|\u2028|\u2029")
EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]*[A-Za-z0-9]"
)
AROUND_AT = re.compile(r"[^\s<>()\[\],;:\"]+@[^\s<>()\[\],;:\"]+")
IPV4 = re.compile(
    r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\w|\.\d)"
)
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)")


class Unicode(Rule):
    """Repairs mis-decoded text, brings it into a normal form, drops control characters."""

    name, key = "Unicode", "unicode"

    def __init__(self, step: UnicodeStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        import ftfy

        self.step = step
        self._fix = functools.partial(
            ftfy.fix_text,
            config=ftfy.TextFixerConfig(
                unescape_html=False,
                remove_terminal_escapes=False,
                fix_latin_ligatures=False,
                fix_character_width=False,
                uncurl_quotes=False,
                fix_line_breaks=False,
                normalization=None,
                explain=False,
            ),
        )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        before = text = doc.text
        if self.step.unescape_html and "&" in text:
            import html

            text = html.unescape(text)
        if not text.isascii():
            if self.step.fix_encoding:
                lines = text.split("\n")
                text = "\n".join(line if line.isascii() else self._fix(line) for line in lines)
            if self.step.normal_form:
                text = unicodedata.normalize(self.step.normal_form, text)
            text = LINE_END.sub("\n", text)
        elif "\r" in text:
            text = LINE_END.sub("\n", text)
        text = CONTROL.sub("", text)
        if text != before:
            self.edited(doc, "documents repaired")
            doc.text = text
        return True if text.strip() else (False, "empty")


class Masking(Rule):
    """Replaces e-mail and IP addresses."""

    name, key = "personal data", "masking"

    def __init__(self, step: MaskingStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step

    def filter(self, doc: Document) -> bool:
        text, step = doc.text, self.step
        if step.emails and "@" in text:
            # The precise pattern is slow, so it only sees words that hold an @.
            emails = 0

            def mask(match: re.Match) -> str:
                nonlocal emails
                masked, count = EMAIL.subn(step.email_replacement, match[0])
                emails += count
                return masked

            text = AROUND_AT.sub(mask, text)
            if emails:
                self.edited(doc, "e-mail addresses", emails)
        if step.ip_addresses:
            for pattern, replacement in (
                (IPV4, step.ipv4_replacement),
                (IPV6, step.ipv6_replacement),
            ):
                if pattern is IPV6 and "::" not in text and text.count(":") < 7:
                    continue
                text, count = _mask_addresses(
                    pattern, replacement, text, step.only_public_ip_addresses
                )
                if count:
                    self.edited(doc, "IP addresses", count)
        doc.text = text
        return True


def _mask_addresses(
    pattern: re.Pattern, replacement: str, text: str, only_public: bool
) -> tuple[str, int]:
    count = 0

    def mask(match: re.Match) -> str:
        nonlocal count
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        if only_public and not address.is_global:
            return match[0]
        count += 1
        return replacement

    return pattern.sub(mask, text), count


class Language(Rule):
    """Keeps documents in the wanted languages; notes language and score."""

    name, key = "language", "language"

    def __init__(self, step: LanguageStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.step = step
        self._identify = None

    def __getstate__(self):
        return self.__dict__ | {"_identify": None}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._identify is None:
            self._identify = language_identifier(self.step.model)
        size = self.step.sample_characters
        text = doc.text
        if len(text) > size:
            middle = len(text) // 2
            text = f"{text[: size // 2]} {text[middle : middle + size // 2]}"
        language, score = self._identify(text)
        doc.metadata["language"], doc.metadata["language_score"] = language, round(score, 4)
        if self.tally is not None:
            self.tally.category(doc.metadata.get(SOURCE, ""), "language", language)
        if language not in self.step.languages:
            return False, f"language {language}"
        return True if score >= self.step.min_score else (False, "uncertain language")


@functools.cache
def language_identifier(model: str):
    """A function: text → (ISO 639 code, probability).

    Args:
      model: a fastText file whose labels end in language codes; '' takes py3langid's own model.

    Raises:
      UserError: the file or the package is missing.
    """
    if not model:
        try:
            from py3langid import langid
        except ImportError:
            raise UserError(
                "config.steps.language.model: without a file, the model of the package py3langid "
                "is needed, which is not installed: pip install py3langid"
            ) from None
        identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

        def identify(text: str) -> tuple[str, float]:
            language, score = identifier.classify(text)
            return str(language), float(score)

        return identify
    if not Path(model).is_file():
        raise UserError(f"config.steps.language.model: {model}: no such file")
    try:
        import fasttext

        loaded = fasttext.load_model(model)
    except ImportError:
        raise UserError(
            "config.steps.language.model: fastText files need the package fasttext-numpy2-wheel"
        ) from None
    except ValueError as error:
        raise UserError(f"config.steps.language.model: {model}: {error}") from None

    def identify_fasttext(text: str) -> tuple[str, float]:
        labels, scores = loaded.predict(" ".join(text.split()), k=1)
        if not labels:
            return "und", 0.0
        return labels[0].removeprefix("__label__").split("_")[0], min(1.0, float(scores[0]))

    return identify_fasttext


class Lists(Rule):
    """Removes documents that hold a listed word, or whose address is listed."""

    name, key = "lists", "lists"

    def __init__(self, step: ListStep, tally: Tally | None = None, **kwargs):
        super().__init__(tally, **kwargs)
        self.words = _any_word(_read_list("blocked_words", step.blocked_words))
        self.url_words = _any_word(_read_list("blocked_url_words", step.blocked_url_words))
        self.domains = frozenset(_read_list("blocked_domains", step.blocked_domains))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        url = doc.metadata.get("url")
        if url:
            host = (urlsplit(url if "//" in url else f"//{url}").hostname or "").lower()
            labels = host.split(".")
            if any(".".join(labels[i:]) in self.domains for i in range(len(labels))):
                return False, "blocked domain"
            if self.url_words is not None and self.url_words.search(url.lower()):
                return False, "blocked word in address"
        if self.words is not None and self.words.search(doc.text.lower()):
            return False, "blocked word"
        return True


def _any_word(entries: list[str]) -> re.Pattern | None:
    if not entries:
        return None
    longest_first = sorted(map(re.escape, entries), key=len, reverse=True)
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(longest_first)})(?![^\W_])")


def _read_list(key: str, path: str) -> list[str]:
    if not path:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.steps.lists.{key}: {path} cannot be read ({error}); expected a text file with "
            "an entry a line"
        ) from None
    entries = (line.strip().lower() for line in lines if not line.startswith("#"))
    return sorted({entry for entry in entries if entry})
