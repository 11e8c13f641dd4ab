"""Descriptions of services as operations: names, arguments, bodies, schemas, what is left out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.profile.services import Service
from ownware_gateway.services.fetch import parse, read_files
from ownware_gateway.services.schema import NODES_MAX, SCHEMA_BYTES_MAX, Wrong
from ownware_gateway.services.spec import (
    LEFT_OUT_MAX,
    TOOLS_MAX,
    Description,
    Operation,
    describe,
)

ROOT = "https://shop.example/api/openapi.json"

Json = dict[str, Any]


def read(
    paths: Json, version: str = "3.1.0", *, settings: Json | None = None, **fields: Any
) -> Description:
    document = {"openapi": version, "paths": paths, **fields}
    service = Service.model_validate({"spec": "x", **(settings or {})})
    return describe("s", service, {ROOT: document}, ROOT)


def one(
    operation: Json,
    version: str = "3.1.0",
    *,
    path: str = "/a",
    method: str = "post",
    settings: Json | None = None,
    **schemas: Any,
) -> Operation:
    """The one operation of a document, which must be there."""
    found = read(
        {path: {method: {"operationId": "op", **operation}}},
        version,
        settings=settings,
        components={"schemas": schemas},
    )
    assert found.left_out == []
    (taken,) = found.operations
    return taken


def body(schema: Any, content_type: str = "application/json", **fields: Any) -> Json:
    return {
        "requestBody": {"required": True, "content": {content_type: {"schema": schema}}} | fields
    }


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def properties(operation: Operation) -> Json:
    found: Json = operation.input_schema["properties"]
    return found


# -- which there are, and their names


def test_an_operation_is_called_by_its_id_or_a_name_for_tools_or_its_path() -> None:
    paths = {
        "/pets": {"get": {"operationId": "listPets", "x-tool-name": "other"}},
        "/pets/{id}/toys": {
            "parameters": [{"name": "id", "in": "path", "required": True}],
            "get": {"x-tool-name": "toys"},
            "post": {},
        },
        "/": {"delete": {}, "options": {}, "trace": {}},
    }
    names = [item.name for item in read(paths).operations]
    assert names == ["s__listPets", "s__toys", "s__toys_post", "s__root_delete"]


def test_names_are_such_as_providers_take_and_no_two_are_the_same() -> None:
    paths = {
        f"/{number}": {"get": {"operationId": name}}
        for number, name in enumerate(["a b", "a.b", "a-b", "x" * 100, "x" * 99 + "y", "a b"])
    }
    names = [item.name for item in read(paths).operations]
    assert len(set(names)) == 6
    assert all(len(name) <= 64 and name.startswith("s__") for name in names)


@pytest.mark.parametrize(
    "path", ["/health", "/healthz", "/ready", "/readyz/", "/livez", "/metrics"]
)
def test_what_only_watches_a_service_is_left_out_without_a_word(path: str) -> None:
    found = read({path: {"get": {}}, f"/of{path}": {"get": {}}})
    assert len(found.operations) == 1
    assert found.left_out == []


def test_globs_say_which_operations_there_are() -> None:
    paths: Json = {f"/{name}": {"get": {"operationId": name}} for name in ("getA", "getB", "putA")}
    found = read(paths, settings={"include": ["get*"], "exclude": ["*B"]})
    assert [item.wire_name for item in found.operations] == ["getA"]


def test_a_large_service_is_cut_and_says_so() -> None:
    paths: Json = {f"/{number}": {"get": {}} for number in range(TOOLS_MAX + 50)}
    found = read(paths)
    assert len(found.operations) == TOOLS_MAX
    assert len(found.left_out) == LEFT_OUT_MAX + 1
    assert found.left_out[-1] == f"And {50 - LEFT_OUT_MAX} more."


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        ({"servers": [{"url": "https://other.example"}]}, "it has a server of its own"),
        (body({}, "image/png"), "its body is image/png"),
        (body({"type": "string"}, "multipart/form-data"), "a form without fields"),
        (
            body(
                {"properties": {"f": {"format": "binary"}}, "required": ["f"]},
                "multipart/form-data",
            ),
            "its body wants a file, 'f'",
        ),
        ({"parameters": [{"name": "a", "in": "path", "style": "matrix"}]}, "the style 'matrix'"),
        ({"parameters": [{"name": "a", "in": "space"}]}, "a parameter is in 'space'"),
        ({"parameters": [{"$ref": "#/nowhere"}]}, "'#/nowhere' leads nowhere"),
        ({"parameters": [{"$ref": "#/loop"}]}, "without an end"),
        (body({"default": float("nan")}), "its schema is no JSON"),
        (body(7), "a schema is no object but int"),
    ],
)
def test_what_cannot_be_called_is_left_out_and_said_and_the_rest_is_not(
    operation: Json, why: str
) -> None:
    found = read(
        {
            "/a/{a}": {"post": {"operationId": "bad", **operation}},
            "/b": {"get": {"operationId": "good"}},
        },
        loop={"$ref": "#/loop"},
        settings={"inject": [{"name": "a", "in": "path", "value": "x"}]}
        if "parameters" not in operation
        else {},
    )
    assert [item.wire_name for item in found.operations] == ["good"]
    (said,) = found.left_out
    assert said.startswith("The operation 'bad' (POST /a/{a}) is left out: ")
    assert why in said


@pytest.mark.parametrize("path", ["/a/{id}", "/a?b=c", "/../admin", "/a/./b", "a"])
def test_a_path_that_is_no_plain_path_is_left_out(path: str) -> None:
    found = read({path: {"get": {}}})
    assert not found.operations
    assert len(found.left_out) == 1


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ([], "holds no object"),
        ({}, "no OpenAPI document"),
        ({"swagger": "2.0", "paths": {}}, "it is of OpenAPI 2.0"),
        ({"openapi": "3.2.0"}, "it is of OpenAPI '3.2.0'"),
        ({"openapi": "3.0.0", "paths": []}, "its 'paths' are no object"),
    ],
)
def test_another_document_is_no_description(document: Any, why: str) -> None:
    with pytest.raises(Wrong, match=why):
        describe("s", Service(spec="x"), {ROOT: document}, ROOT)


@pytest.mark.parametrize(
    ("servers", "url"),
    [
        (None, "https://shop.example/"),
        ([{"url": "/v1"}], "https://shop.example/v1"),
        ([{"url": "v1"}], "https://shop.example/api/v1"),
        (
            [{"url": "https://{region}.example/{v}", "variables": {"region": {"default": "eu"}}}],
            "https://eu.example/",
        ),
        ([{"url": "ftp://shop.example"}], None),
        (["x"], None),
    ],
)
def test_where_a_service_answers_its_description_says(servers: Any, url: str | None) -> None:
    fields = {} if servers is None else {"servers": servers}
    assert read({}, **fields).url == url


# -- arguments


def test_parameters_of_the_path_count_for_its_operations_which_may_change_them() -> None:
    found = read(
        {
            "/a/{id}": {
                "parameters": [
                    {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
                    {"name": "q", "in": "query", "schema": {"type": "string"}},
                ],
                "get": {
                    "parameters": [
                        {
                            "name": "q",
                            "in": "query",
                            "schema": {"type": "integer"},
                            "description": "How many.",
                        }
                    ]
                },
            }
        }
    )
    (operation,) = found.operations
    assert operation.input_schema == {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "q": {"type": "integer", "description": "How many."},
        },
        "required": ["id"],
    }


def test_headers_and_cookies_are_shown_only_when_they_must_be_and_nobody_else_gives_them() -> None:
    parameters = [
        {"name": "X-Must", "in": "header", "required": True},
        {"name": "X-May", "in": "header"},
        {"name": "X-Given", "in": "header", "required": True},
        {"name": "X-Injected", "in": "header", "required": True},
        {"name": "Authorization", "in": "header", "required": True},
        {"name": "Host", "in": "header", "required": True},
        {"name": "sid", "in": "cookie", "required": True},
        {"name": "crumb", "in": "cookie"},
    ]
    settings = {
        "headers": {"x-given": "1"},
        "inject": [{"name": "x-injected", "in": "header", "value": "1"}],
    }
    operation = one({"parameters": parameters}, settings=settings)
    assert list(properties(operation)) == ["X-Must", "sid"]
    assert operation.input_schema["required"] == ["X-Must", "sid"]


def test_what_has_one_name_in_two_places_has_two_names() -> None:
    operation = one(
        {
            "parameters": [
                {"name": "id", "in": "path", "required": True},
                {"name": "id", "in": "query"},
            ],
            **body({"type": "object", "properties": {"id": {}, "$top[x]": {}}, "required": ["id"]}),
        },
        path="/a/{id}",
    )
    assert list(properties(operation)) == ["id", "query_id", "body_id", "_top_x_"]
    assert operation.input_schema["required"] == ["id", "body_id"]
    assert operation.body is not None
    assert operation.body.parts == {"body_id": "id", "_top_x_": "$top[x]"}


@pytest.mark.parametrize(
    ("schema", "argument"),
    [
        ({"type": "array", "items": {"type": "string"}}, "body"),
        ({"type": "object"}, "body"),
        ({"oneOf": [{"type": "string"}, {"type": "object"}], "properties": {"a": {}}}, "body"),
        ({"type": ["object", "null"], "properties": {"a": {}}}, "body"),
        ({"properties": {"a": {}}}, "a"),
    ],
)
def test_a_body_that_is_not_simply_an_object_is_one_argument(schema: Json, argument: str) -> None:
    assert list(properties(one(body(schema)))) == [argument]


def test_a_body_that_may_be_left_out_wants_nothing() -> None:
    schema = {"properties": {"a": {}}, "required": ["a"]}
    assert "required" not in one(body(schema, required=False)).input_schema
    assert one(body(schema)).input_schema["required"] == ["a"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (["text/plain", "application/json; charset=utf-8"], "json"),
        (["application/vnd.shop+json"], "json"),
        (["*/*"], "json"),
        (["multipart/form-data", "application/x-www-form-urlencoded"], "form"),
        (["multipart/form-data"], "multipart"),
    ],
)
def test_of_the_kinds_of_a_body_json_is_taken_first(content: list[str], kind: str) -> None:
    media = {"schema": {"properties": {"a": {"type": "string"}}}}
    operation = one({"requestBody": {"content": dict.fromkeys(content, media)}})
    assert operation.body is not None
    assert operation.body.kind == kind


def test_a_deprecated_operation_says_so() -> None:
    operation = one({"deprecated": True, "summary": "Do it.", "description": "Do it. Now."})
    assert operation.description == "Deprecated: prefer another. Do it. Now. (POST /a)"


# -- schemas


def test_null_and_bounds_are_said_in_the_words_of_both_versions() -> None:
    old = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "nullable": True, "enum": ["x"]},
            "b": {"nullable": True, "description": "B.", "allOf": [ref("B")]},
            "c": {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
            "d": {"type": "integer", "maximum": 9, "exclusiveMaximum": False},
        },
    }
    new = {
        "type": "object",
        "properties": {
            "a": {"type": ["string", "null"], "enum": ["x", None]},
            "c": {"type": "integer", "exclusiveMinimum": 1},
            "e": {"const": 1, "examples": [1], "$comment": "no"},
            "f": {"$ref": "#/components/schemas/B", "description": "Mine."},
        },
    }
    schema = {"type": "integer", "description": "Theirs."}
    assert properties(one(body(old), "3.0.3", B=schema)) == {
        "a": {"type": ["string", "null"], "enum": ["x", None]},
        "b": {"type": ["integer", "null"], "description": "B."},
        "c": {"type": "integer", "exclusiveMinimum": 1},
        "d": {"type": "integer", "maximum": 9},
    }
    assert properties(one(body(new), B=schema)) == {
        "a": {"type": ["string", "null"], "enum": ["x", None]},
        "c": {"type": "integer", "exclusiveMinimum": 1},
        "e": {"const": 1},
        "f": {"type": "integer", "description": "Mine."},
    }


def test_what_only_answers_have_is_left_out() -> None:
    schema = {
        "properties": {
            "id": {"type": "integer", "readOnly": True},
            "by": ref("By"),
            "name": {"type": "string", "writeOnly": True},
        },
        "required": ["id", "by", "name"],
    }
    operation = one(body(schema), By={"type": "string", "readOnly": True})
    assert operation.input_schema["properties"] == {"name": {"type": "string"}}
    assert operation.input_schema["required"] == ["name"]


def test_parts_of_all_of_become_one_object_unless_they_contradict() -> None:
    base = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    more = {"allOf": [ref("Base"), {"properties": {"b": {}}}], "required": ["b"]}
    operation = one(body(ref("More")), Base=base, More=more)
    assert operation.input_schema == {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {}},
        "required": ["a", "b"],
    }
    odd = {"allOf": [ref("Base"), {"properties": {"a": {"type": "integer"}}}]}
    assert list(properties(one(body(odd), Base=base))) == ["body"]


def test_a_schema_that_refers_to_itself_ends_in_an_open_object() -> None:
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "next": ref("Node"),
            "pair": {"type": "array", "items": ref("Other")},
        },
    }
    other = {"type": "object", "properties": {"back": ref("Node")}}
    found = properties(one(body(ref("Node")), Node=node, Other=other))
    said = {"type": "object", "description": "(Like Node, which it is part of.)"}
    assert found["next"] == said
    assert found["pair"]["items"]["properties"]["back"] == said


def test_a_schema_that_grows_without_bounds_loses_its_depths_and_not_the_operation() -> None:
    wide: Json = {
        f"S{number}": {
            "type": "object",
            "properties": {f"p{index}": ref(f"S{number + 1}") for index in range(12)},
        }
        for number in range(12)
    }
    wide["S12"] = {"type": "string"}
    operation = one(body(ref("S0")), **wide)
    size = len(json.dumps(operation.input_schema))
    assert 1_000 < size <= SCHEMA_BYTES_MAX
    assert len(properties(operation)) == 12
    assert "left out here" in json.dumps(operation.input_schema)


def test_a_schema_that_is_wide_itself_costs_the_operation_alone() -> None:
    huge = {"type": "object", "properties": {f"p{i}": {} for i in range(NODES_MAX + 1)}}
    found = read(
        {"/a": {"post": {"operationId": "a", **body(huge)}}, "/b": {"get": {"operationId": "b"}}}
    )
    assert [item.wire_name for item in found.operations] == ["b"]
    assert "its schema is too large, 32768 bytes are allowed" in found.left_out[0]


# -- documents


def test_yaml_is_read_as_the_json_that_it_stands_for() -> None:
    assert parse(b"a: 2020-01-01\nb: {c: yes, 200: x}\n", ROOT) == {
        "a": "2020-01-01",
        "b": {"c": True, 200: "x"},
    }
    with pytest.raises(Wrong, match="neither JSON nor YAML"):
        parse(b"!!python/object/apply:os.system ['true']", ROOT)
    with pytest.raises(Wrong, match="neither JSON nor YAML"):
        parse(b"\xff\xfe{}", ROOT)


def test_yaml_that_holds_itself_or_multiplies_is_bounded() -> None:
    bomb = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 9))
        for name in range(ord("b"), ord("l"))
    )
    text = (
        b"openapi: 3.1.0\nloop: &loop {type: object, properties: {me: *loop}}\n"
        + bomb
        + b"paths:\n  /a: {post: {operationId: a, requestBody: {required: true, content:"
        b" {application/json: {schema: *loop}}}}}\n"
        b"  /b: {post: {operationId: b, requestBody: {content:"
        b" {application/json: {schema: {enum: *k}}}}}}\n"
        b"  /c: {get: {operationId: c}}\n"
    )
    found = describe("s", Service(spec="x"), {ROOT: parse(text, ROOT)}, ROOT)
    assert "c" in [item.wire_name for item in found.operations]
    assert all(len(json.dumps(item.input_schema)) <= SCHEMA_BYTES_MAX for item in found.operations)


@pytest.mark.parametrize(
    "field",
    [
        "summary: *k",
        "description: *k",
        "parameters: [{name: *k, in: query}]",
        "parameters: [{name: q, in: *k}]",
        "parameters: [{name: q, in: query, style: *k}]",
    ],
)
def test_what_multiplies_is_no_text(field: str) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(name)}: &{chr(name)} [{', '.join([f'*{chr(name - 1)}'] * 9)}]\n"
        for name in range(ord("b"), ord("m"))
    )
    text = f"openapi: 3.1.0\n{bomb}servers: [{{url: *k}}]\npaths: {{/a: {{get: {{{field}}}}}}}\n"
    found = describe("s", Service(spec="x"), {ROOT: parse(text.encode(), ROOT)}, ROOT)
    assert len(found.operations) + len(found.left_out) == 1


def test_a_description_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(Wrong, match="is not a regular file"):
            read_files(path, None)


def test_files_refer_to_those_beside_them_and_to_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "api"
    folder.mkdir()
    (folder / "a.json").write_text('{"x": {"$ref": "b.json#/y"}}')
    (folder / "b.json").write_text('{"y": {"$ref": "a.json"}}')
    found = read_files(folder / "a.json", None)
    assert sorted(Path(uri).name for uri in found.by_uri) == ["a.json", "b.json"]
    (tmp_path / "secret.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret.json")
    for target in ("../secret.json", "link.json", "%2e%2e/secret.json", "https://a.example/b"):
        (folder / "b.json").write_text(json.dumps({"y": {"$ref": target}}))
        with pytest.raises(Wrong, match="does not lie beside it"):
            read_files(folder / "a.json", None)
    with pytest.raises(Wrong, match="cannot be read: No such file"):
        read_files(folder / "none.json", None)
