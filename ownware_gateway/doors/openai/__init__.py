"""The OpenAI door, `/v1`: completions, responses, models, embeddings, as OpenAI's clients ask.

The routes and what of the format is honoured stand in docs/openai.md. What handles the requests is
imported with the first one, away from the event loop: many gateways never get any.
"""

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from aiohttp import web

from ownware_gateway.doors.openai.errors import answer_to
from ownware_gateway.engine import Engine
from ownware_gateway.log import Log
from ownware_gateway.models import Catalogue
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.stream import Streamer

__all__ = ["OpenAI", "OpenAIParts", "answer_to", "answers"]

_HANDLERS: Final = "ownware_gateway.doors.openai.responses"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answers(path: str) -> bool:
    """Whether what goes wrong at this path is told in OpenAI's envelope."""
    return path.startswith(("/v1/", "/openai/")) or path in ("/embed", "/execute")


class OpenAIParts(NamedTuple):
    """What the door opens onto.

    `cancels` says that a run without a conversation is cancelled once nobody reads it,
    `helper_prompts` that chat UIs' own prompts get a run of their own. `fetch_private` are private
    places that images may come from. `started_s` is when the gateway was started, in seconds since
    1970. `new_id` makes the name of something of a kind.
    """

    engine: Engine
    log: Log
    streamer: Streamer
    catalogue: Catalogue
    profiles: Profiles
    cancels: bool
    helper_prompts: bool
    fetch_private: tuple[str, ...]
    started_s: int
    new_id: Callable[[str], str]


class OpenAI:
    """The routes of the door, and the handlers once they are needed."""

    def __init__(self, parts: OpenAIParts) -> None:
        self._parts = parts
        self._handlers: Any = None
        self._loading = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """Return every route of the door."""
        of_profile = "/openai/{profile_id}/v1"
        stream = "/v1/chat/completions/{completion_id}/stream"
        response = "/v1/responses/{response_id}"
        models, model = self._late("models"), self._late("model")
        return [
            web.get("/health", _health),
            web.get("/v1/models", models),
            web.get("/v1/models/{model_id:.+}", model),
            web.post("/v1/chat/completions", self._late("chat")),
            web.get(stream, self._late("resume"), allow_head=False),
            web.post("/v1/approvals/{run_id}", self._late("approve")),
            web.post("/v1/responses", self._late("create")),
            web.get(response, self._late("retrieve"), allow_head=False),
            web.delete(response, self._late("delete")),
            web.post(f"{response}/cancel", self._late("cancel")),
            web.get(f"{response}/input_items", self._late("input_items")),
            web.post("/v1/embeddings", self._late("embeddings")),
            web.get(f"{of_profile}/models", models),
            web.post(f"{of_profile}/models", models),
            web.post(f"{of_profile}/chat/completions", self._late("chat")),
            web.post("/embed", self._late("embed")),
            web.post("/execute", self._late("execute")),
        ]

    def _late(self, name: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            if self._handlers is None:
                await self._load()
            answer: web.StreamResponse = await getattr(self._handlers, name)(request)
            return answer

        return handle

    async def _load(self) -> None:
        async with self._loading:
            if self._handlers is None:
                module = await asyncio.to_thread(importlib.import_module, _HANDLERS)
                self._handlers = module.Responses(self._parts)


async def _health(_: web.Request) -> web.Response:
    """Say that the process answers; never needs a token."""
    return web.json_response({"status": "ok"})
