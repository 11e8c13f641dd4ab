"""MCP servers, programs whose tools agents may use: the contract of what keeps them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

from ownware_gateway.profile import Profile
from ownware_gateway.profile.servers import McpServer
from ownware_gateway.tools import Output, Tool

#: What is missing when the SDK is, and what to do.
SDK_MISSING: Final = (
    "MCP servers need the MCP SDK, which is not installed; install it: "
    ".venv/bin/pip install mcp in a clone, else pip install 'ownware-gateway[mcp]'."
)

#: `stopped` has not been asked for yet; `waiting` is between two attempts; `failed` has given up
#: until it is asked for again.
State = Literal["stopped", "starting", "ready", "waiting", "failed"]

#: Who said that there is a server: the file, the file with `enabled: false`, a caller, a profile.
Source = Literal["config", "catalog", "api", "profile"]


class OfferedTool(NamedTuple):
    """A tool as its server offers it, under the name that agents call it by."""

    name: str
    wire_name: str
    description: str
    input_schema: dict[str, Any]
    reads_only: bool | None = None
    destructive: bool | None = None
    idempotent: bool | None = None


class ServerStatus(NamedTuple):
    """How a server is. `left_out` says which of its tools cannot be offered, and why.

    `stderr` are the last lines that it wrote there, secrets masked; `missing_env` the variables
    that its settings name and the gateway does not have; times are milliseconds since 1970.
    """

    id: str
    name: str
    source: Source
    settings: McpServer
    state: State
    profile_id: str | None = None
    error: str | None = None
    tools: Sequence[OfferedTool] = ()
    left_out: Sequence[str] = ()
    stderr: Sequence[str] = ()
    required_env: Sequence[str] = ()
    missing_env: Sequence[str] = ()
    restarts: int = 0
    ready_since: int | None = None
    pid: int | None = None
    version: str | None = None


class Called(NamedTuple):
    """What a direct call gave back: an output, or the reason why there is none."""

    output: Output | None = None
    error: str | None = None


class Servers(Protocol):
    """Keeps MCP servers up for those who use them."""

    async def connect(self, profile: Profile) -> None:
        """Start what a profile's agent uses; return once each is up, or has failed for now."""
        ...

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools that the servers of a profile have now, by name."""
        ...

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return those of a profile's servers that cannot be used now, with a sentence each."""
        ...

    def statuses(self) -> Sequence[ServerStatus]:
        """Return every server that is known: those of the gateway, and of profiles once used."""
        ...

    async def add(self, name: str, settings: McpServer) -> ServerStatus:
        """Start one more for all, until the gateway stops. Raises GatewayError `server_exists`."""
        ...

    async def replace(self, name: str, settings: McpServer) -> ServerStatus:
        """Change one that was added. Raises GatewayError `not_found`, `server_exists`."""
        ...

    async def remove(self, name: str) -> None:
        """Stop and forget one that was added. Raises GatewayError `not_found`, `server_exists`."""
        ...

    async def enable(self, name: str) -> ServerStatus:
        """Start one of the catalogue, until the gateway stops. Raises GatewayError `not_found`."""
        ...

    async def disable(self, name: str) -> None:
        """Stop one that was enabled. Raises GatewayError `not_found`."""
        ...

    async def call(self, name: str, tool: str, arguments: dict[str, Any]) -> Called:
        """Call a tool of one of the gateway's servers. Raises GatewayError `not_found`."""
        ...
