"""Secrets never reach a frame: what they are replaced with, and how they are recognised."""

import re
from collections.abc import Iterable
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

#: A known secret shorter than this would mask ordinary words.
KNOWN_LENGTH_MIN: Final = 8


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
        if "://" in text:
            text = LOGIN.sub(MASK, text)
        return SHAPES.sub(MASK, text)

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
