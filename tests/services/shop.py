"""A service of our own for the tests: a small shop on loopback that describes itself.

Its OpenAPI document is made from its table of routes and the models of its bodies. It counts what
comes, keeps whole requests, and can be told to misbehave.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web
from multidict import CIMultiDictProxy
from pydantic import BaseModel, Field

from tests.loopback import Loopback
from tests.pictures import png

#: What the log-in takes, and what a value of its begins with; built so that neither is a literal.
PASSWORD: Final = "open-" + "sesame-42"
SESSION: Final = "session-" + "value-"


class Item(BaseModel):
    name: str
    price: float = 0.0
    tags: list[str] = []
    more: "list[Item]" = []
    stock: int = Field(default=0, json_schema_extra={"readOnly": True})


class Note(BaseModel):
    text: str
    stars: int | None = None


@dataclass(frozen=True, slots=True)
class Came:
    """A request as it came: the path with its escapes, and the rest."""

    method: str
    raw_path: str
    query: list[tuple[str, str]]
    headers: CIMultiDictProxy[str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    fields: dict[str, Any] = field(default_factory=dict)


def parameter(name: str, where: str, kind: Any = "string", **fields: Any) -> dict[str, Any]:
    schema = kind if isinstance(kind, dict) else {"type": kind}
    return {"name": name, "in": where, "schema": schema, "required": where == "path"} | fields


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    ref = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": ref}}}


class Shop(Loopback):
    """The service: `async with Shop() as shop:`. `needs` is what calls must bear to be let in."""

    def __init__(self) -> None:
        self.url = ""
        self.came: list[Came] = []
        self.spec_requests: list[Came] = []
        self.logins = 0
        self.needs_login = False
        self.spec_change: Callable[[dict[str, Any]], Any] = lambda spec: spec
        self.spec_status = 200
        self.gate: asyncio.Event | None = None
        self.session = ""
        self.routes = [
            Route(
                "get",
                "/items/{id}",
                self.item,
                {
                    "operationId": "getItem",
                    "summary": "Look at one item.",
                    "parameters": [parameter("id", "path")],
                },
            ),
            Route(
                "get",
                "/items",
                self.echo,
                {
                    "operationId": "listItems",
                    "parameters": [
                        parameter("tags", "query", {"type": "array", "items": {"type": "string"}}),
                        parameter("filter", "query", {"type": "object"}, style="deepObject"),
                        parameter("key", "query"),
                        parameter("X-Trace", "header"),
                    ],
                },
            ),
            Route(
                "post",
                "/items",
                self.echo,
                {
                    "operationId": "addItem",
                    "requestBody": json_body(Item),
                },
            ),
            Route(
                "put",
                "/items/{id}",
                self.echo,
                {
                    "operationId": "putItem",
                    "parameters": [parameter("id", "path")],
                    "requestBody": json_body(Note),
                },
            ),
            Route(
                "delete",
                "/items/{id}",
                self.echo,
                {
                    "operationId": "deleteItem",
                    "parameters": [parameter("id", "path")],
                },
            ),
            Route("post", "/slow", self.slow, {"operationId": "slow"}),
            Route("put", "/break", self.broken, {"operationId": "break"}),
            Route("get", "/picture", self.picture, {"operationId": "picture"}),
            Route("get", "/large", self.large, {"operationId": "large"}),
            Route(
                "get",
                "/away",
                self.away,
                {
                    "operationId": "away",
                    "parameters": [parameter("to", "query")],
                },
            ),
            Route("get", "/health", self.echo, {"operationId": "health"}),
        ]
        app = web.Application(middlewares=[self._keep])
        app.add_routes([web.route(item.method, item.path, item.handler) for item in self.routes])
        app.add_routes([web.get("/openapi.json", self.spec), web.post("/login", self.login)])
        super().__init__(app)

    def settings(self, **fields: Any) -> dict[str, Any]:
        """The settings of a service that is this shop."""
        return {"spec": f"{self.url}/openapi.json", "allowPrivate": True, **fields}

    def document(self) -> dict[str, Any]:
        """What the shop says of itself."""
        paths: dict[str, Any] = {}
        for item in self.routes:
            paths.setdefault(item.path, {})[item.method] = item.fields
        schemas: dict[str, Any] = {}
        for model in (Item, Note):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas.setdefault(model.__name__, schema)
        return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas}}

    @web.middleware
    async def _keep(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        came = Came(
            request.method,
            request.rel_url.raw_path,
            list(request.query.items()),
            request.headers,
            await request.read(),
        )
        if request.path == "/openapi.json":
            self.spec_requests.append(came)
            return await handler(request)
        if request.path == "/login":
            return await handler(request)
        if self.needs_login and request.headers.get("Authorization") != f"Bearer {self.session}":
            return web.json_response({"detail": "log in first"}, status=401)
        self.came.append(came)
        return await handler(request)

    # -- handlers

    async def spec(self, request: web.Request) -> web.StreamResponse:
        document: Any = self.spec_change(self.document())
        text = document if isinstance(document, str) else json.dumps(document)
        tag = f'"{hash(text)}"'
        if self.spec_status != 200:
            return web.Response(status=self.spec_status, headers={"Location": "/elsewhere"})
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        return web.Response(text=text, content_type="application/json", headers={"ETag": tag})

    async def login(self, request: web.Request) -> web.StreamResponse:
        self.logins += 1
        given = (await request.json()).get("password")
        if given != PASSWORD:
            return web.json_response({"detail": f"not {given}"}, status=403)
        self.session = f"{SESSION}{self.logins}"
        return web.json_response({"data": {"token": self.session}})

    async def item(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["id"] == "none":
            return web.json_response({"detail": "no such item"}, status=404)
        return web.json_response({"id": request.match_info["id"], "name": "Ünï"})

    async def echo(self, request: web.Request) -> web.StreamResponse:
        """Say back what came, secrets and all."""
        return web.json_response(
            {
                "method": request.method,
                "path": request.path_qs,
                "headers": dict(request.headers),
                "body": await request.text(),
            }
        )

    async def slow(self, request: web.Request) -> web.StreamResponse:
        assert self.gate is not None
        await self.gate.wait()
        return web.json_response("late")

    async def broken(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def picture(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=png(), content_type="image/png")

    async def large(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="x" * 5_000_000)

    async def away(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["to"]})
