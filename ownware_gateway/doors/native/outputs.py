"""What tools gave back beside the events: whole outputs, images and other files."""

import re
from typing import Final

from aiohttp import web

from ownware_gateway.errors import GatewayError
from ownware_gateway.events import ContentPart, ImagePart, ResourcePart, ToolCallEnd, ValuePart
from ownware_gateway.log import Log, Stream

#: What a browser may be told that bytes are: types that run nothing. Whoever wrote the tool, or
#: the page that it has read, has chosen both, so anything else is bytes and nothing more.
IMAGE_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
SAFE_TYPES: Final = IMAGE_TYPES | {
    *("application/json", "application/pdf", "text/plain"),
    *("audio/mpeg", "audio/wav", "audio/ogg", "audio/webm", "audio/flac", "audio/aac", "audio/mp4"),
}

#: Nothing is guessed, nothing is run, and nothing of a thread stays behind when it is deleted.
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "no-store",
}

_NUMBER: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


def number(request: web.Request, name: str) -> int:
    """Return a number of the path; raises GatewayError."""
    text = request.match_info[name]
    if not _NUMBER.fullmatch(text):
        raise GatewayError("invalid_request", f"The path must have a number for '{name}'.")
    return int(text)


async def text_response(log: Log, stream: Stream, seq: int) -> web.Response:
    """Return all of the text that a call gave back, secrets masked. Raises GatewayError."""
    end = await _end(log, stream, seq)
    text = end.result.encode("utf-8", "replace")
    if end.output_bytes_kept is not None:
        text = await log.private_at(stream, seq, "output") or text
    response = web.Response(body=text, content_type="text/plain", charset="utf-8", headers=_HEADERS)
    response.headers["Content-Disposition"] = f'attachment; filename="output-{seq}.txt"'
    return response


async def part_response(log: Log, stream: Stream, seq: int, index: int) -> web.Response:
    """Return the bytes of a part of what a call gave back. Raises GatewayError."""
    part = _part(await _end(log, stream, seq), index)
    body = part and await log.private_at(stream, seq, part.kind, index)
    if part is None or body is None:
        raise GatewayError("output_not_found", f"The call at {seq} has no part {index} with bytes.")
    kind = part.mime_type if part.mime_type in SAFE_TYPES else "application/octet-stream"
    shown = "inline" if kind in IMAGE_TYPES else "attachment"
    suffix = kind.rpartition("/")[2].replace("octet-stream", "bin")
    response = web.Response(body=body, headers=_HEADERS)
    response.content_type = kind
    response.headers["Content-Disposition"] = f'{shown}; filename="output-{seq}-{index}.{suffix}"'
    return response


async def _end(log: Log, stream: Stream, seq: int) -> ToolCallEnd:
    found = await log.read(stream, seq - 1, limit=1) if seq else []
    event = found[0].event() if found and found[0].seq == seq else None
    if not isinstance(event, ToolCallEnd):
        raise GatewayError(
            "output_not_found", f"No tool call ended at {seq}, or it is not kept any more."
        )
    return event


def _part(end: ToolCallEnd, index: int) -> ImagePart | ResourcePart | None:
    found: list[ContentPart] = end.content or []
    for part in found:
        if not isinstance(part, ValuePart) and part.index == index:
            return part
    return None
