"""What MCP servers and services have in common: a keeper for each, and profiles that use some.

A name belongs to a profile, or, with None in its place, to the gateway.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from ownware_gateway.tools import Tool

#: The profile that something belongs to, None for what is the gateway's own, and its name.
Key = tuple[str | None, str]


class Keeper(Protocol):
    """Keeps one server or service ready for those who use it."""

    def use(self) -> None:
        """Have it made ready, if it is not."""
        ...

    async def settled(self) -> None:
        """Return once it is ready, or cannot be for now."""
        ...

    def tools(self) -> Mapping[str, Tool]:
        """Return the tools that it has now, by name."""
        ...

    def unavailable(self) -> str | None:
        """Return why it cannot be used now, in a sentence; None when it can."""
        ...


async def ready(keepers: Iterable[Keeper]) -> None:
    """Have all of them made ready at the same time; return once each is, or cannot be for now."""
    wanted = list(keepers)
    for keeper in wanted:
        keeper.use()
    for keeper in wanted:
        await keeper.settled()


def tools_of(keepers: Mapping[Key, Keeper], wanted: Iterable[Key]) -> Mapping[str, Tool]:
    """Return the tools that those which are wanted have now, by name."""
    found: dict[str, Tool] = {}
    for key in wanted:
        if (keeper := keepers.get(key)) is not None:
            found |= keeper.tools()
    return found


def missing_of(keepers: Mapping[Key, Keeper], wanted: Iterable[Key]) -> Mapping[str, str]:
    """Return those which are wanted and cannot be used now, by name, with a sentence each."""
    found: dict[str, str] = {}
    for key in wanted:
        keeper = keepers.get(key)
        if keeper is not None and (why := keeper.unavailable()) is not None:
            found[key[1]] = why
    return found
