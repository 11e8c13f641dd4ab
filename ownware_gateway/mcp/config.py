"""What is configured: the files that name the gateway's servers, and what a start needs of one.

A file has the form that many programs share: `{"mcpServers": {"name": {"command": …}}}`. Other
fields at its top are other programs'.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ownware_gateway.errors import BootError
from ownware_gateway.masking import SECRET_NAME
from ownware_gateway.profile.explain import explain
from ownware_gateway.profile.servers import VARIABLE, McpServer, ServerName

FILE_NAME: Final = "mcp.json"
FILE_BYTES_MAX: Final = 1_048_576

#: Headers that hold no secret: to hide `application/json` would garble all text, and keep every
#: tool from being given it.
_PUBLIC_HEADERS: Final = frozenset({"accept", "accept-language", "content-type", "user-agent"})

_log: Final = logging.getLogger(__name__)


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", defer_build=True)

    servers: Annotated[
        dict[ServerName, McpServer], Field(alias="mcpServers", default_factory=dict, max_length=64)
    ]


class ServerFiles:
    """The gateway's servers, as the files say now; a name in a later file beats an earlier one.

    A file that becomes wrong leaves what it said before; `problem` says what is wrong with it.
    """

    def __init__(self, optional: Path, required: Path | None = None) -> None:
        """Read them; raise BootError when one is wrong, or the required one is not there."""
        if required is not None and not required.is_file():
            raise BootError(f"There is no MCP configuration {required}.")
        self._files = [optional, *([required] if required is not None else [])]
        self._read: list[bytes] = []
        self._servers: dict[str, McpServer] = {}
        self.problem: str | None = None
        self._load()

    @property
    def known(self) -> Mapping[str, McpServer]:
        """The servers by name, as they were read last."""
        return self._servers

    def servers(self) -> Mapping[str, McpServer]:
        """Read the files if they have changed, and return the servers by name."""
        try:
            self._load()
        except BootError as error:
            if str(error) != self.problem:
                _log.warning("%s What it said before still holds.", error)
            self.problem = str(error)
        return self._servers

    def _load(self) -> None:
        read = [_read(path) for path in self._files]
        if read == self._read:
            return
        found: dict[str, McpServer] = {}
        for path, text in zip(self._files, read, strict=True):
            found |= _understand(path, text)
        self._read, self._servers, self.problem = read, found, None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as opened:
            return opened.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BootError(
            f"The MCP configuration {path} cannot be read: {error.strerror}."
        ) from error


def _understand(path: Path, text: bytes) -> Mapping[str, McpServer]:
    if not text.strip():
        return {}
    if len(text) > FILE_BYTES_MAX:
        raise BootError(f"The MCP configuration {path} is over {FILE_BYTES_MAX} bytes.")
    try:
        data = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BootError(f"The MCP configuration {path} is not JSON{where}.") from error
    if not isinstance(data, dict):
        raise BootError(f'The MCP configuration {path} must hold {{"mcpServers": {{…}}}}.')
    try:
        return _File.model_validate(data).servers
    except ValidationError as error:
        # `from None`: the cause quotes what was given, secrets included.
        message = f"The MCP configuration {path}: {explain(error, _File)}"
        raise BootError(message) from None


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
