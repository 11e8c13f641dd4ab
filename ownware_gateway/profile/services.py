"""A service with an OpenAPI description, as a profile or a file of the gateway describes it."""

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from ownware_gateway.masking import MASK
from ownware_gateway.profile.fields import DurationMs, Strict
from ownware_gateway.profile.servers import VARIABLE

#: Most values that are put into each call, headers, and globs of operations.
INJECTED_MAX: Final = 64
GLOBS_MAX: Final = 256

#: A name or a value with these in it would end a header, and begin another.
_HEADER_NAME: Final = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$"

#: The address of a host, or a variable that holds one.
_ADDRESS: Final = r"^(https?://[^\s/]+|\$\{env:)"

_Headers = Annotated[
    dict[Annotated[str, Field(pattern=_HEADER_NAME)], str], Field(max_length=INJECTED_MAX)
]
_Globs = Annotated[list[str], Field(max_length=GLOBS_MAX)]


class Injected(Strict):
    """A value that is put into each call; the model neither sees it nor can say another."""

    name: str = Field(min_length=1, max_length=256)
    in_: Literal["path", "query", "header", "cookie", "body"] = Field(alias="in")
    value: str | bool | int | float

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.in_ in ("header", "cookie") and not re.match(_HEADER_NAME, self.name):
            raise PydanticCustomError("service", "no {place} has such a name", {"place": self.in_})
        return self


class Take(Strict):
    """Where a log-in's answer has the value: at a `path` of its JSON, or under a `name`."""

    from_: Literal["json", "cookie", "header"] = Field(default="json", alias="from")
    path: str = Field(default="", max_length=256)
    name: str = Field(default="", max_length=256)

    @model_validator(mode="after")
    def _one(self) -> Self:
        wanted, other = (self.path, self.name) if self.from_ == "json" else (self.name, self.path)
        if not wanted or other:
            raise PydanticCustomError(
                "service", "'json' has a 'path', like 'data.token'; 'cookie' and 'header' a 'name'"
            )
        return self


class Given(Strict):
    """How calls bear the value: in a header, behind a prefix, or in a cookie."""

    header: str = Field(default="", max_length=256, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]*$")
    cookie: str = Field(default="", max_length=256, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]*$")
    prefix: str = Field(default="", max_length=64)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.header) == bool(self.cookie):
            raise PydanticCustomError("service", "exactly one of 'header' and 'cookie'")
        return self


class Login(Strict):
    """A request that gives a value to call with; made again when that is refused."""

    method: Literal["POST", "GET", "PUT"] = "POST"
    url: str | None = Field(default=None, pattern=_ADDRESS)
    path: str | None = Field(default=None, pattern=r"^/")
    headers: _Headers = Field(default_factory=dict)
    body: dict[str, JsonValue] | None = None
    take: Take
    as_: Given = Field(
        default_factory=lambda: Given(header="Authorization", prefix="Bearer "), alias="as"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.url is None) == (self.path is None):
            raise PydanticCustomError("service", "exactly one of 'url' and 'path'")
        return self


class Service(Strict):
    """A service: where its OpenAPI document is, where it answers, and what each call bears.

    `${env:NAME}` in `spec`, `url`, `headers`, `inject` and `auth` stands for a variable of the
    gateway's own environment. That an operation only reads counts only when `trusted`.
    """

    spec: str = Field(min_length=1, max_length=4096)
    url: str | None = Field(default=None, pattern=_ADDRESS)
    headers: _Headers = Field(default_factory=dict)
    inject: list[Injected] = Field(default_factory=list, max_length=INJECTED_MAX)
    auth: Login | None = None
    include: _Globs = Field(default_factory=list)
    exclude: _Globs = Field(default_factory=list)
    description: str = ""
    enabled: bool = True
    trusted: bool = False
    allow_private: bool = False
    timeout: DurationMs = 30_000

    @property
    def holds_secrets(self) -> bool:
        """Whether its calls bear something that is for this service alone."""
        return bool(self.headers or self.inject or self.auth)

    def shown(self) -> dict[str, Any]:
        """Return the settings as people may see them, without values that may be secret."""
        fields = self.model_dump(mode="json")
        fields["headers"] = {name: _shown(value) for name, value in self.headers.items()}
        fields["inject"] = [
            {"name": item.name, "in": item.in_, "value": _shown(item.value)} for item in self.inject
        ]
        fields["spec"] = shown_url(self.spec)
        fields["url"] = None if self.url is None else shown_url(self.url)
        if self.auth is not None:
            fields["auth"]["headers"] = {
                name: _shown(value) for name, value in self.auth.headers.items()
            }
            fields["auth"]["body"] = None if self.auth.body is None else MASK
            fields["auth"]["url"] = None if self.auth.url is None else shown_url(self.auth.url)
            fields["auth"]["path"] = self.auth.path and self.auth.path.partition("?")[0]
        return fields


def _shown(value: object) -> str:
    return value if isinstance(value, str) and VARIABLE.fullmatch(value) else MASK


def shown_url(url: str) -> str:
    """Return an address without its login and its query, which may hold a secret."""
    return re.sub(r"(?<=://)[^/@]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])
