"""Logging in to a service: one at a time, the value kept in memory alone."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import urlencode

from ownware_gateway.outbound import NotReached, Outbound, Request
from ownware_gateway.services.config import FilledLogin
from ownware_gateway.services.request import Borne
from ownware_gateway.tools import ToolFailed

#: How much of a log-in's answer is read.
ANSWER_BYTES_MAX: Final = 256 * 1024

#: The longest value that is taken.
VALUE_CHARS_MAX: Final = 8_000

#: After a log-in that failed, calls fail with the same words for so long.
FAILED_REST_S: Final = 5.0

#: A 403 may be about the operation and not the log-in: for one there is a new log-in so often.
FORBIDDEN_EVERY_S: Final = 60.0

Exchange = Callable[[Request], Awaitable[tuple[int, Mapping[str, str], list[str], bytes]]]


class LoginState:
    """The value that calls of one service bear."""

    def __init__(self, login: FilledLogin, url: str, hide: Callable[[str], None]) -> None:
        """`url` is where the log-in is; `hide` is told each value, which nobody must see."""
        self._login = login
        self.url = url
        self._hide = hide
        self._lock = asyncio.Lock()
        self._borne: Borne | None = None
        self._since_s = 0.0
        self._failed: tuple[float, str] | None = None

    async def value(self, outbound: Outbound) -> Borne:
        """Return the value, logging in if there is none yet. Raises ToolFailed."""
        async with self._lock:
            return self._borne or await self._log_in(outbound)

    async def renew(self, refused: Borne, status: int, outbound: Outbound) -> Borne | None:
        """Return another value than one that was refused, or None. Raises ToolFailed."""
        async with self._lock:
            if self._borne is not None and self._borne != refused:
                return self._borne  # Another call was refused before.
            age_s = asyncio.get_running_loop().time() - self._since_s
            if status == 403 and age_s < FORBIDDEN_EVERY_S:
                return None
            self._borne = None
            return await self._log_in(outbound)

    async def _log_in(self, outbound: Outbound) -> Borne:
        now_s = asyncio.get_running_loop().time()
        if self._failed is not None and now_s - self._failed[0] < FAILED_REST_S:
            raise ToolFailed(self._failed[1])
        try:
            value = await self._ask(outbound)
        except ToolFailed as error:
            self._failed = (now_s, str(error))
            raise
        self._failed, self._since_s = None, now_s
        self._hide(value)
        given = self._login.given
        self._borne = Borne(given.header, given.cookie, given.prefix + value)
        return self._borne

    async def _ask(self, outbound: Outbound) -> str:
        headers, body = self._body()
        request = Request(
            self.url, self._login.settings.method, headers=headers, body=body, once=True
        )
        try:
            async with outbound.open(request) as response:
                data, _ = await outbound.read(response)
                if not 200 <= response.status < 300:
                    # What the answer says may quote what was sent.
                    raise ToolFailed(f"The log-in was refused with HTTP {response.status}.")
                cookies = response.headers.getall("Set-Cookie", [])
                value = self._taken(data, cookies, response.headers)
        except NotReached as error:
            raise ToolFailed(f"The log-in failed: {error}") from None
        if not value or len(value) > VALUE_CHARS_MAX or not value.isprintable():
            take = self._login.settings.take
            raise ToolFailed(
                f"The log-in's answer has no value in its {take.from_} at "
                f"{take.path or take.name!r}."
            )
        return value

    def _body(self) -> tuple[dict[str, str], bytes | None]:
        headers = {"Accept": "application/json", **self._login.headers}
        body = self._login.body
        if body is None:
            return headers, None
        kind = next((text for name, text in headers.items() if name.lower() == "content-type"), "")
        if kind.partition(";")[0].strip() == "application/x-www-form-urlencoded":
            return headers, urlencode(body, doseq=True).encode()
        if not kind:
            headers["Content-Type"] = "application/json"
        return headers, json.dumps(body).encode()

    def _taken(self, data: bytes, cookies: list[str], headers: Mapping[str, str]) -> str:
        take = self._login.settings.take
        match take.from_:
            case "json":
                return _at(data, take.path)
            case "header":
                return headers.get(take.name, "").strip()
            case "cookie":
                return _cookie(cookies, take.name)


def _at(data: bytes, path: str) -> str:
    """Return the text or number at a path of field names and indices with points between."""
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    for part in path.removeprefix("$.").split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part)
        else:
            return ""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _cookie(lines: list[str], name: str) -> str:
    for line in lines:
        try:
            found = SimpleCookie(line).get(name)
        except CookieError:
            continue
        if found is not None:
            return found.coded_value
    return ""
