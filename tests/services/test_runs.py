"""Agents that call the operations of a service: real gateways, and a service of our own."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ownware_gateway.errors import BootError
from ownware_gateway.outbound import Policy
from ownware_gateway.services.fetch import Fetcher, policy
from ownware_gateway.services.schema import Wrong
from tests.gateway import Gateways, get_json, post_json, run_events, start_run, until_status
from tests.mcp.test_runs import AUTO, calls, ends, offered
from tests.pictures import png
from tests.provider import Call, Provider, Reply
from tests.services.shop import PASSWORD, SESSION, Shop
from tests.sites import Names, Site, answer, moved

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

LOGIN = {
    "path": "/login",
    "body": {"password": "${env:SHOP_PASSWORD}"},
    "take": {"from": "json", "path": "data.token"},
}


async def status(http: Http, url: str) -> dict[str, Any]:
    """The one service that there is."""
    (found,) = (await get_json(http, url, "/services"))["services"]
    shown: dict[str, Any] = found
    return shown


def stored(data_dir: Path) -> bytes:
    """Every byte that the gateway keeps."""
    return b"".join(path.read_bytes() for path in data_dir.rglob("*") if path.is_file())


async def test_an_agent_calls_the_operations_of_its_profiles_service(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    tools = {"preset": "none", "services": {"shop": shop.settings(exclude=["delete*"])}}
    make_profile("assistant", tools=tools, security=AUTO)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("shop__getItem", {"id": "a/../b c"}),
        Call("shop__getItem", {"id": "x"}),
        Call("shop__getItem", {"id": "none"}),
        Call("shop__addItem", {"name": "tea", "price": 2.5}),
        Call("shop__listItems", {"tags": ["a b", "c"], "filter": {"size": "l&m"}}),
        Call("shop__picture", {}),
        Call("shop__large", {}),
        Call("shop__addItem", {"name": "tea", "colour": "green"}),
        Call("shop__getItem", {}),
        Call("shop__deleteItem", {"id": "x"}),
    )
    names = offered(provider.requests[0])
    assert {"shop__getItem", "shop__addItem", "shop__large"} <= names
    assert {"shop__deleteItem", "shop__health"} & names == set()
    assert "would lead to another path" in said[0][0]
    assert said[1] == ('{"id":"x","name":"Ünï"}', False)
    assert said[2] == (
        'The service \'shop\': HTTP 404 from GET /items/{id}: {"detail":"no such item"}',
        True,
    )
    assert json.loads(json.loads(said[3][0])["body"]) == {"name": "tea", "price": 2.5}
    listed = next(came for came in shop.came if came.method == "GET" and came.query)
    assert listed.query == [("tags", "a b"), ("tags", "c"), ("filter[size]", "l&m")]
    assert said[5] == (f"[image: image/png, {len(png())} bytes]", False)
    assert not said[6][1]
    assert "only the first 2097152 bytes of the answer were read" in said[6][0]
    assert "it has no 'colour'; there are: name, price, tags, more." in said[7][0]
    assert "id missing" in said[8][0]
    assert "There is no tool named 'shop__deleteItem'" in said[9][0]
    (item,) = (tool for tool in provider.requests[0].body["tools"] if "getItem" in str(tool))
    assert item["function"]["description"] == "Look at one item. (GET /items/{id})"


async def test_a_person_is_asked_unless_a_trusted_service_only_reads(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    services = {"good": shop.settings(trusted=True), "odd": shop.settings()}
    make_profile("assistant", tools={"preset": "none", "services": services})
    up = await start_gateway()
    ((said, is_error),) = await calls(http, up.url, provider, Call("good__getItem", {"id": "1"}))
    assert not is_error, said
    for name in ("good__addItem", "odd__getItem"):
        arguments = {"name": "tea"} if "add" in name else {"id": "2"}
        provider.reply(Reply(calls=[Call(name, arguments)]), Reply(text=["done"]))
        before = len(shop.came)
        run = await start_run(http, up.url, "go")
        waiting = await until_status(http, up.url, run, "waiting")
        assert [asked["toolName"] for asked in waiting["pendingPermissions"]] == [name]
        assert len(shop.came) == before
        await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
        ((said, is_error),) = ends(await run_events(http, up.url, run["runId"]))
        assert not is_error, said
        assert len(shop.came) == before + 1


async def test_an_answer_is_about_the_operation_and_the_address_that_were_asked_about(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
) -> None:
    make_profile("assistant", tools={"preset": "none", "services": {"s": shop.settings()}})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("s__addItem", {"name": "x"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    await until_status(http, up.url, run, "waiting")
    async with Shop() as other:
        moved_there = other.settings(spec=f"{shop.url}/openapi.json", url=other.url)
        make_profile("assistant", tools={"preset": "none", "services": {"s": moved_there}})
        await post_json(http, up.url, f"/threads/{run['threadId']}/resume", {"action": "approve"})
        ((said, is_error),) = ends(await run_events(http, up.url, run["runId"]))
        assert is_error
        assert "is not what it was when a person was asked" in said
        assert other.came == shop.came == []


async def test_what_is_injected_is_hidden_from_the_model_wins_and_is_never_seen(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secrets = {
        "SHOP_KEY": "key of the/shop+" + "1",
        "SHOP_COOKIE": "cookie-" + "monster",
        "SHOP_TOKEN": "tok-" + "of-the-shop",
        "SHOP_NAME": 'a "quoted" ' + "name",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    service = shop.settings(
        headers={"X-Token": "Bearer ${env:SHOP_TOKEN}"},
        inject=[
            {"name": "key", "in": "query", "value": "${env:SHOP_KEY}"},
            {"name": "sid", "in": "cookie", "value": "${env:SHOP_COOKIE}"},
            {"name": "name", "in": "body", "value": "${env:SHOP_NAME}"},
        ],
    )
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    said = await calls(
        http,
        up.url,
        provider,
        Call("s__listItems", {"key": "mine", "filter": {"key": "mine"}}),
        Call("s__addItem", {"name": "mine", "price": 1}),
    )
    assert not any(is_error for _, is_error in said), said
    listed, added = shop.came
    assert [value for name, value in listed.query if name == "key"] == [secrets["SHOP_KEY"]]
    assert listed.headers["X-Token"] == f"Bearer {secrets['SHOP_TOKEN']}"
    assert listed.headers["Cookie"] == f"sid={secrets['SHOP_COOKIE']}"
    assert json.loads(added.body)["name"] == secrets["SHOP_NAME"]
    tools = {tool["function"]["name"]: tool for tool in provider.requests[0].body["tools"]}
    shown = tools["s__addItem"]["function"]["parameters"]
    assert "name" not in shown["properties"]
    assert "key" not in tools["s__listItems"]["function"]["parameters"]["properties"]
    # The service says back all that it was sent.
    assert "[secret]" in said[0][0]
    assert "[secret]" in said[1][0]
    kept = (
        stored(up.data_dir)
        + json.dumps(
            [
                said,
                await get_json(http, up.url, "/services"),
                await get_json(http, up.url, "/profiles/assistant"),
                [request.body for request in provider.requests],
                caplog.text,
            ]
        ).encode()
    )
    for value in (*secrets.values(), "key%20of%20the%2Fshop%2B1", "key+of+the/shop"):
        assert value.encode() not in kept
        assert json.dumps(value)[1:-1].encode() not in kept
    assert b"${env:SHOP_KEY}" in kept


async def test_a_service_that_wants_a_log_in_gets_one_and_another_when_it_has_expired(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)
    shop.needs_login = True
    service = shop.settings(auth=LOGIN)
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    several = [Call("s__addItem", {"name": str(number)}) for number in range(5)]
    provider.reply(Reply(calls=several), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    said = ends(await run_events(http, up.url, run["runId"]))
    assert [is_error for _, is_error in said] == [False] * 5
    assert shop.logins == 1
    shop.session = "expired"
    provider.reply(Reply(calls=several), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    said += ends(await run_events(http, up.url, run["runId"]))
    assert [is_error for _, is_error in said] == [False] * 10
    assert shop.logins == 2
    assert len(shop.came) == 10
    assert "Bearer [secret]" in said[0][0]
    kept = stored(up.data_dir) + json.dumps([said, await status(http, up.url)]).encode()
    assert PASSWORD.encode() not in kept
    assert SESSION.encode() not in kept


async def test_a_log_in_that_is_refused_is_told_without_what_was_sent_and_not_made_in_a_loop(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOP_PASSWORD", "wrong-" + "password")
    service = shop.settings(auth=LOGIN)
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    item = Call("s__getItem", {"id": "1"})
    said = await calls(http, up.url, provider, item, item, item)
    assert said == [("The service 's': The log-in was refused with HTTP 403.", True)] * 3
    assert shop.logins == 1
    # One that gives what the service does not take is made twice for a call: at first, and once.
    monkeypatch.setenv("SHOP_PASSWORD", PASSWORD)
    odd = {**LOGIN, "as": {"header": "X-Other"}}
    shop.needs_login, shop.logins = True, 0
    make_profile(
        "other", tools={"preset": "none", "services": {"s": shop.settings(auth=odd)}}, security=AUTO
    )
    ((told, is_error),) = await calls(http, up.url, provider, item, profileId="other")
    assert is_error
    assert "HTTP 401 from GET /items/{id}" in told
    assert shop.logins == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spec_change": lambda spec: "nothing: to see"}, "it is no OpenAPI document"),
        ({"spec_change": lambda spec: "{"}, "is neither JSON nor YAML that can be read"),
        ({"spec_change": lambda spec: "[" * 100_000}, "is neither JSON nor YAML that can be read"),
        ({"spec_change": lambda spec: "{" + " " * 9_000_000 + "}"}, "more than 8388608 bytes"),
        ({"spec_change": lambda spec: {"swagger": "2.0"}}, "OpenAPI 2.0"),
        ({"spec_change": lambda spec: {**spec, "openapi": "4.0"}}, "it is of OpenAPI '4.0'"),
        (
            {"spec_change": lambda spec: {**spec, "servers": [{"url": "http://127.0.0.1:1"}]}},
            "it answers at another server, http://127.0.0.1:1; set its 'url'",
        ),
        (
            {"spec_change": lambda spec: {**spec, "x": {"$ref": "http://127.0.0.1:1/a.json"}}},
            "it refers to another server",
        ),
        ({"spec_status": 500}, "answered HTTP 500"),
        ({"spec_status": 302}, "answered HTTP 404"),
    ],
)
async def test_a_description_that_cannot_be_used_is_told_and_stops_nothing(
    change: dict[str, Any],
    why: str,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
) -> None:
    for name, value in change.items():
        setattr(shop, name, value)
    make_profile("assistant", tools={"preset": "none", "services": {"s": shop.settings()}})
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("s__getItem", {"id": "1"})]), Reply(text=["done"]))
    run = await start_run(http, up.url, "go")
    said = await run_events(http, up.url, run["runId"])
    assert said[-1]["status"] == "succeeded"
    (notice,) = (event for event in said if event.get("notice"))
    assert "The service 's' is not available" in notice["text"]
    assert why in notice["text"]
    ((told, _),) = ends(said)
    assert "The service 's' is not available" in told
    shown = await status(http, up.url)
    assert (shown["state"], shown["tools"]) == ("failed", [])
    assert why in shown["error"]
    assert [came for came in shop.came if came.raw_path != "/elsewhere"] == []


async def test_a_description_is_fetched_once_and_after_a_failure_not_at_once(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop.spec_status = 503
    make_profile(
        "assistant", tools={"preset": "none", "services": {"s": shop.settings()}}, security=AUTO
    )
    up = await start_gateway()
    item = Call("s__getItem", {"id": "1"})
    for _ in range(2):
        ((said, is_error),) = await calls(http, up.url, provider, item)
        assert is_error, said
    assert len(shop.spec_requests) == 1
    monkeypatch.setattr("ownware_gateway.services.keeper.RETRY_S", 0)
    shop.spec_status = 200
    registry: Any = up.engine._parts.sources[1]
    for keeper in registry._keepers.values():
        keeper._retry_at_s = 0
    for _ in range(2):
        ((said, is_error),) = await calls(http, up.url, provider, item)
        assert not is_error, said
    assert len(shop.spec_requests) == 2
    # When it is old it is asked for anew, by its tag, and nobody waits for that.
    monkeypatch.setattr("ownware_gateway.services.keeper.FRESH_S", -1)
    ((said, is_error),) = await calls(http, up.url, provider, item)
    assert not is_error
    async with asyncio.timeout(10):
        while len(shop.spec_requests) < 3:
            await asyncio.sleep(0.01)
    assert "If-None-Match" in shop.spec_requests[2].headers


async def test_slow_and_broken_calls_end_in_words_and_are_made_once(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    shop.gate = asyncio.Event()
    service = shop.settings(timeout="300ms")
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    slow, broken = await calls(http, up.url, provider, Call("s__slow", {}), Call("s__break", {}))
    assert slow == (
        "The service 's': POST /slow failed: 127.0.0.1 took longer than 0.3 s. "
        "It may have had its effect, in whole or in part.",
        True,
    )
    assert "PUT /break failed: 127.0.0.1 broke off the connection. It may have had" in broken[0]
    assert [came.raw_path for came in shop.came] == ["/slow", "/break"]


async def test_a_redirect_takes_nothing_along_that_is_configured_and_leads_into_no_private_network(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
) -> None:
    service = shop.settings(headers={"X-Key": "for the shop alone"})
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    async with Site() as other:
        other.pages["/"] = answer("reached")
        said = await calls(
            http,
            up.url,
            provider,
            Call("s__away", {"to": f"{other.url}/"}),
            Call("s__away", {"to": "http://169.254.169.254/latest/"}),
            Call("s__away", {"to": f"{shop.url}/items"}),
        )
        assert other.visits == []
    assert [is_error for _, is_error in said] == [True, True, False]
    assert "redirects to where no request may go" in said[0][0]
    assert shop.came[-1].headers["X-Key"] == "for the shop alone"


async def test_a_redirect_to_another_server_takes_nothing_along_that_is_configured(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
) -> None:
    async with Site() as other:
        other.pages["/"] = answer("reached")
        other.pages["/login"] = answer(X_Session="a-session-of-its-own")
        service = shop.settings(
            headers={"X-Key": "for the shop alone"},
            inject=[{"name": "sid", "in": "cookie", "value": "only-for-the-shop"}],
            auth={
                "url": f"{other.url}/login",
                "take": {"from": "header", "name": "X-Session"},
                "as": {"cookie": "session"},
            },
        )
        services = {"preset": "none", "services": {"s": service}}
        make_profile("assistant", tools=services, security=AUTO)
        up = await start_gateway()
        away = Call("s__away", {"to": f"{other.url}/"})
        assert await calls(http, up.url, provider, away) == [("reached", False)]
        assert shop.came[0].headers["X-Key"] == "for the shop alone"
        sent = shop.came[0].headers["Cookie"]
        assert sent == "sid=only-for-the-shop; session=a-session-of-its-own"
        reached = other.visits[-1]
        assert reached.line == "GET / HTTP/1.1"
        assert {"X-Key", "Cookie"} & set(reached.headers) == set()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "or in a private network wants 'allowPrivate'"),
        ({"allowPrivate": True, "spec": "http://169.254.169.254/a.json"}, "not a public address"),
        ({"allowPrivate": True, "spec": "http://[fe80::1]/a.json"}, "not a public address"),
        ({"allowPrivate": True, "spec": "http://[::ffff:169.254.169.254]/"}, "not a public"),
    ],
)
async def test_private_addresses_are_closed_unless_opened_and_those_of_metadata_always(
    fields: dict[str, Any],
    why: str,
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
) -> None:
    service = {"spec": f"{shop.url}/openapi.json", **fields}
    make_profile("assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO)
    up = await start_gateway()
    provider.reply(Reply(text=["done"]))
    await run_events(http, up.url, (await start_run(http, up.url, "go"))["runId"])
    assert why in (await status(http, up.url))["error"]
    assert shop.spec_requests == []


async def test_the_gateways_services_are_for_profiles_that_name_them_or_have_every_tool(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: MakeProfile,
    shop: Shop,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    (folder / "shop.json").write_text(json.dumps(shop.document()))
    one = shop.settings(spec="shop.json", url=shop.url, description="Our shop.")
    (folder / "services.json").write_text(json.dumps({"services": {"one": one}}))
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"services": {"two": shop.settings()}}))
    make_profile("full", tools={"preset": "full", "deny": ["two__*", "one__slow"]}, security=AUTO)
    make_profile("named", tools={"preset": "none", "allow": ["two__getItem"]}, security=AUTO)
    make_profile("none", tools={"preset": "coding"}, security=AUTO)
    make_profile("wrong", tools={"preset": "none", "deny": ["three__*"]})
    up = await start_gateway(services_config=str(more))
    (broken,) = up.profiles.broken()
    assert "no MCP server or service is named 'three'" in broken.message
    has = {}
    for profile in ("full", "named", "none"):
        await calls(http, up.url, provider, Call("one__getItem", {"id": "1"}), profileId=profile)
        has[profile] = {name for name in offered(provider.requests[-1]) if "__" in name}
    assert "one__getItem" in has["full"]
    assert {"one__slow", "two__getItem"} & has["full"] == set()
    assert has["named"] == {"two__getItem"}
    assert has["none"] == set()
    shown = {item["id"]: item for item in (await get_json(http, up.url, "/services"))["services"]}
    assert shown["one"]["description"] == "Our shop."
    assert (shown["one"]["state"], shown["one"]["source"]) == ("ready", "config")
    assert shown["one"]["url"] == shop.url
    listed = {tool["name"]: tool for tool in shown["one"]["tools"]}
    assert listed["one__getItem"]["path"] == "/items/{id}"
    assert listed["one__getItem"]["method"] == "GET"


async def test_one_name_is_not_a_servers_and_a_services_at_once(
    start_gateway: Gateways, make_profile: MakeProfile, shop: Shop, tmp_path: Path
) -> None:
    both = {"mcp": {"x": {"command": "true"}}, "services": {"x": shop.settings()}}
    make_profile("twice", tools=both)
    up = await start_gateway()
    (broken,) = up.profiles.broken()
    assert "'tools.mcp' and 'tools.services' both have 'x'" in broken.message
    await start_gateway.stop(up)
    for name, field in (("mcp.json", "mcpServers"), ("services.json", "services")):
        item = {"command": "true"} if field == "mcpServers" else shop.settings()
        (tmp_path / "data" / name).write_text(json.dumps({field: {"x": item}}))
    with pytest.raises(BootError, match="are both named 'x'"):
        await start_gateway()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON at line 1"),
        ('{"services": {"a": {}}}', "The field 'services.a.spec' is required"),
        ('{"service": {}}', "There is no field 'service'; did you mean 'services'"),
        (
            '{"services": {"a": {"spec": "a", "inject": [{"name": "a", "in": "header",'
            ' "value": ["hidden"]}]}}}',
            "The field 'services.a.inject.0.value",
        ),
    ],
)
async def test_a_file_of_services_that_is_wrong_stops_the_start(
    text: str, why: str, start_gateway: Gateways, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "services.json").write_text(text)
    with pytest.raises(BootError) as caught:
        await start_gateway()
    assert why in str(caught.value)
    assert "hidden" not in str(caught.value)


async def test_a_description_in_the_profiles_folder_may_have_parts_beside_it(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    service = shop.settings(spec="api/root.yaml", url=shop.url)
    folder = make_profile(
        "assistant", tools={"preset": "none", "services": {"s": service}}, security=AUTO
    )
    (folder / "api" / "parts").mkdir(parents=True)
    (folder / "api" / "root.yaml").write_text(
        "openapi: 3.0.3\npaths:\n  /items/{id}:\n    $ref: 'parts/paths.yaml#/item'\n"
    )
    (folder / "api" / "parts" / "paths.yaml").write_text(
        "item:\n  get:\n    operationId: getItem\n    parameters:\n      - name: id\n"
        "        in: path\n        required: true\n        schema: {type: string,"
        " example: 2020-01-01}\n"
    )
    up = await start_gateway()
    item = Call("s__getItem", {"id": "1"})
    assert await calls(http, up.url, provider, item) == [('{"id":"1","name":"Ünï"}', False)]
    # It is read again when it changes.
    (folder / "api" / "root.yaml").write_text(
        "openapi: 3.0.3\npaths:\n  /a:\n    $ref: '../agent.json'\n"
    )
    await calls(http, up.url, provider, item)
    shown = await status(http, up.url)
    assert "it refers to what does not lie beside it" in shown["error"]


async def test_what_is_configured_goes_to_no_other_server_that_has_the_description(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    async with Site() as other:
        other.pages["/openapi.json"] = answer(json.dumps(shop.document()), "application/json")
        elsewhere = shop.settings(
            spec=f"{other.url}/openapi.json", url=shop.url, headers={"X-Key": "for the shop alone"}
        )
        services = {"a": elsewhere, "b": shop.settings(headers={"X-Key": "for the shop alone"})}
        make_profile("assistant", tools={"preset": "none", "services": services}, security=AUTO)
        up = await start_gateway()
        ((said, is_error),) = await calls(http, up.url, provider, Call("a__getItem", {"id": "1"}))
        assert not is_error, said
        assert ["X-Key" in visit.headers for visit in other.visits] == [False]
    assert ["X-Key" in came.headers for came in shop.spec_requests] == [True]
    assert shop.came[0].headers["X-Key"] == "for the shop alone"


async def test_what_is_configured_does_not_follow_a_description_that_has_moved() -> None:
    async with Site() as site, Site() as other:
        site.pages["/openapi.json"] = moved(f"{other.url}/openapi.json")
        parameter = {"$ref": "parts.json"}
        paths = {"/a": {"get": {"operationId": "a", "parameters": [parameter]}}}
        document = {"openapi": "3.1.0", "paths": paths}
        other.pages["/openapi.json"] = answer(json.dumps(document), "application/json")
        other.pages["/parts.json"] = answer('{"name": "q", "in": "query"}', "application/json")
        hosts = frozenset((url.host, url.port) for url in (site, other))
        headers = {"X-Key": "for the shop alone"}
        fetcher = Fetcher(
            Policy(ports=frozenset({site.port, other.port}), hosts=hosts), None, headers
        )
        found = await fetcher.documents(f"{site.url}/openapi.json", None)
        assert len(found.by_uri) == 2
    assert ["X-Key" in visit.headers for visit in site.visits] == [True]
    assert ["X-Key" in visit.headers for visit in other.visits] == [False, False]


async def test_an_added_server_does_not_take_the_name_of_a_service(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile, shop: Shop, tmp_path: Path
) -> None:
    make_profile("assistant")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "services.json").write_text(
        json.dumps({"services": {"x": shop.settings()}})
    )
    up = await start_gateway(mcp_add=True)
    code, said = await post_json(http, up.url, "/mcp/servers", {"name": "x", "command": "true"})
    assert (code, said["error"]) == (409, "server_exists")


async def test_arguments_that_are_nested_without_end_cost_the_call_and_not_the_run(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, shop: Shop
) -> None:
    tools = {"preset": "none", "services": {"s": shop.settings()}}
    make_profile("assistant", tools=tools, security=AUTO)
    up = await start_gateway()
    deep = [Call("s__addItem", '{"name": ' + "[" * count + "]" * count + "}") for count in (300, 9)]
    first, second = await calls(http, up.url, provider, *deep)
    assert first == ("The arguments of s__addItem are nested more than 64 deep.", True)
    assert not second[1], second


@pytest.mark.parametrize(
    ("private", "leads_to", "reached"),
    [
        (False, "127.0.0.1", False),
        (True, "127.0.0.1", True),
        (True, "169.254.169.254", False),
        (True, "100.100.100.200", False),
    ],
)
async def test_a_name_is_only_as_good_as_where_it_leads(
    private: bool, leads_to: str, reached: bool, shop: Shop
) -> None:
    url = shop.url.replace("127.0.0.1", "shop.example") + "/openapi.json"
    fetcher = Fetcher(policy([url], private=private), Names(shop_example=[[leads_to]]), {})
    if reached:
        assert (await fetcher.documents(url, None)).root == url
        return
    with pytest.raises(Wrong, match="is not a public address"):
        await fetcher.documents(url, None)
