"""What a call gave back: the blocks of its result, as the output of a tool.

Without the SDK: a result comes in as its JSON. What a server says of its data does not count: an
image is one by its bytes.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, Final

from ownware_gateway.images import shown_as_image
from ownware_gateway.tools import Image, Output, Part, Resource, Value, clip

#: Blocks of one result that are looked at.
BLOCKS_MAX: Final = 1_000


def output(result: Mapping[str, Any]) -> Output:
    """Return a `tools/call` result as an output: its text, and beside it all that is more.

    The text says of each part that there is one. Structured content is text too where there is no
    other, as the protocol has servers repeat it there.
    """
    found = _Found()
    for item in (result.get("content") or ())[:BLOCKS_MAX]:
        found.add(item)
    structured = result.get("structuredContent")
    if structured is not None:
        found.parts.insert(0, Value(structured))
        if not any(found.said):
            found.lines.append(_json(structured))
    clipped = clip("\n".join(found.lines) or "[no output]")
    return Output(
        clipped.text,
        clipped.truncated,
        clipped.bytes_raw,
        is_error=bool(result.get("isError")),
        content=found.parts,
        whole=clipped.whole,
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Found:
    """The lines of a text, which of them a server has said, and the parts beside it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said: list[str] = []
        self.parts: list[Part] = []

    def add(self, item: Mapping[str, Any]) -> None:
        """Take the next block."""
        match item:
            case {"type": "text", "text": str(text)}:
                self._say(text)
            case {"type": "image" | "audio", "data": str(data)}:
                self._data(data, str(item.get("mimeType", "")), "")
            case {"type": "resource_link", "uri": uri}:
                name = item.get("title") or item.get("name") or ""
                self._say(f"[{name}]({uri})")
                size = item.get("size")
                size_bytes = size if isinstance(size, int) and size >= 0 else None
                kind = str(item.get("mimeType") or "")
                self.parts.append(Resource(str(uri), kind, size_bytes=size_bytes))
            case {"type": "resource", "resource": {"text": str(text), **rest}}:
                self._say(text)
                kind = str(rest.get("mimeType") or "")
                self.parts.append(Resource(str(rest.get("uri", "")), kind, text))
            case {"type": "resource", "resource": {"blob": str(blob), **rest}}:
                self._data(blob, str(rest.get("mimeType") or ""), str(rest.get("uri", "")))
            case _:
                other = item.get("type")
                self.lines.append(f"[content of the kind {other!r}, which is not known here]")

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.lines.append(text)

    def _data(self, text: str, mime_type: str, uri: str) -> None:
        """Take data in base64: an image, or something else, which is kept for people."""
        where = f" from {uri}" if uri else ""
        kind = mime_type or "application/octet-stream"
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            self.lines.append(f"[{kind}{where}, which is no base64]")
            return
        size = f"{len(data)} bytes"
        if (picture := shown_as_image(data)) is not None:
            self.lines.append(f"[image: {picture.mime_type}, {size}{where}]")
            self.parts.append(Image(picture.mime_type, data))
        else:
            self.lines.append(f"[{kind}, {size}{where}, which cannot be shown as text]")
            self.parts.append(Resource(uri, kind, data))
