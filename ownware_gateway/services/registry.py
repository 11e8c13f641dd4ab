"""All services of a gateway: which there are, and who uses which.

What knows OpenAPI is imported when one is first used.
"""

import asyncio
import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ownware_gateway.errors import BootError
from ownware_gateway.masking import Masker
from ownware_gateway.profile import Profile
from ownware_gateway.profile.gateway import used
from ownware_gateway.profile.services import Service, shown_url
from ownware_gateway.services import ServiceStatus
from ownware_gateway.services.config import ServiceFiles
from ownware_gateway.tools import Tool
from ownware_gateway.tools.keepers import Key, missing_of, ready, tools_of

if TYPE_CHECKING:
    from aiohttp.abc import AbstractResolver

    from ownware_gateway.services.keeper import Keeper

#: The module that brings all others that know OpenAPI.
_KEEPER: Final = "ownware_gateway.services.keeper"


class Registry:
    """Keeps the services of the gateway and of profiles; see `ownware_gateway.services.Services`.

    `taken` returns the names that the gateway's MCP servers have.
    """

    def __init__(
        self,
        files: ServiceFiles,
        lookup: Callable[[str], str | None],
        masker: Masker,
        taken: Callable[[], Collection[str]] = tuple,
        resolver: "AbstractResolver | None" = None,
    ) -> None:
        """Raise BootError when an MCP server of the gateway has the name of a service."""
        self._files = files
        self._lookup = lookup
        self._masker = masker
        self._taken = taken
        self._resolver = resolver
        self._keepers: dict[Key, Keeper] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        if both := self._clashing():
            raise BootError(f"{_clash(min(both))} Rename one of them.")

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def names(self) -> list[str]:
        """Return the names of the gateway's services, used or not."""
        return list(self._files.refresh())

    # -- for runs

    async def connect(self, profile: Profile) -> None:
        """Have ready what a profile's agent uses; return once each is, or has failed for now."""
        self._files.refresh()
        wanted = dict(self._wanted(profile))
        self._forget_others(profile, wanted)
        if not wanted:
            return
        if _KEEPER not in sys.modules:
            # It takes a while, in which others go on.
            await asyncio.to_thread(importlib.import_module, _KEEPER)
        await ready([self._keeper(key, settings, profile) for key, settings in wanted.items()])

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools that the services of a profile have now, by name."""
        return tools_of(self._keepers, dict(self._wanted(profile)))

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return those of a profile's services that cannot be used now, with a sentence each."""
        return missing_of(self._keepers, dict(self._wanted(profile)))

    def _wanted(self, profile: Profile) -> Iterator[tuple[Key, Service]]:
        """Yield what a profile's agent uses: its own, and those of the gateway that it may."""
        own = {name: item for name, item in profile.tools.services.items() if item.enabled}
        for is_own, name, settings in used(profile.tools, own, self._gateway()):
            yield (profile.name if is_own else None, name), settings

    def _gateway(self) -> Mapping[str, Service]:
        """Return the gateway's services that may be used."""
        known = self._files.known
        if not known:
            return known
        both = self._clashing()
        return {name: item for name, item in known.items() if item.enabled and name not in both}

    def _clashing(self) -> set[str]:
        """Return the names of services that are those of MCP servers too."""
        return {*self._files.known} & {*self._taken()} if self._files.known else set()

    def _keeper(self, key: Key, settings: Service, profile: Profile) -> "Keeper":
        from ownware_gateway.services.keeper import Given, Keeper

        scope, name = key
        folder = profile.folder if scope is not None else self._files.folder(name)
        keeper = self._keepers.get(key)
        if keeper is None or keeper.settings != settings or keeper.folder != folder:
            given = Given(self._lookup, self._masker, self._tasks, self._resolver)
            keeper = self._keepers[key] = Keeper(name, settings, folder, given)
        return keeper

    def _forget_others(self, profile: Profile, wanted: Mapping[Key, Service]) -> None:
        """Forget what the profile or the gateway has no more; calls under way go on."""
        gateway = self._gateway()
        self._keepers = {
            (scope, name): keeper
            for (scope, name), keeper in self._keepers.items()
            if (scope is None and name in gateway)
            or (scope is not None and (scope != profile.name or (scope, name) in wanted))
        }

    # -- for callers

    def statuses(self) -> Sequence[ServiceStatus]:
        """Return every service that is known: those of the gateway, and of profiles once used."""
        files = self._files.refresh()
        both = self._clashing()
        found = [self._status((None, name), item, both) for name, item in files.items()]
        found += [
            self._status(key, keeper.settings, set())
            for key, keeper in self._keepers.items()
            if key[0] is not None
        ]
        return found

    def _status(self, key: Key, settings: Service, both: Collection[str]) -> ServiceStatus:
        profile_id, name = key
        status = ServiceStatus(
            id=name if profile_id is None else f"{profile_id}:{name}",
            source="config" if profile_id is None else "profile",
            settings=settings,
            state="stopped",
            profile_id=profile_id,
            url=None if settings.url is None else shown_url(settings.url),
        )
        if name in both:
            return status._replace(state="failed", error=_clash(name))
        keeper = self._keepers.get(key)
        if keeper is None or keeper.settings != settings:
            return status
        return status._replace(
            state=keeper.state,
            error=keeper.error,
            url=keeper.url or status.url,
            tools=keeper.offered,
            left_out=keeper.left_out,
        )


def _clash(name: str) -> str:
    return f"An MCP server and a service of the gateway are both named {name!r}."
