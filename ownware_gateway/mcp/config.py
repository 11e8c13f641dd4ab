"""What is configured: the files that name the gateway's servers, and what a start needs of one.

A file has the form that many programs share: `{"mcpServers": {"name": {"command": …}}}`. Other
fields at its top are other programs'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from ownware_gateway.masking import SECRET_NAME
from ownware_gateway.profile.gateway import Files, Form
from ownware_gateway.profile.servers import VARIABLE, McpServer, ServerName

FILE_NAME: Final = "mcp.json"

#: Headers that hold no secret: to hide `application/json` would garble all text, and keep every
#: tool from being given it.
_PUBLIC_HEADERS: Final = frozenset({"accept", "accept-language", "content-type", "user-agent"})


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", defer_build=True)

    servers: Annotated[
        dict[ServerName, McpServer], Field(alias="mcpServers", default_factory=dict, max_length=64)
    ]

    @property
    def named(self) -> Mapping[str, McpServer]:
        """The servers by name."""
        return self.servers


class ServerFiles(Files[McpServer]):
    """The gateway's servers, as the files say now."""

    def __init__(self, optional: Path, required: Path | None = None) -> None:
        """Read them; raise BootError when one is wrong, or the required one is not there."""
        super().__init__(Form("MCP configuration", "mcpServers", _File), optional, required)


@dataclass(frozen=True, slots=True)
class Launch:
    """What a server is started with: its settings, variables replaced by their values."""

    settings: McpServer
    args: Sequence[str] = field(default=(), repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    url: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def variables(settings: McpServer) -> list[str]:
    """Return the names of the variables that a server's settings want, in their order."""
    texts = [
        *settings.args,
        *settings.env.values(),
        settings.url or "",
        *settings.headers.values(),
    ]
    return list(dict.fromkeys(name for text in texts for name in VARIABLE.findall(text)))


def launch(settings: McpServer, lookup: Callable[[str], str | None]) -> Launch:
    """Return what a server is started with; a variable that there is not becomes empty."""

    def filled(text: str) -> str:
        return VARIABLE.sub(lambda found: lookup(found[1]) or "", text)

    return Launch(
        settings,
        [filled(text) for text in settings.args],
        {name: filled(text) for name, text in settings.env.items()},
        filled(settings.url or ""),
        {name: filled(text) for name, text in settings.headers.items()},
    )


def secrets(ready: Launch, lookup: Callable[[str], str | None]) -> set[str]:
    """Return the values of a start that must never be seen.

    Every header that may hold one, in its words too (`Bearer` and what follows); of the rest what
    is named like a secret, where it goes or where it comes from: `HOME`, say, is none.
    """
    settings = ready.settings
    headers = [text for name, text in ready.headers.items() if name.lower() not in _PUBLIC_HEADERS]
    values = {word for text in headers for word in (text, *text.split())}
    values |= {ready.env[name] for name in settings.env if SECRET_NAME.match(name)}
    values |= {lookup(name) or "" for name in variables(settings) if SECRET_NAME.match(name)}
    return values - {"", "Bearer", "Basic"}
