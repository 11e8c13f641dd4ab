"""The request of a call, from what the model says and what is configured. Pure.

What the model says never leaves its place: a path keeps its segments, a query its names, a header
its line. What is configured is put in last and wins.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote, urlencode

from ownware_gateway.services.config import Filled
from ownware_gateway.services.spec import Body, Operation, Parameter
from ownware_gateway.tools import ToolFailed

#: What a segment of a path may hold beside letters and digits, where the document writes it.
_PATH_SAFE: Final = "/-._~!$&'()*+,;=:@%"

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_SEPARATORS: Final = {"spaceDelimited": "%20", "pipeDelimited": "%7C"}


class Built(NamedTuple):
    """A request: its method, path and query, headers and body."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes | None


class Borne(NamedTuple):
    """What a log-in gave, as calls bear it."""

    header: str = ""
    cookie: str = ""
    value: str = ""


def build(
    operation: Operation, arguments: Mapping[str, Any], filled: Filled, base: str, boundary: str
) -> Built:
    """Return the request of a call, all but what a log-in adds. `base` is the path it begins with.

    Raises ToolFailed for arguments that cannot be sent.
    """
    _check_names(operation, arguments)
    try:
        body, content_type = _body(operation, arguments, filled, boundary)
        path = _path(operation, arguments, filled)
        query = "&".join(_query(operation, arguments, filled))
        headers = _headers(operation, arguments, filled, content_type)
    except (ValueError, RecursionError) as error:
        # Half a character, a number that JSON has not.
        raise ToolFailed(f"The arguments of {operation.name} cannot be sent: {error}.") from None
    target = base.rstrip("/") + path + (f"?{query}" if query else "")
    return Built(operation.method, target, headers, body)


def bear(built: Built, borne: Borne) -> Built:
    """Return the request with what a log-in gave."""
    headers = _Headers(built.headers)
    if borne.header:
        headers.set(borne.header, borne.value)
    elif borne.cookie:
        headers.add_cookie(borne.cookie, borne.value)
    return built._replace(headers=headers.all())


def _check_names(operation: Operation, arguments: Mapping[str, Any]) -> None:
    known = operation.input_schema["properties"]
    if operation.body is not None and operation.body.is_open:
        return
    unknown = sorted(set(arguments) - set(known) - operation.hidden)
    if unknown:
        names = ", ".join(known) or "none"
        raise ToolFailed(
            f"The arguments of {operation.name} do not fit: it has no {unknown[0][:100]!r}; "
            f"there are: {names[:1000]}."
        )


def _given(
    operation: Operation, arguments: Mapping[str, Any], place: str
) -> Iterator[tuple[Parameter, Any]]:
    """Yield the parameters of a place that the model gives a value, as it is to be sent."""
    for parameter in operation.parameters:
        value = arguments.get(parameter.argument)
        if parameter.place == place and value is not None:
            yield parameter, _json(value) if parameter.as_json else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _text(value: Any) -> str:
    """Return a plain value as text."""
    return value if isinstance(value, str) else _json(value)


def _escaped(value: Any) -> str:
    return quote(_text(value), safe="")


# -- the path


def _path(operation: Operation, arguments: Mapping[str, Any], filled: Filled) -> str:
    values = {
        parameter.wire: _simple(value, explode=parameter.explode, escape=_escaped)
        for parameter, value in _given(operation, arguments, "path")
    }
    values |= {one.name: _escaped(value) for one, value in filled.inject if one.in_ == "path"}

    def value_of(found: re.Match[str]) -> str:
        value = values.get(found[1], "")
        if not value:
            raise ToolFailed(f"{operation.name} wants a value for {found[1][:100]!r}.")
        return value

    # Apart, so that a value that looks like a name of the template is none.
    parts = re.split(r"(\{[^{}]*\})", operation.path)
    path = "".join(
        re.sub(r"\{([^{}]*)\}", value_of, part)
        if part.startswith("{")
        else quote(part, safe=_PATH_SAFE)
        for part in parts
    )
    for segment in path.split("/"):
        # Some servers undo the escapes before they look for the segments, and some do it twice;
        # some leave out what follows a semicolon.
        if {".", ".."} & {*re.split(r"[/\\;]", unquote(unquote(segment)))}:
            raise ToolFailed(f"A value of {operation.name} would lead to another path.")
    return path


def _simple(value: Any, *, explode: bool, escape: Any) -> str:
    """Return a value in the style `simple`."""
    match value:
        case list():
            return ",".join(map(escape, value))
        case dict() if explode:
            return ",".join(f"{escape(name)}={escape(item)}" for name, item in value.items())
        case dict():
            return ",".join(escape(item) for pair in value.items() for item in pair)
        case _:
            return str(escape(value))


# -- the query


def _query(operation: Operation, arguments: Mapping[str, Any], filled: Filled) -> Iterator[str]:
    injected = {one.name: value for one, value in filled.inject if one.in_ == "query"}
    own = {quote(name, safe="").lower() for name in injected}
    for parameter, value in _given(operation, arguments, "query"):
        for pair in _pairs(parameter, value):
            # An object's own names could be those of what is injected.
            if pair.partition("=")[0].lower() not in own:
                yield pair
    for name, value in injected.items():
        yield f"{quote(name, safe='')}={_escaped(value)}"


