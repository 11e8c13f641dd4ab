"""Web sites for tests: real servers on loopback that count who comes, and names that lead to them.

A page is the bytes of a whole response, or a function that writes one.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDict

Page = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(
    body: bytes | str = b"",
    kind: str | None = "text/plain; charset=utf-8",
    status: int = 200,
    **headers: str,
) -> bytes:
    """Return a whole response; `_` in the name of a header stands for a hyphen."""
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(raw)}"]
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def moved(to: str, status: int = 302) -> bytes:
    """Return a redirect."""
    return answer(status=status, Location=to)


@dataclass(frozen=True, slots=True)
class Visit:
    """A request as it came: its first line, its headers, its body."""

    line: str
    headers: CIMultiDict[str]
    body: bytes


class Site:
    """A server: `async with Site(host) as site:`, then `site.pages[path] = page`."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = 0
        self.pages: dict[str, Page] = {}
        self.connections = 0
        self.visits: list[Visit] = []
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *fields = head.decode("latin-1").strip().split("\r\n")
                headers = CIMultiDict[str]()
                for name, _, value in (field.partition(": ") for field in fields):
                    headers.add(name, value)
                body = await reader.readexactly(int(headers.get("Content-Length", 0)))
                self.visits.append(Visit(line, headers, body))
                page = self.pages.get(line.split(" ")[1].partition("?")[0], answer(status=404))
                if callable(page):
                    await page(writer)
                    return
                writer.write(page)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()


class Names(AbstractResolver):
    """What names lead to: for each lookup of a name its next addresses, in the end the last."""

    def __init__(self, **names: list[list[str]]) -> None:
        self._names = {name.replace("_", "."): list(found) for name, found in names.items()}
        self.lookups: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.lookups.append(host)
        answers = self._names.get(host.rstrip("."))
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(hostname=host, host=to, port=port, family=family, proto=0, flags=0)
            for to in found
        ]

    async def close(self) -> None:
        pass
