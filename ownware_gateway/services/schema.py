"""Schemas of an OpenAPI document as models of language can be given them: whole, bounded, plain.

Pure. References are written out, since a tool's schema stands for itself. What refers to itself
becomes an object without bounds, and what is too large loses its deepest parts first.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from referencing import Registry, Specification
from referencing.exceptions import Unresolvable

SCHEMA_BYTES_MAX: Final = 32_768

#: How deep a schema is written out; where that is too large, the next is tried.
DEPTHS: Final = (16, 8, 5, 4, 3, 2)

#: Parts of one operation's schemas that are written out; more would not fit into the bytes.
NODES_MAX: Final = 2_000

#: And of all schemas of one description, however often each is tried.
NODES_IN_ALL_MAX: Final = 1_500_000

#: References that lead to references, one after the other.
CHAIN_MAX: Final = 16

_TEXT_CHARS_MAX: Final = 1_024

#: Keywords that are kept as they are, and those whose values are schemas (or lists, or maps).
_PLAIN: Final = frozenset(
    {
        *("type", "enum", "const", "format", "pattern", "title", "description", "default"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems"),
        *("minProperties", "maxProperties", "required"),
    }
)
_ONE: Final = frozenset({"items", "additionalProperties", "not"})
_MANY: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})

#: Keywords of a part of `allOf` that can be put together with those of the others.
_JOINED: Final = frozenset(
    {"type", "properties", "required", "description", "title", "additionalProperties"}
)

Resolver = Any


def plain_text(value: Any) -> str:
    """Return a plain value as text, and nothing for any other.

    In YAML a few lines can stand for a list of millions, whose text no memory holds.
    """
    return str(value) if isinstance(value, str | int | float) else ""


class TooLarge(Exception):
    """A schema does not fit, however much is left out of it."""


class Wrong(Exception):
    """A part of a document is not what it should be; the message says which, and what."""


class Placed(NamedTuple):
    """A part of a document, and what references in it are relative to."""

    value: Any
    resolver: Resolver
    #: The references that led here.
    refs: tuple[tuple[int, str], ...] = ()

    def part(self, value: Any) -> "Placed":
        """Return something within it."""
        return Placed(value, self.resolver, self.refs)


def place(documents: Mapping[str, Any], root: str) -> Placed:
    """Return the root of documents that refer to each other by their addresses."""
    resources = [
        (uri, Specification.OPAQUE.create_resource(document)) for uri, document in documents.items()
    ]
    registry: Registry[Any] = Registry().with_resources(resources)
    return Placed(documents[root], registry.resolver(root))


def follow(placed: Placed) -> Placed:
    """Return what a part stands for, if it is a reference. Raises Wrong."""
    for _ in range(CHAIN_MAX):
        ref = placed.value.get("$ref") if isinstance(placed.value, dict) else None
        if not isinstance(ref, str):
            return placed
        siblings = {name: item for name, item in placed.value.items() if name != "$ref"}
        try:
            found = placed.resolver.lookup(ref)
        except (Unresolvable, LookupError, TypeError, ValueError):
            raise Wrong(f"the reference {ref[:200]!r} leads nowhere") from None
        key = (id(found.contents), ref.partition("#")[2])
        value = found.contents
        if siblings and isinstance(value, dict):
            value = {**value, **siblings}
        placed = Placed(value, found.resolver, (*placed.refs, key))
    raise Wrong("references lead to references without an end")


class Budget:
    """How many parts of schemas may still be written out, for a whole description."""

    def __init__(self, left: int = NODES_IN_ALL_MAX) -> None:
        self.left = left


class Writer:
    """Writes the schemas of one operation out, down to a depth, and counts their parts."""

    def __init__(self, depth: int, budget: Budget) -> None:
        self._depth = depth
        self._budget = budget
        self._nodes = 0

    def write(self, placed: Placed) -> dict[str, Any]:
        """Return a schema without references. Raises TooLarge, Wrong."""
        return self._write(placed, self._depth)

    def _count(self) -> None:
        self._nodes += 1
        self._budget.left -= 1
        if self._budget.left < 0:
            raise Wrong("the schemas of the whole description are too large")
        if self._nodes > NODES_MAX:
            raise TooLarge

    def _copy(self, value: Any) -> Any:
        """Return a plain value, counted as well: in YAML a few lines can stand for millions."""
        self._count()
        match value:
            case dict():
                return {str(name): self._copy(item) for name, item in value.items()}
            case list():
                return [self._copy(item) for item in value]
            case _:
                return value

    def _write(self, placed: Placed, depth: int) -> dict[str, Any]:
        self._count()
        if isinstance(placed.value, bool):
            return {} if placed.value else {"not": {}}
        before = placed.refs
        placed = follow(placed)
        schema = placed.value
        if not isinstance(schema, dict):
            raise Wrong(f"a schema is no object but {type(schema).__name__}")
        new = placed.refs[len(before) :]
        if set(before) & set(new):
            return _open(schema, f"Like {_called(new)}, which it is part of")
        if depth <= 0 and any(name in schema for name in ("properties", *_ONE, *_MANY)):
            return _open(schema, "Its parts are left out here")
        return _plain(self._parts(placed, depth), nullable=schema.get("nullable") is True)

    def _parts(self, placed: Placed, depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for name, value in placed.value.items():
            if name in _PLAIN:
                kept[name] = self._copy(value)
            elif name in _ONE:
                one = isinstance(value, bool)
                kept[name] = value if one else self._write(placed.part(value), depth - 1)
            elif name in _MANY and isinstance(value, list):
                # Not deeper: they are other views of the same thing.
                kept[name] = [self._write(placed.part(item), depth) for item in value]
            elif name == "properties" and isinstance(value, dict):
                kept[name] = {
                    str(key): self._write(placed.part(item), depth - 1)
                    for key, item in value.items()
                    if not _is_read_only(placed.part(item))
                }
        if placed.value.get("contentMediaType") == "application/octet-stream":
            kept["format"] = "binary"  # As OpenAPI 3.0 says it.
        if isinstance(kept.get("required"), list):
            hidden = {*(placed.value.get("properties") or ())} - {*(kept.get("properties") or ())}
            kept["required"] = [name for name in kept["required"] if name not in hidden]
        return kept


def _is_read_only(placed: Placed) -> bool:
    """Whether a property stands in answers alone."""
    found = follow(placed).value
    return isinstance(found, dict) and found.get("readOnly") is True


def _called(refs: tuple[tuple[int, str], ...]) -> str:
    return refs[-1][1].rpartition("/")[2] or "the whole document"


def _open(schema: Mapping[str, Any], why: str) -> dict[str, Any]:
    """Return a schema without its parts."""
    said = plain_text(schema.get("description") or schema.get("title"))[:_TEXT_CHARS_MAX]
    kind = schema.get("type")
    if kind is None and any(name in schema for name in ("properties", "additionalProperties")):
        kind = "object"
    found: dict[str, Any] = {} if kind is None else {"type": kind}
    if kind == "array":
        # Some providers want it with every array.
        found["items"] = {}
    return {**found, "description": f"{said} ({why}.)".strip()}


def _plain(kept: dict[str, Any], *, nullable: bool) -> dict[str, Any]:
    """Return a schema in the words of JSON Schema 2020-12, `allOf` put together where it can be."""
    for name, edge in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        # In OpenAPI 3.0 a flag.
        if isinstance(kept.get(name), bool) and kept.pop(name) and edge in kept:
            kept[name] = kept.pop(edge)
    for name in ("description", "title"):
        if name in kept:
            kept[name] = str(kept[name])[:_TEXT_CHARS_MAX]
    if kept.get("type") == "array" and "items" not in kept:
        kept["items"] = {}
    if isinstance(kept.get("allOf"), list):
        kept = _joined(kept)
    return _or_null(kept) if nullable else kept


def _or_null(kept: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that takes null as well, which OpenAPI 3.0 says with a flag."""
    if isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
        if isinstance(enum := kept.get("enum"), list) and None not in enum:
            kept["enum"] = [*enum, None]
        return kept
    said: dict[str, Any] = {
        name: kept.pop(name) for name in ("title", "description") if name in kept
    }
    return {"anyOf": [kept, {"type": "null"}], **said} if kept else said


def _joined(kept: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of `allOf` as one object, unless they contradict each other."""
    rest = {name: value for name, value in kept.items() if name != "allOf"}
    found: dict[str, Any] = {}
    for part in (*kept["allOf"], rest):
        if len(kept["allOf"]) == 1 and not rest.keys() & part.keys() - {"description", "title"}:
            found |= part
            continue
        if not _join(found, part):
            return kept
    return found


def _join(found: dict[str, Any], part: Mapping[str, Any]) -> bool:
    """Add a part to what is found; False when that is not simple."""
    if not part.keys() <= _JOINED or part.get("type", "object") != "object":
        return False
    properties = found.setdefault("properties", {})
    for name, schema in part.get("properties", {}).items():
        if properties.setdefault(name, schema) != schema:
            return False
    required = [*found.get("required", ()), *part.get("required", ())]
    if required:
        found["required"] = list(dict.fromkeys(required))
    # With it in one part alone, the properties of the others would be forbidden.
    others = {
        name: value
        for name, value in part.items()
        if name not in ("properties", "required", "additionalProperties")
    }
    found |= {"type": "object", **others}
    return True
