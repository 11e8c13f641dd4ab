"""What a service answered, as the output of a tool. Pure."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, NamedTuple

from ownware_gateway.tools import Image, Output, Resource, ToolFailed, clip

#: How much of an answer is read; more is cut.
RESPONSE_BYTES_MAX: Final = 2 * 1024 * 1024

#: How much of an answer that says no is told.
ERROR_CHARS_MAX: Final = 2_000

_TEXT: Final = re.compile(
    r"text/.*|application/(?:.*\+)?(?:json|xml|yaml|x-yaml|javascript|x-ndjson|graphql)"
    r"|application/x-www-form-urlencoded"
)


class Answered(NamedTuple):
    """An answer: its status, what kind of body it has, and as much of that as was read."""

    status: int
    content_type: str
    charset: str
    body: bytes
    is_whole: bool


def render(answered: Answered, call: str, cut: Callable[[str], str] = str) -> Output:
    """Return the output of a call, which `call` names. Raises ToolFailed for what is no success.

    `cut` is given what is left of a text that was cut, see `Masker.cut`.
    """
    text = _text(answered)
    if not answered.is_whole:
        text = cut(text)
    if not 200 <= answered.status < 300:
        said = text if len(text) <= ERROR_CHARS_MAX else cut(text[:ERROR_CHARS_MAX])
        said = said.strip() or "no explanation"
        raise ToolFailed(f"HTTP {answered.status} from {call}: {said}")
    output = clip(text or f"[HTTP {answered.status}, without a body]")
    if answered.is_whole:
        return replace(output, content=_parts(answered, call))
    note = f"\n[cut: only the first {len(answered.body)} bytes of the answer were read]"
    return Output(output.text + note, True, output.bytes_raw)  # noqa: FBT003 - a field


def _parts(answered: Answered, call: str) -> tuple[Image | Resource, ...]:
    """Return what cannot be shown as text: an image to the model, a file to people."""
    kind = answered.content_type.lower()
    if not answered.body or not kind or _TEXT.fullmatch(kind):
        return ()
    if kind.startswith("image/"):
        return (Image(kind, answered.body),)
    return (Resource(call, kind, answered.body),)


def _text(answered: Answered) -> str:
    kind = answered.content_type.lower()
    if kind and not _TEXT.fullmatch(kind):
        size = f"{len(answered.body)} bytes{'' if answered.is_whole else ' or more'}"
        if kind.startswith("image/"):
            return f"[image: {kind}, {size}]"
        return f"[{kind}, {size}, which cannot be shown as text]" if answered.body else ""
    try:
        text = answered.body.decode(answered.charset, "replace")
    except LookupError:
        text = answered.body.decode("utf-8", "replace")
    if kind.endswith("json") and answered.is_whole:
        try:
            value = json.loads(text)
            return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        except (ValueError, RecursionError):
            pass  # Then it is text.
    return text
