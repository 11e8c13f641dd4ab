"""What a docstring says, taken apart: what a function does, and what each parameter is.

Three habits are known: Google's `Args:`, numpy's underlined `Parameters`, and Sphinx's `:param x:`.
Pure; whatever does not fit one of them is part of the description.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

_GOOGLE: Final = re.compile(r"(Args|Arguments|Parameters|Params|Keyword Args|Other Parameters):")
_OTHERS: Final = re.compile(
    r"(?:Attributes|Examples?|Notes?|Raises|References|Returns?|See Also|Todo|Warns?|Yields?):?"
)
_UNDERLINE: Final = re.compile(r"-{3,}|={3,}")
_GOOGLE_ITEM: Final = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ITEM: Final = re.compile(r"\*{0,2}(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?")
_SPHINX_ITEM: Final = re.compile(
    r":(?:param|parameter|arg|argument)(?:\s+[^:]*?)?\s+\*{0,2}(\w+):\s*(.*)"
)
_SPHINX_OTHER: Final = re.compile(r":(?:\w+)(?:\s+[^:]*)?:(?:\s|$)")


class Docstring(NamedTuple):
    """A docstring: the text before its sections, and what is said of parameters, by name."""

    text: str
    parameters: dict[str, str]


def parse(doc: str) -> Docstring:
    """Take a docstring apart, whose indentation is removed."""
    lines = doc.strip().split("\n")
    end = next((at for at in range(len(lines)) if _begins_section(lines, at)), len(lines))
    parameters: dict[str, list[str]] = {}
    for name, text in _items(lines, end):
        parameters.setdefault(name, []).append(text)
    said = {name: " ".join(" ".join(texts).split()) for name, texts in parameters.items()}
    return Docstring(
        "\n".join(lines[:end]).strip(), {name: text for name, text in said.items() if text}
    )


def _begins_section(lines: list[str], at: int) -> bool:
    line = lines[at]
    underlined = at + 1 < len(lines) and _UNDERLINE.fullmatch(lines[at + 1].strip()) is not None
    if _SPHINX_ITEM.match(line) or _SPHINX_OTHER.match(line):
        return True
    named = _GOOGLE.fullmatch(line.strip() + ("" if line.strip().endswith(":") else ":"))
    other = _OTHERS.fullmatch(line.strip())
    return bool(named or other) and (underlined or line.rstrip().endswith(":"))


def _items(lines: list[str], start: int) -> Iterator[tuple[str, str]]:
    """Yield names of parameters with a line of what is said of each."""
    names: list[str] = []
    within = numpy = False
    depth: int | None = None
    for at in range(start, len(lines)):
        line = lines[at]
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if found := _SPHINX_ITEM.match(text):
            within, names = False, [found[1]]
            yield found[1], found[2]
        elif _SPHINX_OTHER.match(text):
            within, names = False, []
        elif _begins_section(lines, at):
            numpy = not text.endswith(":")
            within, names, depth = _GOOGLE.fullmatch(f"{text.rstrip(':')}:") is not None, [], None
        elif text and not _UNDERLINE.fullmatch(text):
            depth = indent if depth is None else depth
            item = (_NUMPY_ITEM if numpy else _GOOGLE_ITEM).fullmatch(text)
            if within and indent <= depth and item is not None:
                names = re.split(r"\s*,\s*", item[1])
                yield from ((name, "" if numpy else item[2]) for name in names)
            else:
                yield from ((name, text) for name in names)
