"""Requests of calls: how values are written, what they cannot do, and what is configured wins."""

import json
from typing import Any

import pytest

from ownware_gateway.masking import Masker
from ownware_gateway.profile.services import Service
from ownware_gateway.services.config import fill, secrets
from ownware_gateway.services.request import Borne, Built, bear, build
from ownware_gateway.services.results import Answered, render
from ownware_gateway.services.spec import describe
from ownware_gateway.tools import Image, Resource, ToolFailed

ROOT = "https://shop.example/openapi.json"

Json = dict[str, Any]


def built(
    operation: Json,
    arguments: Json,
    *,
    path: str = "/a",
    method: str = "post",
    base: str = "/api/",
    **settings: Any,
) -> Built:
    service = Service.model_validate({"spec": "x", **settings})
    document = {"openapi": "3.1.0", "paths": {path: {method: operation}}}
    found = describe("s", service, {ROOT: document}, ROOT)
    assert found.left_out == []
    (taken,) = found.operations
    return build(taken, arguments, fill(service, lambda name: None), base, "boundary")


def query(value: Any, **fields: Any) -> str:
    """What follows the question mark for one parameter, q."""
    parameter = {"name": "q", "in": "query", **fields}
    return built({"parameters": [parameter]}, {"q": value}, method="get").target.removeprefix(
        "/api/a?"
    )


def on_path(value: Any, path: str = "/a/{id}/b", **fields: Any) -> str:
    parameter = {"name": "id", "in": "path", "required": True, **fields}
    return built({"parameters": [parameter]}, {"id": value}, path=path, method="get").target


@pytest.mark.parametrize(
    ("value", "fields", "text"),
    [
        ("a b&c=d#e", {}, "q=a%20b%26c%3Dd%23e"),
        (True, {}, "q=true"),
        (1.5, {}, "q=1.5"),
        (["a,b", 1], {}, "q=a%2Cb&q=1"),
        (["a,b", 1], {"explode": False}, "q=a%2Cb,1"),
        (["a", "b"], {"style": "pipeDelimited", "explode": False}, "q=a%7Cb"),
        (["a", "b"], {"style": "spaceDelimited", "explode": False}, "q=a%20b"),
        ({"a": 1, "b": "&"}, {}, "a=1&b=%26"),
        ({"a": 1, "b": 2}, {"explode": False}, "q=a,1,b,2"),
        ({"a": 1, "b[": 2}, {"style": "deepObject"}, "q%5Ba%5D=1&q%5Bb%5B%5D=2"),
        ({"a": [1]}, {"content": {"application/json": {}}}, "q=%7B%22a%22%3A%5B1%5D%7D"),
        ("a\r\nX: y", {}, "q=a%0D%0AX%3A%20y"),
        ("é", {}, "q=%C3%A9"),
    ],
)
def test_a_query_is_written_in_the_style_of_its_parameter(
    value: Any, fields: Json, text: str
) -> None:
    assert query(value, **fields) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "/api/a/x/b"),
        ("a/b", "/api/a/a%2Fb/b"),
        ("?x=1#y", "/api/a/%3Fx%3D1%23y/b"),
        ("a;b", "/api/a/a%3Bb/b"),
        ("@evil.example", "/api/a/%40evil.example/b"),
        ("a\r\nb", "/api/a/a%0D%0Ab/b"),
        ("..a", "/api/a/..a/b"),
        ("{id}", "/api/a/%7Bid%7D/b"),
        (["a", "b/c"], "/api/a/a,b%2Fc/b"),
        (7, "/api/a/7/b"),
    ],
)
def test_a_value_stays_in_its_segment_of_the_path(value: Any, text: str) -> None:
    assert on_path(value) == text


@pytest.mark.parametrize(
    "value", ["..", ".", "../x", "a/../../x", "%2e%2e", "..%2fx", "..\\x", "x/..", "..;", "..%3bx"]
)
def test_a_value_that_leads_to_another_path_is_refused(value: str) -> None:
    with pytest.raises(ToolFailed, match="would lead to another path"):
        on_path(value)


@pytest.mark.parametrize("value", ["", None, []])
def test_a_path_without_its_value_is_refused(value: Any) -> None:
    with pytest.raises(ToolFailed, match="wants a value for 'id'"):
        on_path(value)


