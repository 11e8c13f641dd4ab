"""What a call gave back: the blocks of its result, and those as the output of a tool.

A block keeps what it is (text, data of a kind), so that an output that can hold more than text
needs another `render` and nothing else. Without the SDK: a result comes in as its JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ownware_gateway.tools import Output, clip

#: Blocks of one result that are looked at.
BLOCKS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a result: text, or `base64` data of a MIME type; `uri` is where it is from."""

    text: str = ""
    mime_type: str = ""
    base64: str = ""
    uri: str = ""

    @property
    def size_bytes(self) -> int:
        """How large the data is."""
        return len(self.base64.rstrip("=")) * 3 // 4


def blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of a `tools/call` result; structured content where there is no text."""
    found = [_block(item) for item in (result.get("content") or ())[:BLOCKS_MAX]]
    structured = result.get("structuredContent")
    if structured is not None and not any(block.text for block in found):
        found.append(Block(json.dumps(structured, ensure_ascii=False), "application/json"))
    return found


def _block(item: Mapping[str, Any]) -> Block:
    match item:
        case {"type": "text", "text": str(text)}:
            return Block(text)
        case {"type": "image" | "audio", "data": str(data)}:
            return Block(mime_type=str(item.get("mimeType", "")), base64=data)
        case {"type": "resource_link", "uri": uri}:
            name = item.get("title") or item.get("name") or ""
            return Block(f"[{name}]({uri})", uri=str(uri))
        case {"type": "resource", "resource": {"text": str(text), **rest}}:
            return Block(text, str(rest.get("mimeType") or ""), uri=str(rest.get("uri", "")))
        case {"type": "resource", "resource": {"blob": str(blob), **rest}}:
            uri = str(rest.get("uri", ""))
            return Block(mime_type=str(rest.get("mimeType") or ""), base64=blob, uri=uri)
        case _:
            return Block(f"[content of the kind {item.get('type')!r}, which is not known here]")


def render(found: Sequence[Block], *, is_error: bool) -> Output:
    """Return blocks as text: data becomes a sentence with its kind and size."""
    output = clip("\n".join(_text(block) for block in found) or "[no output]")
    return Output(output.text, output.truncated, output.bytes_raw, is_error=is_error)


def _text(block: Block) -> str:
    if not block.base64:
        return block.text
    where = f" from {block.uri}" if block.uri else ""
    kind = block.mime_type or "application/octet-stream"
    return f"[{kind}, {block.size_bytes} bytes{where}, which cannot be shown as text]"
