import asyncio
import base64
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, make_mocked_request
from aiohttp.typedefs import Handler

from ownware_gateway import auth
from ownware_gateway.auth import (
    CALLER,
    LIMITED,
    Access,
    decide,
    is_loopback,
    protect,
    redact,
    serves,
)
from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.settings import Settings

TOKEN = "t0ken-" + "x" * 37
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LOCAL = Access(exposed=False, token_required=False)
LOCAL_TOKEN = Access(exposed=False, token_required=True, token=TOKEN)
PROXIED = replace(LOCAL_TOKEN, behind_proxy=True)
EXPOSED = Access(exposed=True, token_required=True, token=TOKEN)

Client = TestClient[web.Request, web.Application]
Start = Callable[[Access], Awaitable[Client]]


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GatewayError as error:
        retry = {} if error.retry_after_s is None else {"Retry-After": f"{error.retry_after_s:.0f}"}
        return web.json_response({"error": error.code}, status=error.status, headers=retry)


async def who(request: web.Request) -> web.Response:
    return web.json_response({"caller": request[CALLER], "limited": request.get(LIMITED)})


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b": hello\n\n")
    return response


def application(access: Access, clock: Callable[[], float] = time.time) -> web.Application:
    app = web.Application(middlewares=[errors])
    protect(app, access, clock)
    app.router.add_route("*", "/api/v1/health", who)
    app.router.add_route("*", "/health", who)
    app.router.add_post("/api/v1/run", who)
    app.router.add_get("/api/v1/threads/t/agents/root/events", who)
    app.router.add_get("/api/v1/stream/events", stream)
    app.router.add_route("*", "/api/v1/threads", who)
    app.router.add_get("/{any:.*}", who)
    return app


@pytest.fixture
def start(aiohttp_client: Any) -> Start:
    async def run(access: Access) -> Client:
        client: Client = await aiohttp_client(application(access))
        return client

    return run


