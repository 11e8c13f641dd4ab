"""Secrets never reach a frame: what they are replaced with, and how they are recognised."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

MASK: Final = "[secret]"

#: Shapes of well-known keys and of an authorization header; a value that the gateway itself holds
#: (see `Masker`) is found wherever it stands.
SHAPES: Final = re.compile(
    r"""
      \b(?:sk|rk|pk)-[A-Za-z0-9_-]{16,}
    | \b(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}
    | \bgh[pousr]_[A-Za-z0-9]{20,}
    | \bgithub_pat_[A-Za-z0-9_]{20,}
    | \bglpat-[A-Za-z0-9_-]{20,}
    | \b(?:gsk|hf)_[A-Za-z0-9]{30,}
    | \bxai-[A-Za-z0-9]{30,}
    | \b(?:xox[abeprs]|xapp)-[A-Za-z0-9-]{10,}
    | \b[0-9]{8,10}:AA[A-Za-z0-9_-]{33}\b
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \bAIza[A-Za-z0-9_-]{30,}
    | \beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}
    # A word of prose may follow too ("Bearer authentication"): it is short and has no digit.
    | (?<=[Bb]earer\ )(?=[A-Za-z._~+/=-]*[0-9]|[A-Za-z._~+/=-]{24})[A-Za-z0-9._~+/=-]{12,}
    | (?<=[Aa]uthorization:\ [Bb]asic\ )[A-Za-z0-9+/=]{12,}
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY(?:\ BLOCK)?-----
      [\s\S]*?(?:-----END\ [A-Z ]*PRIVATE\ KEY(?:\ BLOCK)?-----|\Z)
    """,
    re.VERBOSE,
)

#: What a text has in it where one of the shapes may fit, one for each of them at least. Most texts
#: have none, and looking for these is some thirty times as quick as looking for the shapes.
NEEDLES: Final = (
    *("sk-", "rk-", "pk-", "sk_", "rk_", "hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    *("github_pat_", "glpat-", "xai-", "xox", "xapp-", ":AA", "AKIA", "ASIA", "AIza", "eyJ"),
    *("earer ", "asic ", "-----BEGIN "),
)

#: Name and password in a URL; apart from the shapes, which are long, so that `re` can skip a short
#: text at once.
LOGIN: Final = re.compile(r"""(?<=://)[^\s/:@"']*:[^\s/@"']+(?=@)""")

#: A field with such a name holds a secret, whatever its value looks like.
SECRET_NAME: Final = re.compile(
    r"""
      (?:.*(?:[_-]|[a-z0-9](?=[A-Z])))?
      (?i:(?:password|passwd|passphrase|secret|token|credential|authorization
        |(?:api|private|secret|access)[_-]?key)s?)
      $
    """,
    re.VERBOSE,
)

#: A long text is masked in pieces of about so many characters: a piece takes some milliseconds.
PIECE_CHARS: Final = 65_536

#: How far around the place of a cut a secret is looked for that it would cut in two: more than the
#: key block of any algorithm has. Then how far before its own text one is recognised by.
REACH_CHARS: Final = 32_768
_BEFORE_CHARS: Final = len("Authorization: Basic ")
_BEFORE: Final = re.compile(r"[\s\S]*(?:[Bb]earer |[Bb]asic |://)\Z")

#: How much of what stands at an edge without a space may be a part of a secret.
EDGE_CHARS_MAX: Final = 4_096

_KEY_ENDS: Final = re.compile(r"-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----")
_KEY_BEGINS: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")

#: A known secret shorter than this would mask ordinary words.
KNOWN_LENGTH_MIN: Final = 8

#: Fewer characters of one tell nothing.
BEGUN_LENGTH_MIN: Final = 4


class Masker:
    """Replaces secrets in text and in JSON values. `known` are values that must never be seen."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self._known: re.Pattern[str] | None = None
        self.hide(known)

    def hide(self, values: Iterable[str]) -> set[str]:
        """Replace these values too from now on; those that are short would mask ordinary words.

        Returns those that were not replaced before, for `forget`.
        """
        new = {value for value in values if len(value) >= KNOWN_LENGTH_MIN} - self._values
        if new:
            self._values |= new
            self._compile()
        return new

    def forget(self, values: Iterable[str]) -> None:
        """Replace these values no more: they have been of use for nothing for long."""
        self._values -= set(values)
        self._compile()

    def _compile(self) -> None:
        ordered = sorted(self._values, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def knows(self, text: str) -> bool:
        """Return whether one of the known values stands in the text."""
        return self._known is not None and self._known.search(text) is not None

    def text(self, text: str) -> str:
        """Return the text with every secret in it replaced."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        if "://" in text and "@" in text:
            text = LOGIN.sub(MASK, text)
        return SHAPES.sub(MASK, text) if _may_fit(text) else text

    def arguments(self, text: str) -> str:
        """Return a call's arguments, as a model wrote them, as people may see them: JSON if it is.

        Whole and not in pieces, since a secret cannot be recognised in pieces.
        """
        try:
            value = self.value(json.loads(text or "{}"))
        except (ValueError, RecursionError):
            return self.text(text)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def pieces(self, text: str) -> Iterator[str]:
        """Yield what `text` returns in pieces, so that others come in between: it takes its time.

        A secret longer than `REACH_CHARS` may be cut in two, and is then seen in part.
        """
        start = 0
        while start < len(text):
            end = self._whole_until(text, start + PIECE_CHARS)
            yield self.text(text[start:end])
            start = end

    def _whole_until(self, text: str, at: int) -> int:
        """Return the first place from here on that is inside of no secret."""
        while at < len(text):
            first, looked_from = max(0, at - REACH_CHARS), at
            around = text[first : at + REACH_CHARS]
            # In their order: whoever is passed by then reaches no further than the place does.
            for found in sorted(self._found(around), key=lambda match: match.start()):
                begin, end = found.start(), found.end()
                if found.re is LOGIN:
                    end += len("@")
                if _BEFORE.match(around, max(0, begin - _BEFORE_CHARS), begin):
                    begin -= _BEFORE_CHARS
                if begin < at - first < end:
                    at = first + end
            if at == looked_from:
                break
        return min(at, len(text))

    def _found(self, text: str) -> Iterator[re.Match[str]]:
        """Yield what `text` replaces, in its order: one replacement can bare what is next to it."""
        if self._known is not None:
            yield from self._known.finditer(text)
            text = self._known.sub(_filled, text)
        if "://" in text and "@" in text:
            yield from LOGIN.finditer(text)
            text = LOGIN.sub(_filled, text)
        if _may_fit(text):
            yield from SHAPES.finditer(text)

    def cut(self, text: str) -> str:
        """Return a text whose end was cut off, without the beginning of a known value there.

        The value itself does not stand in it any more, so that `text` would not find it.
        """
        begun = max((_begun(text, value) for value in self._values), default=0)
        return text[:-begun] + MASK if begun else text

    def value(self, value: Any) -> Any:
        """Return a copy of a JSON value with the secrets in it replaced, field names respected."""
        match value:
            case str():
                return self.text(value)
            case dict():
                return {
                    self.text(str(name)): _hidden(item)
                    if SECRET_NAME.match(str(name))
                    else self.value(item)
                    for name, item in value.items()
                }
            case list():
                return [self.value(item) for item in value]
            case _:
                return value


def _filled(found: re.Match[str]) -> str:
    """Return what is as long as a secret, and begins and ends as `MASK` does."""
    return "]" * len(found[0])


def _may_fit(text: str) -> bool:
    return any(needle in text for needle in NEEDLES)


def without_begun(text: str) -> str:
    """Return a text that was cut off, without what may be the first part of a secret."""
    words = text[-EDGE_CHARS_MAX:].rsplit(maxsplit=1)
    return text if not words or text[-1].isspace() else text[: -len(words[-1])]


def without_ended(text: str) -> str:
    """Return a text that begins in the middle of another, without what may end a secret there."""
    end, begin = _KEY_ENDS.search(text), _KEY_BEGINS.search(text)
    if end is not None and (begin is None or end.start() < begin.start()):
        return MASK + text[end.end() :]
    words = text[:EDGE_CHARS_MAX].split(maxsplit=1)
    return text if not words or text[0].isspace() else text[len(words[0]) :]


def _begun(text: str, value: str) -> int:
    """Return how many characters a text ends with that a value begins with, if they are many."""
    lengths = range(min(len(text), len(value) - 1), BEGUN_LENGTH_MIN - 1, -1)
    return next((count for count in lengths if text.endswith(value[:count])), 0)


def _hidden(value: Any) -> Any:
    """Return a copy without any text; numbers stay, because `max_tokens` counts."""
    match value:
        case str():
            return MASK if value else value
        case dict():
            return {name: _hidden(item) for name, item in value.items()}
        case list():
            return [_hidden(item) for item in value]
        case _:
            return value
