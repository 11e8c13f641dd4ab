"""All MCP servers of a gateway: which there are, who uses which, and their end."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ownware_gateway.errors import GatewayError
from ownware_gateway.mcp import Called, OfferedTool, ServerStatus, Source
from ownware_gateway.mcp.config import ServerFiles, variables
from ownware_gateway.mcp.keeper import Given, Keeper
from ownware_gateway.profile import Profile
from ownware_gateway.profile.gateway import used
from ownware_gateway.profile.servers import McpServer
from ownware_gateway.tools import OUTPUT_LIMIT_BYTES, Context, Output, Tool, ToolFailed
from ownware_gateway.tools.keepers import Key, missing_of, ready, tools_of

#: Servers that callers may have added at a time.
ADDED_MAX: Final = 64

#: How long the last of them may take to end when the gateway leaves; the watchdog kills the rest.
CLOSE_S: Final = 10.0


class Supervisor:
    """Keeps the servers of the gateway and of profiles; see `ownware_gateway.mcp.Servers`."""

    def __init__(self, files: ServerFiles, given: Given) -> None:
        self._files = files
        self._given = given
        self._keepers: dict[Key, Keeper] = {}
        self._added: dict[str, McpServer] = {}
        self._enabled: set[str] = set()
        self._retiring: set[Keeper] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End every server."""
        for end in self._ends:
            end.cancel()
        keepers = {*self._keepers.values(), *self._retiring}
        await asyncio.gather(*(keeper.stop() for keeper in keepers))
        if left := self._ends | self._given.tasks:
            _, late = await asyncio.wait(left, timeout=CLOSE_S)
            for task in late:
                task.cancel()

    def names(self) -> list[str]:
        """Return the names of the gateway's servers, started or not."""
        return [*self._files.refresh(), *self._added]

    # -- for runs

    async def connect(self, profile: Profile) -> None:
        """Start what a profile's agent uses; return once each is up, or has failed for now."""
        self._files.refresh()
        wanted = dict(self._wanted(profile))
        self._retire_others(profile, wanted)
        await ready([self._keeper(key, settings) for key, settings in wanted.items()])

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools that the servers of a profile have now, by name."""
        return tools_of(self._keepers, dict(self._wanted(profile)))

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return those of a profile's servers that cannot be used now, with a sentence each."""
        return missing_of(self._keepers, dict(self._wanted(profile)))

    def _wanted(self, profile: Profile) -> Iterator[tuple[Key, McpServer]]:
        """Yield what a profile's agent uses: its own, and those of the gateway that it may."""
        own = {name: item for name, item in profile.tools.mcp.items() if item.enabled}
        gateway = {name: settings for name, (settings, _) in self._gateway().items()}
        for is_own, name, settings in used(profile.tools, own, gateway):
            yield (profile.name if is_own else None, name), settings

    def _gateway(self) -> dict[str, tuple[McpServer, Source]]:
        """Return the gateway's servers that may run: of the files, of the catalogue, added."""
        found: dict[str, tuple[McpServer, Source]] = {
            name: (settings, "config" if settings.enabled else "catalog")
            for name, settings in self._files.known.items()
            if settings.enabled or name in self._enabled
        }
        return found | {
            name: (settings, "api") for name, settings in self._added.items() if settings.enabled
        }

    def _keeper(self, key: Key, settings: McpServer) -> Keeper:
        keeper = self._keepers.get(key)
        if keeper is not None and keeper.settings != settings:
            self._retire(key)
            keeper = None
        if keeper is None:
            keeper = self._keepers[key] = Keeper(key[1], settings, self._given)
        return keeper

    def _retire_others(self, profile: Profile, wanted: Mapping[Key, McpServer]) -> None:
        """End what the profile or the gateway has no more."""
        gateway = self._gateway()
        for key in list(self._keepers):
            scope, name = key
            if (scope == profile.name and key not in wanted) or (
                scope is None and name not in gateway
            ):
                self._retire(key)

    def _retire(self, key: Key) -> None:
        keeper = self._keepers.pop(key)
        self._retiring.add(keeper)
        task = asyncio.get_running_loop().create_task(self._end(keeper))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end(self, keeper: Keeper) -> None:
        await keeper.retire()
        self._retiring.discard(keeper)

    # -- for callers

    def statuses(self) -> Sequence[ServerStatus]:
        """Return every server that is known: those of the gateway, and of profiles once used."""
        found = [
            self._status((None, name), settings, "config" if settings.enabled else "catalog")
            for name, settings in self._files.refresh().items()
        ]
        found += [self._status((None, name), item, "api") for name, item in self._added.items()]
        found += [
            self._status(key, keeper.settings, "profile")
            for key, keeper in self._keepers.items()
            if key[0] is not None
        ]
        return found

    def _status(self, key: Key, settings: McpServer, source: Source) -> ServerStatus:
        profile_id, name = key
        names = variables(settings)
        keeper = self._keepers.get(key) or Keeper(name, settings, self._given)
        return ServerStatus(
            id=name if profile_id is None else f"{profile_id}:{name}",
            name=name,
            source=source,
            settings=settings,
            state=keeper.state,
            profile_id=profile_id,
            error=keeper.error,
            tools=keeper.offered,
            left_out=keeper.left_out,
            stderr=keeper.stderr(),
            required_env=names,
            missing_env=[item for item in names if self._given.lookup(item) is None],
            restarts=keeper.restarts,
            ready_since=keeper.ready_since,
            pid=keeper.pid,
            version=keeper.version,
        )

    async def add(self, name: str, settings: McpServer) -> ServerStatus:
        """Start one more for all, until the gateway stops. Raises GatewayError `server_exists`."""
        if name in self.names():
            raise GatewayError("server_exists", f"There is an MCP server {name!r} already.")
        if len(self._added) >= ADDED_MAX:
            raise GatewayError("overloaded", f"{ADDED_MAX} MCP servers were added; remove some.")
        self._added[name] = settings
        return await self._started(name, settings, "api")

    async def replace(self, name: str, settings: McpServer) -> ServerStatus:
        """Change one that was added. Raises GatewayError `not_found`, `server_exists`."""
        self._check_added(name)
        await self._stop(name)
        self._added[name] = settings
        return await self._started(name, settings, "api")

    async def remove(self, name: str) -> None:
        """Stop and forget one that was added. Raises GatewayError `not_found`, `server_exists`."""
        self._check_added(name)
        del self._added[name]
        await self._stop(name)

    def _check_added(self, name: str) -> None:
        if name in self._added:
            return
        if name in self._files.known:
            raise GatewayError(
                "server_exists",
                f"The MCP server {name!r} stands in a file of the gateway; change it there.",
            )
        raise GatewayError("not_found", f"No MCP server {name!r} was added.")

    async def enable(self, name: str) -> ServerStatus:
        """Start one of the catalogue, until the gateway stops. Raises GatewayError `not_found`."""
        catalogue = {
            name: settings for name, settings in self._files.known.items() if not settings.enabled
        }
        if name not in catalogue:
            known = ", ".join(sorted(catalogue)) or "none"
            raise GatewayError(
                "not_found", f"The catalogue has no MCP server {name!r}; there are: {known}."
            )
        self._enabled.add(name)
        return await self._started(name, catalogue[name], "catalog")

    async def disable(self, name: str) -> None:
        """Stop one that was enabled. Raises GatewayError `not_found`."""
        if name not in self._enabled:
            raise GatewayError("not_found", f"The MCP server {name!r} is not enabled.")
        self._enabled.discard(name)
        await self._stop(name)

    async def call(self, name: str, tool: str, arguments: dict[str, Any]) -> Called:
        """Call a tool of one of the gateway's servers. Raises GatewayError `not_found`."""
        if name not in self._gateway():
            known = ", ".join(sorted(self._gateway())) or "none"
            raise GatewayError("not_found", f"No MCP server {name!r} runs; there are: {known}.")
        keeper = self._keeper((None, name), self._gateway()[name][0])
        keeper.use()
        await keeper.settled()
        if (why := keeper.unavailable()) is not None:
            return Called(error=why)
        offered = _find(keeper.offered, tool)
        if offered is None:
            raise GatewayError("not_found", f"The MCP server {name!r} has no tool {tool!r}.")
        try:
            output = await keeper.call(offered.wire_name, Context(self._given.folder), arguments)
        except ToolFailed as error:
            return Called(error=self._given.masker.text(str(error)))
        mask, whole = self._given.masker.text, output.whole
        if whole is None:
            text = mask(output.text)
        else:
            # Masked before it is cut, and no more of it than may matter there.
            text = whole.told(mask(whole.text[: 2 * OUTPUT_LIMIT_BYTES]))
        return Called(Output(text, output.truncated, output.bytes_raw, output.is_error))

    async def _started(self, name: str, settings: McpServer, source: Source) -> ServerStatus:
        if settings.enabled or source == "catalog":
            keeper = self._keeper((None, name), settings)
            keeper.use()
            await keeper.settled()
        return self._status((None, name), settings, source)

    async def _stop(self, name: str) -> None:
        keeper = self._keepers.pop((None, name), None)
        if keeper is not None:
            await keeper.stop()


def _find(offered: Sequence[OfferedTool], name: str) -> OfferedTool | None:
    """Return a tool by its server's name for it, or by the one that agents use."""
    return next((item for item in offered if name in (item.wire_name, item.name)), None)