async def raw(client: Client, head: str) -> int:
    """Send a request that no client library would, and return the status of the answer."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
        line = await reader.readline()
        return int(line.split()[1])
    finally:
        writer.close()
        await writer.wait_closed()


async def refused(response: Any) -> tuple[int, str]:
    return response.status, (await response.json())["error"]


# --- which binds are open ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.255.0.9",
        "::1",
        "[::1]",
        "::1%lo",
        "0:0:0:0:0:0:0:1",
        "::ffff:127.0.0.1",
        "[::ffff:127.0.0.2]",
        "localhost",
        "LocalHost",
        "localhost.",
        "127.1",
    ],
)
def test_only_this_machine_reaches_a_loopback_host(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "[]",
        "0.0.0.0",
        "0",
        "::",
        "[::]",
        "::ffff:0.0.0.0",
        "::ffff:10.0.0.1",
        "10.0.0.1",
        "192.168.1.7",
        "fe80::1%eth0",
        "no-such-host.invalid",
        "localhost.example.invalid",
        "127.0.0.1:3011",
        "a..b",
        "a" * 300,
        "\0",
    ],
)
def test_everything_else_counts_as_exposed(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("addresses", "loopback"),
    [
        (["127.0.0.1"], True),
        (["127.0.0.1", "::1"], True),
        (["127.0.0.1", "10.0.0.1"], False),
        (["::1", "fe80::1%2"], False),
        ([], False),
    ],
)
def test_a_name_is_loopback_only_if_all_it_resolves_to_is(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], loopback: bool
) -> None:
    def resolve(host: str, port: None, **options: Any) -> list[Any]:
        assert host == "my-machine"
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    assert is_loopback("my-machine") is loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_loopback_bind_needs_no_token(host: str) -> None:
    access = decide(Settings(host=host))
    assert not access.exposed
    assert not access.token_required
    assert not access.limited
    assert access.warning is None


def test_a_loopback_bind_can_ask_for_the_token() -> None:
    access = decide(Settings(require_auth=True), TOKEN)
    assert access.token_required
    assert not access.exposed
    assert not access.limited


def test_behind_a_proxy_the_token_is_always_on_and_callers_are_limited() -> None:
    access = decide(Settings(behind_proxy=True), TOKEN)
    assert access.token_required
    assert access.limited
    assert access.warning is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "no-such-host.invalid", ""])
def test_an_exposed_bind_needs_the_token_and_warns_about_plain_http(host: str) -> None:
    access = decide(Settings(host=host), TOKEN)
    assert access.exposed
    assert access.token_required
    assert access.limited
    assert access.warning is not None
    assert "plain HTTP" in access.warning


@pytest.mark.parametrize(
    "settings",
    [Settings(host="0.0.0.0"), Settings(behind_proxy=True), Settings(require_auth=True)],
)
def test_a_bind_that_needs_a_token_and_has_none_does_not_start(settings: Settings) -> None:
    with pytest.raises(BootError, match="needs a token with these settings, and has none"):
        decide(settings)


@pytest.mark.parametrize("origin", ["*", "null", "app.example.com", "https://a.example/path", ""])
def test_an_origin_that_is_not_one_does_not_start(origin: str) -> None:
    with pytest.raises(BootError, match="--cors-origin"):
        decide(Settings(cors_origin=(origin,)))


@pytest.mark.parametrize("name", ["https://a.example", "a b", "", "a.example/x", "*.example"])
def test_a_served_name_that_is_not_one_does_not_start(name: str) -> None:
    with pytest.raises(BootError, match="--served-name"):
        decide(Settings(served_name=(name,)))


def test_the_bind_host_is_a_served_name() -> None:
    access = decide(Settings(host="Box.Lan.Invalid."), TOKEN)
    assert serves(access, "box.lan.invalid:3011")


def test_the_token_is_not_in_what_is_printed_of_the_access() -> None:
    assert TOKEN not in repr(EXPOSED)


# --- host ----------------------------------------------------------------------------------------

GOOD_HOSTS = [
    "localhost",
    "localhost:3011",
    "LOCALHOST.",
    "localhost.:3011",
    "localhost:",
    "app.localhost",
    "a.b.localhost:1",
    "127.0.0.1",
    "10.1.2.3:65535",
    "[::1]",
    "[::1]:3011",
    "[FE80::1%25eth0]:3011",
    "agents.example.com",
    "Agents.Example.COM.:3011",
]
BAD_HOSTS = [
    "evil.example",
    "localhost.evil.example",
    "evillocalhost",
    ".localhost.evil",
    "sub.agents.example.com",
    "127.0.0.1.evil.example",
    "127.1",
    "localhost:abc",
    "localhost:65536",
    "localhost:1:2",
    "user@localhost",
    "localhost/x",
    "localhost, evil.example",
    "localhost evil.example",
    "[::1",
    "::1",
    "[localhost]",
    "[]",
    ":3011",
    ".",
]


@pytest.mark.parametrize("host", GOOD_HOSTS)
async def test_a_served_host_is_answered(start: Start, host: str) -> None:
    access = decide(Settings(served_name=("agents.EXAMPLE.com.:3011",)))
    client = await start(access)
    assert (await client.get("/api/v1/threads", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
async def test_a_host_that_is_not_served_is_refused_on_loopback_too(
    start: Start, host: str
) -> None:
    access = decide(Settings(served_name=("agents.example.com",)))
    client = await start(access)
    response = await client.get("/api/v1/health", headers={"Host": host})
    assert await refused(response) == (403, "forbidden_host")


async def test_an_exposed_bind_guards_its_host_as_well(start: Start) -> None:
    client = await start(EXPOSED)
    response = await client.get("/api/v1/threads", headers={"Host": "evil.example"} | BEARER)
    assert await refused(response) == (403, "forbidden_host")


async def test_a_missing_empty_or_repeated_host_is_refused(start: Start) -> None:
    client = await start(LOCAL)
    assert await raw(client, "GET /api/v1/threads HTTP/1.0") == 403
    assert await raw(client, "GET /api/v1/threads HTTP/1.1\nHost:") == 403
    # With two of them, or none in HTTP/1.1, the parser does not even let the request in.
    assert await raw(client, "GET / HTTP/1.1\nHost: localhost\nHost: localhost") == 400
    assert await raw(client, "GET /api/v1/threads HTTP/1.1") == 400


async def test_the_host_of_an_absolute_target_must_be_served_too(start: Start) -> None:
    client = await start(LOCAL)
    line = "GET http://{}/api/v1/threads HTTP/1.1\nHost: {}"
    assert await raw(client, line.format("localhost", "localhost")) == 200
    assert await raw(client, line.format("evil.example", "localhost")) == 403
    assert await raw(client, line.format("localhost", "evil.example")) == 403


# --- proxy ---------------------------------------------------------------------------------------

PROXY_HEADERS = [
    {"Forwarded": "for=10.0.0.1"},
    {"X-Forwarded-For": "10.0.0.1"},
    {"x-forwarded-proto": "https"},
    {"X-FORWARDED-ANYTHING": "1"},
    {"Via": "1.1 proxy"},
]


@pytest.mark.parametrize("headers", PROXY_HEADERS)
async def test_a_proxy_in_front_of_an_open_gateway_is_refused(
    start: Start, headers: dict[str, str]
) -> None:
    client = await start(LOCAL)
    response = await client.get("/api/v1/threads", headers=headers)
    assert await refused(response) == (403, "forbidden_proxy")


async def test_a_loopback_gateway_refuses_a_proxy_even_with_the_token(start: Start) -> None:
    client = await start(LOCAL_TOKEN)
    response = await client.get("/api/v1/threads", headers={"Via": "1.1 p"} | BEARER)
    assert await refused(response) == (403, "forbidden_proxy")


@pytest.mark.parametrize("access", [PROXIED, EXPOSED])
@pytest.mark.parametrize("headers", PROXY_HEADERS)
async def test_a_proxy_is_served_where_one_is_expected_or_the_token_is_on(
    start: Start, access: Access, headers: dict[str, str]
) -> None:
    client = await start(access)
    assert (await client.get("/api/v1/threads", headers=headers | BEARER)).status == 200
    assert (await client.get("/api/v1/threads", headers=headers)).status == 401


# --- origin --------------------------------------------------------------------------------------

LISTED = decide(Settings(cors_origin=("https://App.Example.com", "app://notes/")))
FOREIGN = [
    "https://evil.example",
    "http://app.example.com",
    "https://app.example.com:8443",
    "https://app.example.com.evil.example",
    "http://localhost.evil.example",
    "http://evillocalhost",
    "file://localhost",
    "null",
    "",
    "garbage",
    "http://10.0.0.1",
]
FRIENDLY = [
    "https://app.example.com",
    "https://app.example.com:443",
    "HTTPS://APP.example.com",
    "app://notes",
    "http://localhost:5173",
    "https://localhost",
    "http://ui.localhost:1",
    "http://127.0.0.1:8000",
    "http://127.9.9.9",
    "http://[::1]:8000",
]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_foreign_page_changes_nothing(start: Start, method: str, origin: str) -> None:
    client = await start(LISTED)
    response = await client.request(method, "/api/v1/threads", headers={"Origin": origin})
    assert await refused(response) == (403, "forbidden_origin")
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("origin", FOREIGN)
async def test_a_foreign_page_gets_an_answer_that_its_browser_will_not_show(
    start: Start, origin: str
) -> None:
    client = await start(LISTED)
    response = await client.get("/api/v1/threads", headers={"Origin": origin})
    assert response.status == 200
    assert not [name for name in response.headers if name.startswith("Access-Control-")]
    assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", FRIENDLY)
async def test_a_listed_or_loopback_page_may_change_things_and_read_the_answer(
    start: Start, origin: str
) -> None:
    client = await start(LISTED)
    response = await client.post("/api/v1/threads", headers={"Origin": origin})
    assert response.status == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert response.headers["Access-Control-Expose-Headers"] == (
        "X-Ownware-Correlation-Id, Location, Idempotency-Replayed, Retry-After, X-Run-Id, "
        "X-Conversation-Id"
    )
    assert "Access-Control-Allow-Credentials" not in response.headers


async def test_no_origin_at_all_is_no_foreign_one(start: Start) -> None:
    client = await start(LOCAL)
    assert (await client.post("/api/v1/threads")).status == 200


async def test_two_origins_are_foreign(start: Start) -> None:
    client = await start(LOCAL)
    head = "POST /api/v1/threads HTTP/1.1\nHost: localhost\nContent-Length: 0\n"
    assert await raw(client, head + "Origin: http://localhost") == 200
    assert await raw(client, head + "Origin: http://localhost\nOrigin: http://localhost") == 403


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("10.0.0.7:3011", "http://10.0.0.7:3011", 200),
        ("10.0.0.7", "http://10.0.0.7", 200),
        ("10.0.0.7:80", "http://10.0.0.7", 200),
        ("10.0.0.7", "http://10.0.0.7:80", 200),
        ("10.0.0.7:3011", "http://10.0.0.7", 403),
        ("10.0.0.7:3011", "https://10.0.0.7:3011", 403),
        ("10.0.0.7:3011", "http://10.0.0.8:3011", 403),
    ],
)
async def test_the_gateways_own_page_is_not_foreign(
    start: Start, host: str, origin: str, status: int
) -> None:
    client = await start(LOCAL)
    headers = {"Host": host, "Origin": origin}
    assert (await client.post("/api/v1/threads", headers=headers)).status == status


async def test_behind_a_proxy_that_ends_tls_the_own_page_is_https(start: Start) -> None:
    client = await start(replace(PROXIED, served_names=frozenset({"agents.example.com"})))
    headers = {"Host": "agents.example.com", "Origin": "https://agents.example.com"} | BEARER
    assert (await client.post("/api/v1/threads", headers=headers)).status == 200


async def test_a_preflight_needs_no_token_and_says_what_is_allowed(start: Start) -> None:
    client = await start(replace(LISTED, token_required=True, token=TOKEN))
    headers = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    response = await client.options("/api/v1/run", headers=headers)
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert response.headers["Access-Control-Allow-Headers"] == (
        "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-API-Key, "
        "X-Conversation-Id, X-OpenWebUI-Chat-Id"
    )
    assert {"GET", "POST", "PATCH", "DELETE"} <= set(
        response.headers["Access-Control-Allow-Methods"].split(", ")
    )
    assert response.headers["Vary"] == "Origin"


async def test_a_preflight_from_a_foreign_page_is_answered_and_allows_nothing(
    start: Start,
) -> None:
    client = await start(LISTED)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = await client.options("/api/v1/run", headers=headers)
    assert response.status == 204
    assert not [name for name in response.headers if name.startswith("Access-Control-")]


async def test_a_streamed_answer_has_the_headers_of_its_origin(start: Start) -> None:
    client = await start(LISTED)
    response = await client.get("/api/v1/stream/events", headers={"Origin": FRIENDLY[0]})
    assert await response.read() == b": hello\n\n"
    assert response.headers["Access-Control-Allow-Origin"] == FRIENDLY[0]


async def test_a_page_can_read_why_it_was_refused(start: Start) -> None:
    client = await start(replace(LISTED, token_required=True, token=TOKEN))
    response = await client.get("/api/v1/threads", headers={"Origin": FRIENDLY[0]})
    assert await refused(response) == (401, "unauthorized")
    assert response.headers["Access-Control-Allow-Origin"] == FRIENDLY[0]


async def test_what_an_answer_varies_on_already_is_kept(aiohttp_client: Any) -> None:
    async def varied(request: web.Request) -> web.Response:
        return web.Response(headers={"Vary": "Accept"})

    app = web.Application()
    protect(app, LOCAL, time.time)
    app.router.add_get("/", varied)
    client = await aiohttp_client(app)
    assert (await client.get("/")).headers["Vary"] == "Accept, Origin"


# --- token ---------------------------------------------------------------------------------------


async def test_an_open_gateway_asks_nobody_for_a_token(start: Start) -> None:
    client = await start(LOCAL)
    wrong = {"Authorization": "Bearer wrong"}
    for headers in ({}, wrong, BEARER):
        response = await client.get("/api/v1/threads", headers=headers)
        assert (await response.json())["caller"] == "local"


@pytest.mark.parametrize("access", [LOCAL_TOKEN, PROXIED, EXPOSED])
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {TOKEN}"},
        {"authorization": f"bearer {TOKEN}"},
        {"Authorization": f"BEARER   {TOKEN} "},
        {"X-API-Key": TOKEN},
        {"X-API-Key": TOKEN, "Authorization": "Basic " + base64.b64encode(b"u:p").decode()},
        {"X-API-Key": TOKEN, "Authorization": "Bearer wrong"},
    ],
)
async def test_the_token_opens_the_door(
    start: Start, access: Access, headers: dict[str, str]
) -> None:
    client = await start(access)
    response = await client.get("/api/v1/threads", headers=headers)
    assert response.status == 200
    assert (await response.json())["caller"] == "token"


@pytest.mark.parametrize("access", [LOCAL_TOKEN, PROXIED, EXPOSED])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN.upper()}"},
        {"Authorization": "Bearer пароль-\N{KEY}"},
        {"X-API-Key": ""},
        {"X-API-Key": f"Bearer {TOKEN}"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
async def test_anything_else_does_not(
    start: Start, access: Access, headers: dict[str, str]
) -> None:
    client = await start(access)
    response = await client.get("/api/v1/threads", headers=headers)
    assert await refused(response) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_a_token_that_is_not_text_is_wrong_and_crashes_nothing(start: Start) -> None:
    client = await start(LOCAL_TOKEN)
    head = "GET /api/v1/threads HTTP/1.1\nHost: localhost\nAuthorization: Bearer "
    assert await raw(client, head + TOKEN) == 200
    assert await raw(client, head + "\xff\xfe\x80") == 401
    path = "/api/v1/threads/t/agents/root/events?token=%ff%ed%a0%80"
    assert await raw(client, f"GET {path} HTTP/1.1\nHost: localhost") == 401


async def test_an_unknown_path_is_not_told_from_a_known_one_without_the_token(
    start: Start,
) -> None:
    client = await start(LOCAL_TOKEN)
    assert (await client.post("/no/such/path")).status == 401


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_never_needs_a_token(start: Start, path: str) -> None:
    client = await start(EXPOSED)
    response = await client.get(path)
    assert (await response.json())["caller"] == "anonymous"
    response = await client.get(path, headers=BEARER)
    assert (await response.json())["caller"] == "token"


@pytest.mark.parametrize(
    "path", ["/api/v1/health/", "/api/v1%2Fhealth", "/api/v1/health/x", "/x/health", "//health"]
)
async def test_what_only_looks_like_health_needs_the_token(start: Start, path: str) -> None:
    client = await start(LOCAL_TOKEN)
    assert await raw(client, f"GET {path} HTTP/1.1\nHost: localhost") == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/threads/t/agents/root/events", 200),
        ("HEAD", "/api/v1/threads/t/agents/root/events", 401),
        ("GET", "/api/v1/threads", 401),
        ("GET", "/api/v1/events/history", 401),
        ("GET", "/api/v1/events%2F", 401),
        ("POST", "/api/v1/run", 401),
    ],
)
async def test_the_token_may_stand_in_the_address_of_an_event_stream_only(
    start: Start, method: str, path: str, status: int
) -> None:
    client = await start(EXPOSED)
    assert (await client.request(method, f"{path}?since=0&token={TOKEN}")).status == status


async def test_a_wrong_token_in_the_address_is_refused(start: Start) -> None:
    client = await start(EXPOSED)
    path = "/api/v1/threads/t/agents/root/events"
    for query in ("", "?token=", "?token=wrong", f"?Token={TOKEN}", f"?x={TOKEN}"):
        assert (await client.get(path + query)).status == 401


async def test_tokens_are_compared_in_constant_time_and_as_bytes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", record)
    client = await start(LOCAL_TOKEN)
    headers = {"X-API-Key": "wrong"} | BEARER
    assert (await client.get("/api/v1/threads", headers=headers)).status == 200
    assert compared == [(b"wrong", TOKEN.encode()), (TOKEN.encode(), TOKEN.encode())]


# --- limits --------------------------------------------------------------------------------------

STRICT = replace(EXPOSED, rate_limit_run=2, rate_limit_general=3)


async def test_runs_and_other_requests_are_counted_apart(start: Start) -> None:
    client = await start(STRICT)
    runs = [(await client.post("/api/v1/run", headers=BEARER)).status for _ in range(3)]
    others = [(await client.get("/api/v1/threads", headers=BEARER)).status for _ in range(4)]
    assert runs == [200, 200, 429]
    assert others == [200, 200, 200, 429]


async def test_over_the_limit_a_caller_is_told_when_to_come_back(start: Start) -> None:
    client = await start(replace(STRICT, rate_limit_general=1))
    assert (await client.get("/api/v1/threads", headers=BEARER)).status == 200
    response = await client.get("/api/v1/threads", headers=BEARER)
    assert await refused(response) == (429, "rate_limited")
    assert 50 <= int(response.headers["Retry-After"]) <= 60


async def test_a_get_of_run_is_no_run(start: Start) -> None:
    client = await start(STRICT)
    statuses = [(await client.get("/api/v1/run", headers=BEARER)).status for _ in range(3)]
    assert statuses == [200, 200, 200]


async def test_guessing_tokens_is_limited_too(start: Start) -> None:
    client = await start(STRICT)
    wrong = {"Authorization": "Bearer wrong"}
    statuses = [(await client.get("/api/v1/threads", headers=wrong)).status for _ in range(4)]
    assert statuses == [401, 401, 401, 429]


@pytest.mark.parametrize("access", [LOCAL, LOCAL_TOKEN])
async def test_on_loopback_nobody_is_limited(start: Start, access: Access) -> None:
    client = await start(replace(access, rate_limit_run=1, rate_limit_general=1))
    for _ in range(3):
        assert (await client.post("/api/v1/run", headers=BEARER)).status == 200
        assert (await client.get("/api/v1/threads", headers=BEARER)).status == 200


async def test_behind_a_proxy_strangers_do_not_use_up_the_limit_of_the_token(
    start: Start,
) -> None:
    client = await start(replace(PROXIED, rate_limit_general=2))
    strangers = [(await client.get("/api/v1/threads")).status for _ in range(3)]
    friends = [(await client.get("/api/v1/threads", headers=BEARER)).status for _ in range(3)]
    assert strangers == [401, 401, 429]
    assert friends == [200, 200, 429]


@pytest.mark.parametrize(
    ("path", "accept"),
    [("/api/v1/threads/t/agents/root/events", "*/*"), ("/other/stream", "text/event-stream")],
)
async def test_an_event_source_that_comes_back_is_left_to_the_door(
    start: Start, path: str, accept: str
) -> None:
    client = await start(replace(EXPOSED, rate_limit_general=1))
    headers = {"Accept": accept, "Last-Event-ID": "e.7"} | BEARER
    first = await client.get(path, headers=headers)
    assert (await first.json())["limited"] is None
    again = await client.get(path, headers=headers)
    assert again.status == 200
    assert 50 <= (await again.json())["limited"] <= 60


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": "text/event-stream"} | BEARER,
        {"Accept": "text/event-stream", "Last-Event-ID": "e.7"},
        {"Accept": "text/event-stream", "Last-Event-ID": "e.7", "X-API-Key": "wrong"},
    ],
)
async def test_a_first_request_and_a_stranger_are_refused_as_ever(
    start: Start, headers: dict[str, str]
) -> None:
    client = await start(replace(EXPOSED, rate_limit_general=1))
    path = "/api/v1/threads/t/agents/root/events"
    assert (await client.get(path, headers=headers)).status in (200, 401)
    assert await refused(await client.get(path, headers=headers)) == (429, "rate_limited")


def limits(access: Access, clock: Callable[[], float] = time.time) -> Callable[[str], Any]:
    counted = auth._Limits(access, clock)

    async def hit(remote: str) -> bool:
        request = make_mocked_request("GET", "/api/v1/threads").clone(remote=remote)
        return await counted.hit(request) is None

    return hit


async def test_each_address_has_a_limit_of_its_own() -> None:
    hit = limits(replace(EXPOSED, rate_limit_general=1))
    assert await hit("10.0.0.1")
    assert await hit("10.0.0.2")
    assert not await hit("10.0.0.1")
    assert not await hit("::ffff:10.0.0.2")


async def test_a_whole_ipv6_network_is_one_caller() -> None:
    hit = limits(replace(EXPOSED, rate_limit_general=1))
    assert await hit("2001:db8::1")
    assert not await hit("2001:db8::ffff")
    assert await hit("2001:db8:0:1::1")


async def test_callers_beyond_the_bound_share_one_limit_until_somebody_was_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "CALLERS_MAX", 2)
    now = time.time()
    hit = limits(replace(EXPOSED, rate_limit_general=1), lambda: now)
    assert await hit("10.0.0.1")
    assert await hit("10.0.0.2")
    assert await hit("10.0.0.3")
    assert not await hit("10.0.0.4")
    assert not await hit("10.0.0.1")
    now += 61
    assert await hit("10.0.0.5")
    assert not await hit("10.0.0.5")


# --- logs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "logged"),
    [
        ("/x/events", "/x/events"),
        ("/x/events?since=3", "/x/events?since=3"),
        (f"/x/events?token={TOKEN}", "/x/events?token=[secret]"),
        (f"/x?since=3&token={TOKEN}&follow=0", "/x?since=3&token=[secret]&follow=0"),
        (f"/x?token={TOKEN}&token={TOKEN}", "/x?token=[secret]&token=[secret]"),
        (f"/x?%74oken={TOKEN}", "/x?%74oken=[secret]"),
        (f"/x?TOKEN={TOKEN};api_key={TOKEN}", "/x?TOKEN=[secret];api_key=[secret]"),
        (f"/x?token={TOKEN}?token={TOKEN}", "/x?token=[secret]"),
        (f"/x?token={TOKEN}=", "/x?token=[secret]"),
        ("/x?token=&a=1", "/x?token=&a=1"),
        ("/token=1?tokens_left", "/token=1?tokens_left"),
    ],
)
def test_a_log_line_does_not_show_the_token(given: str, logged: str) -> None:
    assert redact(given) == logged
