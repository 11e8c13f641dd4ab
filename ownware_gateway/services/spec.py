"""An OpenAPI document (3.0 and 3.1) as operations that agents can be given. Pure.

The form is https://spec.openapis.org/oas/v3.1.1 and https://spec.openapis.org/oas/v3.0.4.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urljoin

from ownware_gateway.profile.services import Service
from ownware_gateway.services.schema import (
    DEPTHS,
    SCHEMA_BYTES_MAX,
    Budget,
    Placed,
    TooLarge,
    Writer,
    Wrong,
    follow,
    place,
    plain_text,
)
from ownware_gateway.tools.names import NAME_CHARS_MAX, argument_name, tool_name

#: Operations of one service; more are left out, and the status says so.
TOOLS_MAX: Final = 128
DESCRIPTION_CHARS_MAX: Final = 4_096
PARAMETERS_MAX: Final = 256

#: Most sentences about operations that were left out.
LEFT_OUT_MAX: Final = 20

METHODS: Final = ("get", "head", "post", "put", "patch", "delete")

#: What watches a service calls these; no agent does.
_PROBES: Final = re.compile(r"/(?:healthz?|readyz?|livez?|metrics)/?")

#: The specification says to ignore the first three; the others are the HTTP client's.
_NO_PARAMETERS: Final = frozenset(
    {"accept", "content-type", "authorization", "cookie", "host", "content-length", "connection"}
)

_TEMPLATE: Final = re.compile(r"\{([^{}]*)\}")

Place = Literal["path", "query", "header", "cookie"]
Kind = Literal["json", "form", "multipart"]


class Parameter(NamedTuple):
    """A parameter: what the model calls it, and how it is sent."""

    argument: str
    wire: str
    place: Place
    style: str
    explode: bool
    #: Whether its value is sent as JSON.
    as_json: bool = False


class Body(NamedTuple):
    """A body: its parts by what the model calls them, or one argument that is all of it."""

    kind: Kind
    content_type: str
    whole: str | None = None
    parts: Mapping[str, str] = {}
    #: Whether it may have parts that are not described.
    is_open: bool = False


class Operation(NamedTuple):
    """An operation: what the model is told of it, and how it is called."""

    name: str
    wire_name: str
    method: str
    path: str
    description: str
    input_schema: dict[str, Any]
    parameters: Sequence[Parameter]
    body: Body | None
    #: What the model can say nothing about.
    hidden: frozenset[str]


class Description(NamedTuple):
    """What a document says of a service. `url` is where it answers, if it says that."""

    url: str | None
    operations: Sequence[Operation]
    left_out: Sequence[str]


class _LeftOut(Exception):
    """An operation cannot be offered; the message says why."""


def describe(name: str, settings: Service, documents: Mapping[str, Any], root: str) -> Description:
    """Return what a document, and those that it refers to, say of a service. Raises Wrong."""
    document = documents[root]
    _check_version(document)
    found = _Operations(name, settings, place(documents, root))
    found.read()
    left_out = found.left_out
    if (more := len(left_out) - LEFT_OUT_MAX) > 0:
        left_out = [*left_out[:LEFT_OUT_MAX], f"And {more} more."]
    return Description(_server(document, root), list(found.taken.values()), left_out)


def _check_version(document: Any) -> None:
    if not isinstance(document, dict):
        raise Wrong("it is no OpenAPI document: it holds no object")
    version = plain_text(document.get("openapi"))
    if "swagger" in document and not version:
        raise Wrong("it is of OpenAPI 2.0, and 3.0 and 3.1 are understood; convert it first")
    if not re.match(r"3\.[01](?:\.|$)", version):
        said = f"of OpenAPI {version[:20]!r}" if version else "no OpenAPI document"
        raise Wrong(f"it is {said}, and 3.0 and 3.1 are understood")
    if not isinstance(document.get("paths", {}), dict):
        raise Wrong("its 'paths' are no object")


def _server(document: Mapping[str, Any], root: str) -> str | None:
    """Return where a document says that its service answers, resolved against its own address."""
    servers = document.get("servers")
    first = servers[0] if isinstance(servers, list) and servers else {"url": "/"}
    if not isinstance(first, dict):
        return None
    variables = first.get("variables")
    variables = variables if isinstance(variables, dict) else {}

    def default(found: re.Match[str]) -> str:
        variable = variables.get(found[1])
        return plain_text(variable.get("default")) if isinstance(variable, dict) else ""

    url = urljoin(root, _TEMPLATE.sub(default, plain_text(first.get("url", "/"))))
    return url if re.match(r"https?://[^/]", url) else None


class _Operations:
    """Reads the operations of one document."""

    def __init__(self, service: str, settings: Service, root: Placed) -> None:
        self._service = service
        self._settings = settings
        self._root = root
        self._budget = Budget()
        self._seen: set[str] = set()
        self.taken: dict[str, Operation] = {}
        self.left_out: list[str] = []

    def read(self) -> None:
        """Take what can be taken, and say what cannot."""
        for path, value in self._root.value.get("paths", {}).items():
            if _PROBES.fullmatch(str(path)):
                continue
            for method, item, operation in self._methods(str(path), value):
                self._add(str(path), method, item, operation)

    def _methods(self, path: str, value: Any) -> Iterator[tuple[str, Placed, Placed]]:
        try:
            item = follow(self._root.part(value))
        except Wrong as error:
            self.left_out.append(f"The path {path[:200]} is left out: {error}.")
            return
        if isinstance(item.value, dict):
            for method in METHODS:
                if isinstance(item.value.get(method), dict):
                    yield method, item, item.part(item.value[method])

    def _add(self, path: str, method: str, item: Placed, operation: Placed) -> None:
        wire_name = _wire_name(path, method, operation.value)
        if not self._wanted(wire_name):
            return
        try:
            if len(self.taken) >= TOOLS_MAX:
                raise _LeftOut(f"only the first {TOOLS_MAX} are taken")
            name = tool_name(self._service, wire_name)
            if name in self.taken:
                name = tool_name(self._service, f"{wire_name} {method} {path}", distinct=True)
            reader = _Reader(self._settings, path, method, item, operation)
            self.taken[name] = reader.operation(name, wire_name, self._budget)
        except (_LeftOut, Wrong) as error:
            where = f"{method.upper()} {path[:200]}"
            self.left_out.append(
                f"The operation {wire_name[:NAME_CHARS_MAX]!r} ({where}) is left out: {error}."
            )

    def _wanted(self, name: str) -> bool:
        include, exclude = self._settings.include, self._settings.exclude
        return (not include or any(fnmatchcase(name, glob) for glob in include)) and not any(
            fnmatchcase(name, glob) for glob in exclude
        )


def _wire_name(path: str, method: str, operation: Mapping[str, Any]) -> str:
    for field in ("operationId", "x-tool-name"):
        if isinstance(given := operation.get(field), str) and given.strip():
            return given.strip()
    static = [part for part in path.split("/") if part and not _TEMPLATE.search(part)]
    return f"{static[-1] if static else 'root'}_{method}"


class _Reader:
    """Reads one operation."""

    def __init__(
        self, settings: Service, path: str, method: str, item: Placed, operation: Placed
    ) -> None:
        self._settings = settings
        self._path = path
        self._method = method
        self._item = item
        self._operation = operation
        self._injected = {(one.in_, one.name.lower()) for one in settings.inject}
        self._injected |= {("header", name.lower()) for name in settings.headers}
        if settings.auth is not None:
            given = settings.auth.as_
            where: Place = "header" if given.header else "cookie"
            self._injected.add((where, (given.header or given.cookie).lower()))

    def operation(self, name: str, wire_name: str, budget: Budget) -> Operation:
        """Return the operation, its schemas as deep as they fit. Raises _LeftOut, Wrong."""
        if {"servers"} & {*self._operation.value, *self._item.value}:
            raise _LeftOut("it has a server of its own")
        if re.search(r"[?#]", self._path) or not self._path.startswith("/"):
            raise _LeftOut("its path is more than a path")
        if {".", ".."} & {*self._path.split("/")}:
            raise _LeftOut("its path leads out of where it begins")
        for depth in DEPTHS:
            try:
                built = self._at(Writer(depth, budget), name, wire_name)
                if len(json.dumps(built.input_schema, allow_nan=False)) <= SCHEMA_BYTES_MAX:
                    return built
            except TooLarge:
                continue
            except (TypeError, ValueError, RecursionError):
                raise _LeftOut("its schema is no JSON, or nested too deep") from None
        raise _LeftOut(f"its schema is too large, {SCHEMA_BYTES_MAX} bytes are allowed")

    def _at(self, writer: Writer, name: str, wire_name: str) -> Operation:
        arguments = _Arguments(writer)
        parameters = list(self._parameters(arguments))
        templated = set(_TEMPLATE.findall(self._path))
        described = {item.wire for item in parameters if item.place == "path"}
        described |= {one.name for one in self._settings.inject if one.in_ == "path"}
        if missing := sorted(templated - described):
            raise _LeftOut(f"its path names {missing[0][:100]!r}, which it does not describe")
        body = self._body(arguments)
        return Operation(
            name=name,
            wire_name=wire_name,
            method=self._method.upper(),
            path=self._path,
            description=self._description(wire_name),
            input_schema=arguments.schema(),
            parameters=parameters,
            body=body,
            hidden=frozenset(arguments.hidden),
        )

    def _description(self, wire_name: str) -> str:
        fields = self._operation.value
        said = [plain_text(fields.get(name)).strip() for name in ("summary", "description")]
        if said[1].startswith(said[0]):
            said = said[1:]
        text = "\n\n".join(part for part in said if part) or wire_name
        note = "Deprecated: prefer another. " if fields.get("deprecated") is True else ""
        call = f"{self._method.upper()} {self._path}"[:200]
        return f"{note}{text}"[: DESCRIPTION_CHARS_MAX - len(call) - 3] + f" ({call})"

    # -- parameters

    def _parameters(self, arguments: "_Arguments") -> Iterator[Parameter]:
        found: dict[tuple[str, str], Placed] = {}
        for holder in (self._item, self._operation):
            for value in holder.value.get("parameters") or ():
                parameter = follow(holder.part(value))
                if not isinstance(parameter.value, dict):
                    raise Wrong("a parameter is no object")
                fields = parameter.value
                found[plain_text(fields.get("in")), plain_text(fields.get("name"))] = parameter
        if len(found) > PARAMETERS_MAX:
            raise _LeftOut(f"it has {len(found)} parameters, {PARAMETERS_MAX} are allowed")
        for (where, wire), parameter in found.items():
            match where:
                case "path" | "query" | "header" | "cookie":
                    if not self._is_shown(where, wire, parameter.value):
                        arguments.hidden.add(wire)
                        continue
                    yield self._parameter(where, wire, parameter, arguments)
                case _:
                    raise _LeftOut(f"a parameter is in {where[:20]!r}")

    def _is_shown(self, where: Place, wire: str, fields: Mapping[str, Any]) -> bool:
        if (where, wire.lower()) in self._injected:
            return False
        if where in ("path", "query"):
            return where == "query" or f"{{{wire}}}" in self._path
        return fields.get("required") is True and wire.lower() not in _NO_PARAMETERS

    def _parameter(
        self, where: Place, wire: str, parameter: Placed, arguments: "_Arguments"
    ) -> Parameter:
        fields = parameter.value
        usual = "form" if where in ("query", "cookie") else "simple"
        style = plain_text(fields.get("style") or usual)
        if style not in _STYLES[where]:
            raise _LeftOut(f"the style {style[:20]!r} of {wire[:100]!r} is not known")
        schema, as_json = _schema_of(parameter)
        written = arguments.writer.write(schema)
        if isinstance(said := fields.get("description"), str) and said:
            written = {**written, "description": said[:1024]}
        required = where == "path" or fields.get("required") is True
        argument = arguments.add(wire, where, written, required=required)
        explode = fields.get("explode")
        explode = style == "form" if not isinstance(explode, bool) else explode
        return Parameter(argument, wire, where, style, explode, as_json)

    # -- the body

    def _body(self, arguments: "_Arguments") -> Body | None:
        value = self._operation.value.get("requestBody")
        if value is None or self._method in ("get", "head"):
            return None
        body = follow(self._operation.part(value))
        content = body.value.get("content") if isinstance(body.value, dict) else None
        if not isinstance(content, dict) or not content:
            return None
        required = body.value.get("required") is True
        content_type, kind = _content_type(content)
        media = follow(body.part(content[content_type]))
        schema = media.value.get("schema", {}) if isinstance(media.value, dict) else {}
        written = arguments.writer.write(media.part(schema))
        sent = "application/json" if "*" in content_type else content_type.split(";")[0].strip()
        if _is_flat(written):
            parts = self._parts(kind, written, arguments, required=required)
            more = written.get("additionalProperties", False) not in (False, None)
            return Body(kind, sent, parts=parts, is_open=more)
        if kind != "json":
            raise _LeftOut("its body is a form without fields that are described")
        return Body(kind, sent, whole=arguments.add("body", "body", written, required=required))

    def _parts(
        self, kind: Kind, written: Mapping[str, Any], arguments: "_Arguments", *, required: bool
    ) -> Mapping[str, str]:
        needed = written.get("required") if required else ()
        parts: dict[str, str] = {}
        for wire, schema in written["properties"].items():
            needs = isinstance(needed, list) and wire in needed
            if ("body", wire.lower()) in self._injected:
                arguments.hidden.add(wire)
            elif kind == "multipart" and _is_file(schema):
                if needs:
                    raise _LeftOut(f"its body wants a file, {wire[:100]!r}")
                arguments.hidden.add(wire)
            else:
                parts[arguments.add(wire, "body", schema, required=needs)] = wire
        return parts


_STYLES: Final[Mapping[Place, frozenset[str]]] = {
    "path": frozenset({"simple"}),
    "query": frozenset({"form", "spaceDelimited", "pipeDelimited", "deepObject"}),
    "header": frozenset({"simple"}),
    "cookie": frozenset({"form"}),
}


class _Arguments:
    """The arguments of a tool: no two of one name."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._properties: dict[str, dict[str, Any]] = {}
        self._required: list[str] = []
        self.hidden: set[str] = set()

    def add(self, wire: str, where: str, schema: dict[str, Any], *, required: bool) -> str:
        """Add an argument, and return the name that it has got."""
        name = argument_name(wire)
        if name in self._properties:
            name = argument_name(f"{where}_{wire}")
        if name in self._properties:
            name = argument_name(f"{where}_{wire}", distinct=True)
        self._properties[name] = schema
        if required:
            self._required.append(name)
        return name

    def schema(self) -> dict[str, Any]:
        """Return the schema of them all."""
        needed = {"required": self._required} if self._required else {}
        return {"type": "object", "properties": self._properties, **needed}