def test_two_values_of_one_segment_cannot_lead_out_together() -> None:
    parameters = [{"name": name, "in": "path", "required": True} for name in ("a", "b")]
    with pytest.raises(ToolFailed, match="would lead to another path"):
        built({"parameters": parameters}, {"a": ".", "b": "."}, path="/x/{a}{b}", method="get")


def test_a_header_cannot_become_two() -> None:
    operation = {"parameters": [{"name": "X-A", "in": "header", "required": True}]}
    assert built(operation, {"X-A": "a b"}).headers["X-A"] == "a b"
    for value in ("a\r\nX-B: c", "a\nb", "a\x00", ["a", "b\r"]):
        with pytest.raises(ToolFailed, match="'X-A' would hold a line break"):
            built(operation, {"X-A": value})


def test_a_cookie_cannot_become_two() -> None:
    operation = {"parameters": [{"name": "c", "in": "cookie", "required": True}]}
    headers = built(operation, {"c": "a; sid=mine\r\n"}, headers={"cookie": "sid=ours"}).headers
    assert headers["Cookie"] == "c=a%3B%20sid%3Dmine%0D%0A; sid=ours"


def test_what_is_configured_wins_over_what_the_model_says() -> None:
    operation = {
        "parameters": [
            {"name": "tenant", "in": "path", "required": True},
            {"name": "key", "in": "query"},
            {"name": "any", "in": "query", "schema": {"type": "object"}},
            {"name": "X-Key", "in": "header", "required": True},
        ],
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": {
                        "properties": {"role": {}, "name": {}},
                        "additionalProperties": True,
                    }
                }
            }
        },
    }
    inject = [
        {"name": "tenant", "in": "path", "value": "ours"},
        {"name": "key", "in": "query", "value": "ours"},
        {"name": "X-Key", "in": "header", "value": "ours"},
        {"name": "role", "in": "body", "value": 7},
    ]
    wanted = {
        "tenant": "mine",
        "key": "mine",
        "X-Key": "mine",
        "role": "mine",
        "name": "mine",
        "extra": "mine",
        "any": {"key": "mine", "KEY": "mine", "other": "mine"},
    }
    sent = built(operation, wanted, path="/{tenant}", inject=inject)
    assert sent.target == "/api/ours?other=mine&key=ours"
    assert sent.headers["X-Key"] == "ours"
    assert json.loads(sent.body or b"") == {"role": 7, "name": "mine", "extra": "mine"}


def test_a_form_is_written_as_forms_are() -> None:
    schema = {"properties": {"a": {}, "b": {"type": "array"}, "c": {"type": "object"}}}
    arguments = {"a": "x&y", "b": [1, "z"], "c": {"d": None}}

    def form(kind: str) -> Built:
        return built({"requestBody": {"content": {kind: {"schema": schema}}}}, arguments)

    sent = form("application/x-www-form-urlencoded")
    assert sent.body == b"a=x%26y&b=1&b=z&c=%7B%22d%22%3Anull%7D"
    assert sent.headers["Content-Type"] == "application/x-www-form-urlencoded"
    sent = form("multipart/form-data")
    assert sent.headers["Content-Type"] == "multipart/form-data; boundary=boundary"
    assert sent.body is not None
    assert sent.body.startswith(
        b'--boundary\r\nContent-Disposition: form-data; name="a"\r\n\r\nx&y\r\n--boundary\r\n'
    )
    assert sent.body.endswith(b'{"d":null}\r\n--boundary--\r\n')


def test_a_field_of_a_form_cannot_begin_another() -> None:
    schema = {"properties": {"a": {}}, "additionalProperties": True}
    operation = {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}
    sent = built(operation, {'x"; filename="y\r\n': "z"})
    assert b'name="x%22; filename=%22y%0D%0A"' in (sent.body or b"")
    with pytest.raises(ToolFailed, match="what stands between its fields"):
        built(operation, {"a": "\r\n--boundary--"})


@pytest.mark.parametrize("value", ["\ud800", float("nan")])
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    operation = {"parameters": [{"name": "q", "in": "query"}]}
    with pytest.raises(ToolFailed, match="cannot be sent"):
        built(operation, {"q": value})


def test_an_argument_that_there_is_not_is_named() -> None:
    with pytest.raises(ToolFailed, match="it has no 'z'; there are: q"):
        built({"parameters": [{"name": "q", "in": "query"}]}, {"z": 1})


