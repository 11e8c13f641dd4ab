"""An MCP server as a profile, or a file of the gateway, describes it."""

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ownware_gateway.masking import MASK
from ownware_gateway.profile.fields import SERVER_NAME, DurationMs, Strict

#: Stands in a server's settings for a variable of the gateway's own environment.
VARIABLE: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")

Transport = Literal["stdio", "http", "sse"]

#: With the separator in it, or an underscore at its end, `server__tool` could be read in two ways.
ServerName = Annotated[str, Field(max_length=32, pattern=SERVER_NAME)]


class McpServer(Strict):
    """An MCP server: a program to start (`command`), or an address to call (`url`).

    `${env:NAME}` in `args`, `env`, `url` and `headers` stands for a variable of the gateway's own
    environment. What a server says about its tools counts for permissions only when `trusted`.
    """

    transport: Transport = "stdio"
    command: str | None = Field(default=None, min_length=1)
    args: list[str] = Field(default_factory=list, max_length=256)
    env: dict[str, str] = Field(default_factory=dict)
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+")
    headers: dict[str, str] = Field(default_factory=dict)
    description: str = ""
    enabled: bool = True
    trusted: bool = False
    start_timeout: DurationMs = 30_000
    call_timeout: DurationMs = 120_000

    @model_validator(mode="before")
    @classmethod
    def _words_of_others(cls, data: Any) -> Any:
        """Take the names that files of other programs have for the same thing."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "type" in data and "transport" not in data:
            data["transport"] = data.pop("type")
        if data.get("transport") in ("streamable-http", "streamableHttp", "streamable_http"):
            data["transport"] = "http"
        if "transport" not in data and "url" in data:
            data["transport"] = "http"
        return data

    @model_validator(mode="after")
    def _one_way_to_reach_it(self) -> Self:
        # Its own kind of error, because that of a ValueError quotes all fields, secrets included.
        if self.transport == "stdio" and (self.command is None or self.url or self.headers):
            raise PydanticCustomError(
                "mcp_server", "a server of transport stdio has a 'command', no 'url' or 'headers'"
            )
        if self.transport != "stdio" and (self.url is None or self.command or self.env):
            raise PydanticCustomError(
                "mcp_server", "a server of transport http or sse has a 'url', no 'command' or 'env'"
            )
        return self

    def shown(self) -> dict[str, Any]:
        """Return the settings as people may see them, without values that may be secret."""
        fields = self.model_dump(mode="json")
        for name in ("env", "headers"):
            fields[name] = {
                key: value if VARIABLE.fullmatch(value) else MASK
                for key, value in fields[name].items()
            }
        if self.url is not None:
            # A login or a query may hold one.
            fields["url"] = re.sub(r"(?<=://)[^/@]*@", "", self.url.partition("?")[0])
        return fields