def _schema_of(parameter: Placed) -> tuple[Placed, bool]:
    """Return the schema of a parameter, and whether its value is sent as JSON."""
    content = parameter.value.get("content")
    if not isinstance(content, dict):
        return parameter.part(parameter.value.get("schema", {})), False
    for content_type, value in content.items():
        if _kind(str(content_type)) == "json":
            media = follow(parameter.part(value))
            schema = media.value.get("schema", {}) if isinstance(media.value, dict) else {}
            return media.part(schema), True
    raise _LeftOut("the value of a parameter is of a kind that is not known")


def _content_type(content: Mapping[str, Any]) -> tuple[str, Kind]:
    """Return which of the kinds of a body is sent. Raises _LeftOut."""
    kinds = {str(name): _kind(str(name)) for name in content}
    for wanted in ("json", "form", "multipart"):
        for name, kind in kinds.items():
            if kind == wanted:
                return name, kind
    raise _LeftOut(f"its body is {', '.join(kinds)[:200]}")


def _kind(content_type: str) -> Kind | None:
    plain = content_type.split(";")[0].strip().lower()
    if plain in ("application/json", "text/json", "*/*", "application/*") or (
        plain.endswith("+json") and plain.startswith("application/")
    ):
        return "json"
    if plain == "application/x-www-form-urlencoded":
        return "form"
    return "multipart" if plain == "multipart/form-data" else None


def _is_flat(schema: Mapping[str, Any]) -> bool:
    """Whether a body is an object whose properties can stand beside the parameters."""
    kind = schema.get("type", "object")
    return (
        kind == "object"
        and bool(schema.get("properties"))
        and not any(name in schema for name in ("allOf", "anyOf", "oneOf", "not"))
    )


def _is_file(schema: Mapping[str, Any]) -> bool:
    return schema.get("format") == "binary" or (
        schema.get("type") == "array" and schema.get("items", {}).get("format") == "binary"
    )
