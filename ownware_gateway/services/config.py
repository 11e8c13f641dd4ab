"""What is configured: the files that name the gateway's services, and what a call needs of one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import quote, quote_plus

from pydantic import BaseModel, ConfigDict, Field

from ownware_gateway.masking import SECRET_NAME
from ownware_gateway.profile.gateway import Files, Form
from ownware_gateway.profile.servers import VARIABLE, ServerName
from ownware_gateway.profile.services import Given, Injected, Login, Service

FILE_NAME: Final = "services.json"

#: Headers that hold no secret: to hide `application/json` would garble all text.
_PUBLIC_HEADERS: Final = frozenset({"accept", "accept-language", "content-type", "user-agent"})

Lookup = Callable[[str], str | None]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)

    services: Annotated[dict[ServerName, Service], Field(default_factory=dict, max_length=64)]

    @property
    def named(self) -> Mapping[str, Service]:
        """The services by name."""
        return self.services


class ServiceFiles(Files[Service]):
    """The gateway's services, as the files say now."""

    def __init__(self, optional: Path, required: Path | None = None) -> None:
        """Read them; raise BootError when one is wrong, or the required one is not there."""
        super().__init__(Form("service configuration", "services", _File), optional, required)


class FilledLogin(NamedTuple):
    """A log-in, variables replaced by their values."""

    settings: Login
    url: str
    headers: Mapping[str, str]
    body: Any

    @property
    def given(self) -> Given:
        """How calls bear what it gives."""
        return self.settings.as_


class Filled(NamedTuple):
    """A service's settings, variables replaced by their values."""

    spec: str
    url: str
    headers: Mapping[str, str]
    inject: tuple[tuple[Injected, str | bool | int | float], ...]
    login: FilledLogin | None


def _texts(value: Any) -> list[str]:
    """Return all text in a JSON value, field names left out."""
    match value:
        case str():
            return [value]
        case dict():
            return [text for item in value.values() for text in _texts(item)]
        case list():
            return [text for item in value for text in _texts(item)]
        case _:
            return []


def variables(settings: Service) -> list[str]:
    """Return the names of the variables that a service's settings want, in their order."""
    login = settings.auth
    texts = [
        settings.spec,
        settings.url or "",
        *settings.headers.values(),
        *(item.value for item in settings.inject if isinstance(item.value, str)),
        *(_texts([login.url, login.path, login.headers, login.body]) if login else ()),
    ]
    return list(dict.fromkeys(name for text in texts for name in VARIABLE.findall(text)))


def fill(settings: Service, lookup: Lookup) -> Filled:
    """Return the settings with their variables replaced; one that there is not becomes empty."""

    def filled(value: Any) -> Any:
        match value:
            case str():
                return VARIABLE.sub(lambda found: lookup(found[1]) or "", value)
            case dict():
                return {name: filled(item) for name, item in value.items()}
            case list():
                return [filled(item) for item in value]
            case _:
                return value

    login = settings.auth
    return Filled(
        filled(settings.spec),
        filled(settings.url or ""),
        filled(settings.headers),
        tuple((item, filled(item.value)) for item in settings.inject),
        None
        if login is None
        else FilledLogin(
            login, filled(login.url or login.path), filled(login.headers), filled(login.body)
        ),
    )


def secrets(settings: Service, ready: Filled, lookup: Lookup) -> set[str]:
    """Return the values of a service that must never be seen, in each way they may be written.

    Every injected value and every header that may hold one, in its words too (`Bearer` and what
    follows); of a log-in's body what is named like a secret or comes from a variable; and the
    variables themselves, those of an address only when they are named like a secret.
    """
    login = settings.auth
    headers = {**ready.headers, **(ready.login.headers if ready.login else {})}
    texts = [text for name, text in headers.items() if name.lower() not in _PUBLIC_HEADERS]
    values = {word for text in texts for word in (text, *text.split())}
    values |= {value for _, value in ready.inject if isinstance(value, str)}
    named = [
        *settings.headers.values(),
        *(item.value for item in settings.inject if isinstance(item.value, str)),
    ]
    if login is not None and ready.login is not None:
        values |= _secret_texts(login.body, ready.login.body)
        named += _texts([login.headers, login.body])
    bearing = {name for text in named for name in VARIABLE.findall(text)}
    bearing |= {name for name in variables(settings) if SECRET_NAME.match(name)}
    values |= {lookup(name) or "" for name in bearing}
    return spellings(values - {"Bearer", "Basic"})


def _secret_texts(written: Any, filled: Any, *, secret: bool = False) -> set[str]:
    """Return the texts of a body that are named like a secret, or were written with a variable."""
    match written:
        case str():
            return {filled} if secret or VARIABLE.search(written) else set()
        case dict():
            return {
                text
                for name, item in written.items()
                for text in _secret_texts(
                    item, filled[name], secret=secret or bool(SECRET_NAME.match(name))
                )
            }
        case list():
            return {
                text
                for one, other in zip(written, filled, strict=True)
                for text in _secret_texts(one, other, secret=secret)
            }
        case _:
            return set()


def spellings(values: set[str]) -> set[str]:
    """Return the values as they are, and as they stand in an address or in JSON."""
    forms = (str, quote, _whole, quote_plus, _in_json)
    return {form(value) for value in values if value for form in forms}


def _whole(value: str) -> str:
    return quote(value, safe="")


def _in_json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)[1:-1]
