"""A server of a test: on a free port of loopback, for as long as its context lasts."""

from typing import Self

from aiohttp import web


class Loopback:
    """Serves an application; `url` is where, once the context is entered."""

    def __init__(self, app: web.Application) -> None:
        self.url = ""
        # Cancelling the handler is how a server here learns that its client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()
