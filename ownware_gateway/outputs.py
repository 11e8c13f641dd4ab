"""What becomes of a tool's output: what the model is told, what clients see, what is kept.

Secrets are masked in all of it before anything is cut: the first part of a secret at the place of
a cut would be recognised by nobody. Imported for the first output that is more than a short text.
"""

import asyncio
import json
import re
from typing import Any, Final, NamedTuple

from ownware_gateway.events import ContentPart, ImagePart, ResourcePart, ValuePart
from ownware_gateway.images import IMAGE_BYTES_MAX, SIDE_PX_MAX, shown_as_image
from ownware_gateway.log import Private
from ownware_gateway.masking import PIECE_CHARS, Masker
from ownware_gateway.models import File
from ownware_gateway.tools import (
    PART_BYTES_MAX,
    PARTS_BYTES_MAX,
    PARTS_MAX,
    VALUE_BYTES_MAX,
    VALUE_DEPTH_MAX,
    Image,
    Output,
    Part,
    Resource,
    Value,
    Whole,
)
from ownware_gateway.transcript import image_file

#: Most characters of the name of a resource.
URI_CHARS_MAX: Final = 2_048

#: What stands for the type of what names none, or none that is one.
UNKNOWN_TYPE: Final = "application/octet-stream"

_TYPE: Final = re.compile(r"[\w.+-]{1,63}/[\w.+-]{1,63}", re.ASCII)
_TEXT: Final = re.compile(r"text/.*|application/(?:.*\+)?(?:json|xml|yaml)")


class Settled(NamedTuple):
    """An output as it goes on: into its event, beside the log, and as images to the model."""

    text: str
    bytes_kept: int | None = None
    content: list[ContentPart] | None = None
    private: tuple[Private, ...] = ()
    images: tuple[File, ...] = ()


async def settle(output: Output, masker: Masker, read_on: str | None) -> Settled:
    """Mask an output, and take it apart.

    `read_on` tells a model that was told a part how to read the rest; None where it cannot.
    """
    private: list[Private] = []
    bytes_kept = None
    if output.whole is None:
        text = await _masked(output.text, masker)
    else:
        whole = await _masked(output.whole.text, masker)
        text = output.whole.told(whole)
        kept = whole.encode("utf-8", "replace")
        bytes_kept = len(kept)
        private.append(Private("output", kept))
        text += _more(output, output.whole, read_on)
    if not output.content:
        return Settled(text, bytes_kept, private=tuple(private))
    parts = _Parts(masker)
    for part in output.content:
        await parts.add(part)
    return Settled(
        "\n".join([text, *parts.notes()]),
        bytes_kept,
        parts.content or None,
        (*private, *parts.private),
        tuple(parts.images),
    )


def _more(output: Output, whole: Whole, read_on: str | None) -> str:
    if read_on is None:
        return ""
    held = len(whole.text.encode("utf-8", "replace"))
    which = "" if held >= output.bytes_raw else f" of the {held} bytes that are kept"
    return f"\n[{read_on}{which}]"


async def _masked(text: str, masker: Masker) -> str:
    """Mask a text; while a long one takes its time, others go on."""
    if len(text) <= PIECE_CHARS:
        return masker.text(text)
    pieces = []
    for piece in masker.pieces(text):
        pieces.append(piece)
        await asyncio.sleep(0)
    return "".join(pieces)


class _Parts:
    """The parts of one output, as many and as much as may be kept; what is not is said."""

    def __init__(self, masker: Masker) -> None:
        self.content: list[ContentPart] = []
        self.private: list[Private] = []
        self.images: list[File] = []
        self._masker = masker
        self._left_bytes = PARTS_BYTES_MAX
        self._left_of_values = VALUE_BYTES_MAX
        self._too_many = 0
        self._too_big = 0
        self._no_image = 0

    def notes(self) -> list[str]:
        """Return what the model should know of what is not there."""
        notes = []
        if self._too_many:
            notes.append(f"[parts left out: {self._too_many}; {PARTS_MAX} are the most]")
        if self._too_big:
            notes.append(
                f"[parts left out: {self._too_big}; {PART_BYTES_MAX} bytes are the most, "
                f"{PARTS_BYTES_MAX} together, {VALUE_BYTES_MAX} of JSON values]"
            )
        if self._no_image:
            notes.append(
                f"[images not shown: {self._no_image}; PNG, JPEG, GIF and WebP can be, up to "
                f"{IMAGE_BYTES_MAX} bytes and {SIDE_PX_MAX} pixels a side]"
            )
        return notes

    async def add(self, part: Part) -> None:
        """Take the next part."""
        if len(self.content) >= PARTS_MAX:
            self._too_many += 1
            return
        match part:
            case Value():
                self._value(part.value)
            case Image():
                self._image(part)
            case Resource():
                await self._resource(part)

    def _value(self, value: Any) -> None:
        length = _length(value)
        if length is None or length > self._left_of_values:
            self._too_big += 1
            return
        self._left_of_values -= length
        self.content.append(ValuePart(value=self._masker.value(value)))

    def _image(self, image: Image) -> None:
        picture = shown_as_image(image.data)
        if picture is None:
            self._no_image += 1
            self._keep_resource("", type_of(image.mime_type), image.data)
        elif (index := self._kept("image", image.data)) is not None:
            kind, size_bytes = picture.mime_type, len(image.data)
            self.content.append(ImagePart(mime_type=kind, size_bytes=size_bytes, index=index))
            self.images.append(image_file(kind, index, image.data))

    async def _resource(self, resource: Resource) -> None:
        uri = self._masker.text(resource.uri)[:URI_CHARS_MAX]
        kind, body = type_of(resource.mime_type), resource.body
        if body is None:
            size_bytes = resource.size_bytes
            self.content.append(ResourcePart(uri=uri, mime_type=kind, size_bytes=size_bytes))
            return
        if len(body) > PART_BYTES_MAX:
            self._too_big += 1
            return
        if isinstance(body, bytes) and _TEXT.fullmatch(kind):
            body = body.decode("utf-8", "replace")
        if isinstance(body, str):
            body = (await _masked(body, self._masker)).encode("utf-8", "replace")
        self._keep_resource(uri, kind, body)

    def _keep_resource(self, uri: str, kind: str, body: bytes) -> None:
        if (index := self._kept("resource", body)) is not None:
            size = len(body)
            self.content.append(ResourcePart(uri=uri, mime_type=kind, size_bytes=size, index=index))

    def _kept(self, kind: Any, body: bytes) -> int | None:
        """Keep the bytes of a part; return under which number, None where they are too many."""
        if len(body) > min(PART_BYTES_MAX, self._left_bytes):
            self._too_big += 1
            return None
        self._left_bytes -= len(body)
        index = len(self.private)
        self.private.append(Private(kind, body, index))
        return index


def type_of(said: str) -> str:
    """Return a MIME type without its parameters, if it is one."""
    kind = said.partition(";")[0].strip().lower()
    return kind if _TYPE.fullmatch(kind) else UNKNOWN_TYPE


def _length(value: Any) -> int | None:
    """Return how long a value is as JSON; None where it is none, or too deep for an event."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > VALUE_DEPTH_MAX:
            return None
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    try:
        return len(json.dumps(value))
    except (TypeError, ValueError):
        # A tool of somebody's own may take anything for a JSON value.
        return None
