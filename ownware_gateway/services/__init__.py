"""Services with an OpenAPI description, whose operations agents may call: the contract."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from ownware_gateway.profile import Profile
from ownware_gateway.profile.services import Service
from ownware_gateway.tools import Tool

#: `stopped` has not been asked for yet; `failed` is tried again when it is wanted after a pause.
State = Literal["stopped", "loading", "ready", "failed"]

#: Who said that there is a service: a file of the gateway, or a profile.
Source = Literal["config", "profile"]


class OfferedOperation(NamedTuple):
    """An operation as agents are given it: the name they call it by, and what it is in HTTP."""

    name: str
    method: str
    path: str
    description: str
    reads_only: bool


class ServiceStatus(NamedTuple):
    """How a service is. `left_out` says which of its operations cannot be offered, and why."""

    id: str
    source: Source
    settings: Service
    state: State
    profile_id: str | None = None
    error: str | None = None
    url: str | None = None
    tools: Sequence[OfferedOperation] = ()
    left_out: Sequence[str] = ()


class Services(Protocol):
    """Keeps what services offer for those who use them."""

    async def connect(self, profile: Profile) -> None:
        """Have ready what a profile's agent uses; return once each is, or has failed for now."""
        ...

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tools that the services of a profile have now, by name."""
        ...

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return those of a profile's services that cannot be used now, with a sentence each."""
        ...

    def statuses(self) -> Sequence[ServiceStatus]:
        """Return every service that is known: those of the gateway, and of profiles once used."""
        ...
