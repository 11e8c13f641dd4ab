"""The OpenAI door: what its tests ask with, and how they read what comes."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from ownware_gateway.sse import Frame
from tests.gateway import read_frames

CHAT = "/v1/chat/completions"

Headers = Mapping[str, str]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


async def post(
    http: aiohttp.ClientSession, url: str, path: str, body: Any, headers: Headers | None = None
) -> tuple[int, Mapping[str, str], Any]:
    """Return status, headers and JSON of a POST."""
    async with http.post(f"{url}{path}", json=body, headers=headers) as response:
        return response.status, response.headers, await response.json()


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    *messages: Any,
    headers: Headers | None = None,
    **body: Any,
) -> dict[str, Any]:
    """Return a completion, which must be a 200; a text is a user's message."""
    said = [user(item) if isinstance(item, str) else item for item in messages]
    status, _, answer = await post(http, url, CHAT, {"messages": said, **body}, headers)
    assert status == 200, answer
    return dict(answer)


def content(completion: Mapping[str, Any]) -> str:
    return str(completion["choices"][0]["message"]["content"])


@contextlib.asynccontextmanager
async def stream(
    http: aiohttp.ClientSession,
    url: str,
    *messages: Any,
    headers: Headers | None = None,
    **body: Any,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask for a stream, which must be a 200; leaving hangs up."""
    said = [user(item) if isinstance(item, str) else item for item in messages]
    body = {"messages": said, "stream": True, **body}
    async with http.post(f"{url}{CHAT}", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        yield response


async def streamed(
    http: aiohttp.ClientSession,
    url: str,
    *messages: Any,
    headers: Headers | None = None,
    **body: Any,
) -> list[Frame]:
    """Return all frames of a stream."""
    async with stream(http, url, *messages, headers=headers, **body) as response:
        return await read_frames(response)


def chunks(frames: list[Frame]) -> list[dict[str, Any]]:
    """Return the chunks among frames, the last of which must be the mark of the end."""
    assert frames[-1].data == "[DONE]", frames
    return [json.loads(frame.data) for frame in frames[:-1]]


def said(frames: list[Frame]) -> str:
    """Return what the deltas of frames say."""
    found = [json.loads(frame.data) for frame in frames if frame.data != "[DONE]"]
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in found
        for choice in chunk.get("choices", ())
    )


def finish(frames: list[Frame]) -> str | None:
    """Return why a stream ended."""
    reasons = [choice["finish_reason"] for chunk in chunks(frames) for choice in chunk["choices"]]
    return next((reason for reason in reasons if reason), None)