def _pairs(parameter: Parameter, value: Any) -> Iterator[str]:
    name = quote(parameter.wire, safe="")
    match value:
        case list() if parameter.explode and parameter.style == "form":
            yield from (f"{name}={_escaped(item)}" for item in value)
        case list():
            separator = _SEPARATORS.get(parameter.style, ",")
            yield f"{name}={separator.join(map(_escaped, value))}"
        case dict() if parameter.style == "deepObject":
            yield from (
                f"{name}%5B{_escaped(key)}%5D={_escaped(item)}" for key, item in value.items()
            )
        case dict() if parameter.explode:
            yield from (f"{_escaped(key)}={_escaped(item)}" for key, item in value.items())
        case _:
            yield f"{name}={_simple(value, explode=False, escape=_escaped)}"


# -- the headers


class _Headers:
    """Headers of a request, one of each name however it is written."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._headers: dict[str, tuple[str, str]] = {}
        for name, value in (given or {}).items():
            self.set(name, value)

    def set(self, name: str, value: str) -> None:
        """Put a header in, in place of one of the same name. Raises ToolFailed."""
        if _CONTROL.search(value):
            # Not the value: it may be configured, and secret.
            raise ToolFailed(f"The header {name[:100]!r} would hold a line break.")
        self._headers[name.lower()] = (name, value)

    def add_cookie(self, name: str, value: str) -> None:
        """Put a cookie in, in place of one of the same name."""
        if re.search(r"[;\s]", value):
            raise ToolFailed(f"The cookie {name[:100]!r} would hold a space or a semicolon.")
        before = self._headers.get("cookie", ("", ""))[1].split("; ")
        kept = [pair for pair in before if pair and pair.partition("=")[0] != name]
        self.set("Cookie", "; ".join([*kept, f"{name}={value}"]))

    def configure(self, name: str, value: str) -> None:
        """Put a header in that is configured; of cookies, those that it names."""
        if name.lower() != "cookie":
            return self.set(name, value)
        for pair in filter(None, map(str.strip, value.split(";"))):
            cookie, _, text = pair.partition("=")
            self.add_cookie(cookie, text)
        return None

    def all(self) -> dict[str, str]:
        """Return them all."""
        return dict(self._headers.values())


def _headers(
    operation: Operation, arguments: Mapping[str, Any], filled: Filled, content_type: str | None
) -> dict[str, str]:
    headers = _Headers({"Accept": "application/json, text/*;q=0.9, */*;q=0.1"})
    for parameter, value in _given(operation, arguments, "header"):
        headers.set(parameter.wire, _simple(value, explode=parameter.explode, escape=_text))
    for parameter, value in _given(operation, arguments, "cookie"):
        # Escaped, for a semicolon would begin another.
        text = _simple(value, explode=parameter.explode, escape=_escaped)
        headers.add_cookie(quote(parameter.wire, safe=""), text)
    for name, text in filled.headers.items():
        headers.configure(name, text)
    for one, value in filled.inject:
        if one.in_ == "header":
            headers.set(one.name, _text(value))
        elif one.in_ == "cookie":
            headers.add_cookie(one.name, _text(value))
    if content_type is not None:
        headers.set("Content-Type", content_type)
    return headers.all()


# -- the body


def _body(
    operation: Operation, arguments: Mapping[str, Any], filled: Filled, boundary: str
) -> tuple[bytes | None, str | None]:
    body = operation.body
    if body is None:
        return None, None
    injected = {one.name: value for one, value in filled.inject if one.in_ == "body"}
    value = _value(operation, body, arguments)
    if isinstance(value, dict):
        # However it is written: some services take the one name for the other.
        own = {name.lower() for name in injected}
        value = {name: item for name, item in value.items() if name.lower() not in own} | injected
    if value is None or (value == {} and body.whole is None):
        return None, None
    match body.kind:
        case "json":
            return _json(value).encode(), body.content_type
        case "form":
            return urlencode(list(_fields(value))).encode(), body.content_type
        case "multipart":
            kind = f"{body.content_type}; boundary={boundary}"
            return _multipart(list(_fields(value)), boundary), kind


def _value(operation: Operation, body: Body, arguments: Mapping[str, Any]) -> Any:
    """Return what the model says of the body."""
    if body.whole is not None:
        return arguments.get(body.whole)
    value = {wire: arguments[name] for name, wire in body.parts.items() if name in arguments}
    if body.is_open:
        known = {*operation.input_schema["properties"], *operation.hidden}
        value |= {name: item for name, item in arguments.items() if name not in known}
    return value


def _fields(value: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a form: one for each item of a list, objects as JSON."""
    for name, item in value.items():
        for one in item if isinstance(item, list) else [item]:
            if one is not None:
                yield name, _text(one)


def _multipart(fields: Sequence[tuple[str, str]], boundary: str) -> bytes:
    """Return the fields as https://www.rfc-editor.org/rfc/rfc7578 has them."""
    if any(boundary in text for field in fields for text in field):
        raise ToolFailed("A field of the form holds what stands between its fields.")
    parts = []
    for name, text in fields:
        # As https://html.spec.whatwg.org/#multipart-form-data escapes a name.
        escaped = name.replace("\r", "%0D").replace("\n", "%0A").replace('"', "%22")
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{escaped}"\r\n\r\n'
        parts.append(f"{head}{text}\r\n")
    return ("".join(parts) + f"--{boundary}--\r\n").encode()