def test_what_a_log_in_gave_is_in_the_request_once() -> None:
    sent = built({}, {}, headers={"authorization": "old", "Cookie": "sid=old; a=b"})
    other = bear(sent, Borne(header="Authorization", value="new"))
    assert {name.lower(): text for name, text in other.headers.items()}["authorization"] == "new"
    assert len(other.headers) == len(sent.headers)
    other = bear(sent, Borne(cookie="sid", value="new"))
    assert other.headers["Cookie"] == "a=b; sid=new"


def answered(body: bytes, kind: str = "application/json", status: int = 200) -> Answered:
    return Answered(status, kind, "utf-8", body, is_whole=True)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (answered(b'{"a": [1, "\\u00e9"]}'), '{"a":[1,"é"]}'),
        (answered(b"{", "application/problem+json"), "{"),
        (answered(b"<p>", "text/html"), "<p>"),
        (answered(b"x", ""), "x"),
        (answered(b"", status=204), "[HTTP 204, without a body]"),
        (answered(b"\x00" * 9, "image/png"), "[image: image/png, 9 bytes]"),
        (
            answered(b"\x00" * 9, "application/zip"),
            "[application/zip, 9 bytes, which cannot be shown as text]",
        ),
        (Answered(200, "text/plain", "no-such-charset", b"x", True), "x"),
    ],
)
def test_an_answer_is_text(given: Answered, text: str) -> None:
    assert render(given, "GET /a").text == text


def test_an_answer_that_is_no_text_is_a_part() -> None:
    image = render(answered(b"png", "image/png"), "GET /a")
    assert image.content == (Image("image/png", b"png"),)
    other = render(answered(b"zip", "application/zip"), "GET /a")
    assert other.content == (Resource("GET /a", "application/zip", b"zip"),)


def test_an_answer_that_says_no_is_told_in_part() -> None:
    with pytest.raises(ToolFailed) as caught:
        render(answered(b"x" * 10_000, "text/plain", 500), "GET /a")
    assert str(caught.value) == "HTTP 500 from GET /a: " + "x" * 2_000


def test_what_must_not_be_seen_is_what_may_be_secret_and_no_more() -> None:
    values = {
        "HOST": "shop.example",
        "URL_TOKEN": "in-the-address",
        "ID": "the-client",
        "A": "part",
    }
    service = Service.model_validate(
        {
            "spec": "https://${env:HOST}/${env:URL_TOKEN}",
            "headers": {"Accept": "application/json", "X-Key": "Bearer one-${env:A}"},
            "inject": [{"name": "a", "in": "query", "value": "two three"}],
            "auth": {
                "path": "/token",
                "body": {
                    "grant_type": "client_credentials",
                    "id": "${env:ID}",
                    "nested": [{"client_secret": "written-here"}],
                },
                "take": {"path": "token"},
            },
        }
    )
    found = secrets(service, fill(service, values.get), values.get)
    assert found == {
        *("in-the-address", "the-client", "part", "written-here"),
        *("Bearer one-part", "Bearer%20one-part", "Bearer+one-part", "one-part"),
        *("two three", "two%20three", "two+three"),
    }


def test_what_is_injected_into_a_body_wins_however_the_model_writes_its_name() -> None:
    schema = {"type": "object", "properties": {"a": {}}, "additionalProperties": True}
    operation = {"requestBody": {"content": {"application/json": {"schema": schema}}}}
    inject = [{"name": "tenant", "in": "body", "value": "north"}]
    said = {"a": 1, "TENANT": "south", "Tenant": "south", "tenant": "south", "b": 2}
    body = built(operation, said, inject=inject).body
    assert json.loads(body or b"") == {"a": 1, "b": 2, "tenant": "north"}


def test_a_secret_that_a_cut_goes_through_is_not_told_in_part() -> None:
    cut = Masker({"abcdefghijkl"}).cut
    with pytest.raises(ToolFailed) as caught:
        render(answered(b"x" * 1_990 + b"abcdefghijkl", "text/plain", 500), "GET /a", cut)
    assert str(caught.value).endswith("x[secret]")
    short = answered(b"ends with abcdef", "text/plain")
    assert render(short, "GET /a", cut).text == "ends with abcdef"
