import base64
import contextlib
import io
import json
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from ownware_gateway.app import Gateway
from ownware_gateway.doors.native.bodies import ATTACHMENT_BYTES_MAX
from ownware_gateway.errors import CODES
from ownware_gateway.models.catalogue import KnownModels
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
    write_profile,
)
from tests.provider import Call, Provider, Reply

pytestmark = pytest.mark.asyncio(loop_scope="module")

#: What an error must never show: where things are, and how they are made.
INTERNAL: Final = ("Traceback", "site-packages", "ownware_gateway", ".py", "sqlite", FAKE_KEY)


@dataclass(frozen=True)
class Site:
    """A gateway with a run of each kind, and who calls it."""

    up: Gateway
    http: aiohttp.ClientSession
    folder: Path
    ids: dict[str, str]

    def rows(self) -> dict[str, list[Any]]:
        """Everything that is in the log."""
        with contextlib.closing(sqlite3.connect(self.up.data_dir / "gateway.db")) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            names = [name for (name,) in tables.fetchall()]
            assert "events" in names
            return {name: database.execute(f"SELECT * FROM {name}").fetchall() for name in names}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    profiles = folder / "profiles"
    write_profile(profiles, "assistant")
    broken = write_profile(profiles, "broken")
    (broken / "agent.json").write_text('{"name": "broken", "modle": "openai:x"}')
    async with Provider() as provider, aiohttp.ClientSession() as http:
        # There is a run that never ends here, for which nobody need wait.
        quick = pytest.MonkeyPatch()
        quick.setattr("ownware_gateway.app.GRACE_S", 0.0)
        gateways = Gateways(
            {
                "port": 0,
                "profiles": str(profiles),
                "data_dir": str(folder / "data"),
                "openai_base_url": provider.base_url,
                "openai_api_key": FAKE_KEY,
            }
        )
        up = await gateways()
        try:
            yield Site(up, http, folder, await runs_of_each_kind(up, http, provider))
        finally:
            quick.undo()
            await gateways.stop_all()


async def runs_of_each_kind(
    up: Gateway, http: aiohttp.ClientSession, provider: Provider
) -> dict[str, str]:
    """Have runs that have ended, wait and hang; return their ids and those of their threads."""
    ended = await start_run(http, up.url, "hello")
    await run_events(http, up.url, ended["runId"])
    later = await start_run(http, up.url, "hello again", threadId=ended["threadId"])
    await run_events(http, up.url, later["runId"])
    before = await start_run(http, up.url, "hello")
    await run_events(http, up.url, before["runId"])
    waiting, asked = await ask(up, http, provider, threadId=before["threadId"])
    decided, answered = await ask(up, http, provider)
    provider.reply(Reply(text=["Done."]))
    await post_json(http, up.url, f"/threads/{decided['threadId']}/resume", {"action": "deny"})
    await run_events(http, up.url, decided["runId"])
    provider.reply(Reply(hang=True))
    hanging = await start_run(http, up.url, "think")
    async with open_stream(http, up.url, f"/runs/{hanging['runId']}/events") as response:
        await read_frames(response, "turn.start")
    _, empty = await post_json(http, up.url, "/threads", {"title": "empty"})
    return {
        "ended": ended["runId"],
        "ended_thread": ended["threadId"],
        "later": later["runId"],
        "before": before["runId"],
        "waiting": waiting["runId"],
        "waiting_thread": waiting["threadId"],
        "asked": asked,
        "decided": decided["runId"],
        "decided_thread": decided["threadId"],
        "answered": answered,
        "hanging": hanging["runId"],
        "hanging_thread": hanging["threadId"],
        "empty_thread": empty["id"],
    }


async def ask(
    up: Gateway, http: aiohttp.ClientSession, provider: Provider, **body: Any
) -> tuple[dict[str, Any], str]:
    provider.reply(Reply(calls=[Call("write_file", {"path": "a.txt", "content": "A"})]))
    run = await start_run(http, up.url, "write", **body)
    shown = await until_status(http, up.url, run, "waiting")
    return run, shown["pendingPermissions"][0]["requestId"]


@dataclass(frozen=True)
class Bad:
    """A request and how it is refused. `path` and string values may name the site's ids."""

    method: str
    path: str
    code: str
    says: str = ""
    body: Any = None
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return CODES[self.code][0]


def run_body(**fields: Any) -> dict[str, Any]:
    return {"profileId": "assistant", "prompt": "hello", **fields}


def file(**fields: Any) -> dict[str, Any]:
    return {"filename": "a.txt", "mimeType": "text/plain", "data": "aGk=", **fields}


def bad_run(says: str, body: Any, code: str = "invalid_request") -> Bad:
    return Bad("POST", "/run", code, says, body)


def raw_run(says: str, raw: bytes, code: str = "invalid_request", kind: str = "") -> Bad:
    headers = {"Content-Type": kind or "application/json"}
    return Bad("POST", "/run", code, says, raw=raw, headers=headers)


TOO_LARGE = base64.b64encode(bytes(ATTACHMENT_BYTES_MAX + 1)).decode()
WAITING = "/runs/{waiting}/permissions/{asked}/decision"

BODIES: dict[str, Bad] = {
    "broken JSON": raw_run("at line 1, column 2", b"{nope"),
    "cut JSON": raw_run("not JSON", b'{"profileId": "assistant"'),
    "no body": raw_run("has no body", b""),
    "blank body": raw_run("has no body", b" \n"),
    "not UTF-8": raw_run("not UTF-8", b'{"prompt": "\xff"}'),
    "array": bad_run("must be a JSON object", []),
    "string": bad_run("must be a JSON object", "hello"),
    "number": bad_run("must be a JSON object", 7),
    "null": raw_run("must be a JSON object", b"null"),
    "NaN": raw_run("not JSON", b'{"profileId": "assistant", "prompt": NaN}'),
    "infinity": raw_run("not JSON", b'{"profileId": "assistant", "prompt": -Infinity}'),
    "huge number": raw_run("not JSON", b'{"prompt": ' + b"9" * 10_000 + b"}"),
    "deep nesting": raw_run("not JSON", b"[" * 200_000),
    "deep nesting in a field": raw_run("not JSON", b'{"prompt": ' + b'{"a":' * 100_000),
    "two values": raw_run("not JSON", b"{} {}"),
    "half a character": raw_run("prompt", b'{"profileId": "assistant", "prompt": "\\ud800"}'),
    "empty object": bad_run("'profileId' is required", {}),
    "no prompt": bad_run("'prompt' is required", {"profileId": "assistant"}),
    "empty prompt": bad_run("'prompt'", run_body(prompt="")),
    "prompt of another type": bad_run("a valid string", run_body(prompt=["hello"])),
    "number as a string": bad_run("'profileId' is 7", run_body(profileId=7)),
    "null prompt": bad_run("'prompt' is null", run_body(prompt=None)),
    "boolean": bad_run("'prompt' is true", run_body(prompt=True)),
    "misspelt field": bad_run("did you mean 'prompt'?", {"profileId": "assistant", "promt": "x"}),
    "field of another style": bad_run("did you mean 'threadId'?", run_body(thread_id="x")),
    "unknown field": bad_run("known are: profileId", run_body(zzz=1)),
    "malformed thread": bad_run("threadId", run_body(threadId="../../etc")),
    "thread with a newline": bad_run("threadId", run_body(threadId="thread\n")),
    "long thread": bad_run("threadId", run_body(threadId="t" * 129)),
    "long prompt": bad_run("prompt", run_body(prompt="x" * 1_048_577)),
    "form": raw_run(
        "must be application/json",
        b"prompt=hello",
        "unsupported_media_type",
        "application/x-www-form-urlencoded",
    ),
    "text": raw_run("not 'text/plain'", b"{}", "unsupported_media_type", "text/plain"),
    "nearly JSON": raw_run(
        "must be", b"{}", "unsupported_media_type", "application/jsonp; charset=utf-8"
    ),
    "attachments of another type": bad_run("attachments", run_body(attachments={})),
    "too many attachments": bad_run("attachments", run_body(attachments=[file()] * 9)),
    "attachment that is not base64": bad_run(
        "'attachments.1.data' is not base64", run_body(attachments=[file(), file(data="!!!")])
    ),
    "attachment with broken padding": bad_run(
        "'attachments.0.data' is not base64", run_body(attachments=[file(data="aGk")])
    ),
    "attachment with an accent": bad_run(
        "'attachments.0.data' is not base64", run_body(attachments=[file(data="aGké")])
    ),
    "attachment that is too large": bad_run(
        "4194304 are allowed", run_body(attachments=[file(data=TOO_LARGE)]), "payload_too_large"
    ),
    "attachment with a path": bad_run(
        "attachments.0.filename", run_body(attachments=[file(filename="../a.txt")])
    ),
    "attachment with a NUL": bad_run(
        "attachments.0.filename", run_body(attachments=[file(filename="a\0.txt")])
    ),
    "attachment with a newline at the end": bad_run(
        "attachments.0.filename", run_body(attachments=[file(filename="a.txt\n")])
    ),
    "attachment without a name": bad_run(
        "attachments.0.filename", run_body(attachments=[file(filename="")])
    ),
    "attachment without a type": bad_run(
        "attachments.0.mimeType", run_body(attachments=[file(mimeType="text")])
    ),
    "attachment with a misspelt field": bad_run(
        "attachments.0.mimetype", run_body(attachments=[file(mimetype="text/plain")])
    ),
    "unknown profile": bad_run(
        "Did you mean 'assistant'", run_body(profileId="asistant"), "not_found"
    ),
    "profile that does not parse": bad_run(
        "did you mean 'model'?", run_body(profileId="broken"), "not_found"
    ),
    "profile with a path": bad_run("no profile", run_body(profileId="../assistant"), "not_found"),
    "thread that does not exist": bad_run("no thread", run_body(threadId="thread_x"), "not_found"),
    "model without a provider": bad_run("provider:model", run_body(model="gpt"), "unknown_model"),
    "unknown provider": bad_run(
        "did you mean openai:?", run_body(model="opnai:gpt"), "unknown_model"
    ),
    "provider without a key": bad_run(
        "ANTHROPIC_API_KEY is not set", run_body(model="anthropic:claude"), "unknown_model"
    ),
    "model that the offline one is not": bad_run(
        "demo:assistant", run_body(model="demo:gpt"), "unknown_model"
    ),
    "model without a name": bad_run("provider:model", run_body(model="openai:"), "unknown_model"),
    "busy thread": bad_run(
        "busy with the run", run_body(threadId="{hanging_thread}"), "run_in_progress"
    ),
    "waiting thread": bad_run(
        "busy with the run", run_body(threadId="{waiting_thread}"), "run_in_progress"
    ),
}

STREAM = "/threads/{ended_thread}/agents/root/events"

PATHS: dict[str, Bad] = {
    "unknown route": Bad("GET", "/nothing", "not_found", "nothing at this path"),
    "unknown route with a body": Bad("POST", "/runs/x/y", "not_found", "nothing", {}),
    "unknown run": Bad("GET", "/runs/run_x", "run_not_found", "no run 'run_x'"),
    "unknown run to cancel": Bad("POST", "/runs/run_x/cancel", "run_not_found"),
    "unknown run to stream": Bad("GET", "/runs/run_x/events", "run_not_found"),
    "unknown thread": Bad("GET", "/threads/t", "not_found", "no thread 't'"),
    "unknown thread's messages": Bad("GET", "/threads/t/messages", "not_found"),
    "unknown thread's agents": Bad("GET", "/threads/t/agents", "not_found"),
    "unknown thread's stream": Bad("GET", "/threads/t/agents/root/events", "not_found"),
    "unknown thread's history": Bad("GET", "/threads/t/agents/root/events/history", "not_found"),
    "output of a call that never ended": Bad(
        "GET", "/threads/{ended_thread}/agents/root/outputs/1", "output_not_found", "ended at 1"
    ),
    "malformed number of an output": Bad(
        "GET", "/threads/{ended_thread}/agents/root/outputs/x", "invalid_request", "'seq'"
    ),
    "unknown thread to abort": Bad("POST", "/threads/t/abort", "not_found"),
    "unknown agent": Bad(
        "GET", "/threads/{ended_thread}/agents/nobody/events", "not_found", "no agent 'nobody'"
    ),
    "unknown profile": Bad("GET", "/profiles/x", "not_found", "assistant"),
    "profile that does not parse": Bad("GET", "/profiles/broken", "not_found", "'model'"),
    "id with a slash": Bad("GET", "/runs/a%2Fb", "invalid_request", "runId is malformed"),
    "id with dots": Bad("GET", "/runs/%2E%2E", "invalid_request", "runId is malformed"),
    "id with dots and slashes": Bad("GET", "/runs/..%2F..%2Fetc", "invalid_request", "malformed"),
    "id with a NUL": Bad("GET", "/runs/run_x%00", "invalid_request", "malformed"),
    "id with a newline": Bad("GET", "/runs/run_x%0A", "invalid_request", "malformed"),
    "id with an emoji": Bad("GET", "/runs/%F0%9F%98%80", "invalid_request", "malformed"),
    "id that is not UTF-8": Bad("GET", "/runs/%FF%FE", "invalid_request", "malformed"),
    "id that is too long": Bad("GET", f"/runs/{'r' * 129}", "invalid_request", "malformed"),
    "thread's id with a space": Bad("GET", "/threads/a%20b", "invalid_request", "threadId"),
    "agent's id with a quote": Bad(
        "GET", "/threads/t/agents/%22/events", "invalid_request", "agentId"
    ),
    "profile's id with a slash": Bad("GET", "/profiles/a%2Fb", "invalid_request", "profileId"),
    "unknown parameter": Bad("GET", "/runs?stauts=x", "invalid_request", "known are: status"),
    "unknown parameter of a stream": Bad(
        "GET", STREAM + "?from=1", "invalid_request", "known are: since"
    ),
    "unknown parameter where none is known": Bad(
        "GET", "/models?all=1", "invalid_request", "known are: none"
    ),
    "unknown status": Bad("GET", "/runs?status=done", "invalid_request", "succeeded"),
    "unknown status of approvals": Bad(
        "GET", "/approvals?status=all", "invalid_request", "must be pending"
    ),
    "limit of none": Bad("GET", "/runs?limit=0", "invalid_request", "from 1 to 500"),
    "limit that is too high": Bad("GET", "/threads?limit=501", "invalid_request", "from 1 to 500"),
    "negative limit": Bad("GET", "/runs?limit=-1", "invalid_request", "'limit'"),
    "limit that is no number": Bad("GET", "/runs?limit=ten", "invalid_request", "'limit'"),
    "limit in other digits": Bad("GET", "/runs?limit=%D9%A3", "invalid_request", "'limit'"),
    "follow that is neither": Bad("GET", STREAM + "?follow=maybe", "invalid_request", "'follow'"),
    "page of runs that nobody gave": Bad("GET", "/runs?cursor=x", "cursor_invalid"),
    "page of threads that nobody gave": Bad("GET", "/threads?cursor=5", "cursor_invalid"),
    "cursor that is no number": Bad("GET", STREAM + "?since=x", "cursor_invalid"),
    "negative cursor": Bad("GET", STREAM + "?since=-1", "cursor_invalid"),
    "empty cursor": Bad("GET", STREAM + "?since=", "cursor_invalid"),
    "cursor beyond numbers": Bad("GET", STREAM + f"?since={2**63}", "cursor_invalid"),
    "cursor of history": Bad("GET", STREAM + "/history?since=1e3", "cursor_invalid"),
    "cursor ahead": Bad("GET", STREAM + "?since=999", "cursor_ahead", "whose last event is"),
    "cursor of history ahead": Bad("GET", STREAM + "/history?since=999", "cursor_ahead"),
    "cursor of another epoch": Bad("GET", STREAM + "?since=deadbeef.1", "cursor_expired"),
    "cursor before the run": Bad("GET", "/runs/{later}/events?since=1", "cursor_mismatch"),
    "cursor after the run": Bad("GET", "/runs/{ended}/events?since=12", "cursor_mismatch"),
    "no MCP server": Bad("GET", "/mcp/servers/nobody", "not_found", "'nobody'"),
    "MCP server of a caller": Bad(
        "POST", "/mcp/servers", "forbidden_server", "OWNWARE_MCP_ADD", {"name": "x"}
    ),
    "MCP server to change": Bad(
        "PUT", "/mcp/servers/x", "forbidden_server", "OWNWARE_MCP_ADD", {"command": "x"}
    ),
    "no MCP server to call": Bad(
        "POST", "/mcp/proxy/nobody/tools/x", "not_found", "there are: none", {}
    ),
    "nothing in the catalogue": Bad(
        "POST", "/mcp/servers/catalog/x/enable", "not_found", "there are: none"
    ),
    "method that a path does not take": Bad("GET", "/run", "method_not_allowed", "Allow"),
    "deleting a run": Bad("DELETE", "/runs/{ended}", "method_not_allowed"),
    "changing a thread": Bad("PUT", "/threads", "method_not_allowed", body={}),
    "head of a stream": Bad("HEAD", STREAM, "method_not_allowed"),
    "foreign host": Bad("GET", "/models", "forbidden_host", headers={"Host": "evil.example"}),
    "foreign origin": Bad(
        "POST",
        "/run",
        "forbidden_origin",
        "",
        run_body(),
        headers={"Origin": "http://evil.example"},
    ),
    "proxy": Bad("GET", "/models", "forbidden_proxy", headers={"X-Forwarded-For": "10.0.0.1"}),
}


def resume(
    says: str, body: Any, code: str = "invalid_request", thread: str = "{waiting_thread}"
) -> Bad:
    return Bad("POST", f"/threads/{thread}/resume", code, says, body)


def decide(says: str, body: Any, code: str = "invalid_request", path: str = WAITING) -> Bad:
    return Bad("POST", path, code, says, body)


APPROVE = {"decision": "approve", "operationHash": "0" * 64}

DECISIONS: dict[str, Bad] = {
    "unknown action": resume("'action'", {"action": "aprove"}),
    "action of another type": resume("'action'", {"action": True}),
    "no action": resume("'action' is required", {}),
    "answer to a yes or no": resume("approve, deny or always", {"action": "answer", "answer": "x"}),
    "misspelt request": resume("'requestId'", {"action": "approve", "requestID": "x"}),
    "malformed request": resume("requestId", {"action": "approve", "requestId": "a b"}),
    "unknown request": resume(
        "no question", {"action": "approve", "requestId": "perm_x"}, "permission_request_not_found"
    ),
    "request of another thread": resume(
        "no question",
        {"action": "approve", "requestId": "{answered}"},
        "permission_request_not_found",
    ),
    "decided request": resume(
        "denied by user",
        {"action": "approve", "requestId": "{answered}"},
        "permission_already_decided",
        "{decided_thread}",
    ),
    "nothing to answer": resume(
        "no question", {"action": "approve"}, "nothing_pending", "{ended_thread}"
    ),
    "nothing to answer on a thread without runs": resume(
        "no question", {"action": "approve"}, "nothing_pending", "{empty_thread}"
    ),
    "unknown thread": resume("no thread", {"action": "approve"}, "not_found", "thread_x"),
    "no body": Bad(
        "POST", "/threads/{waiting_thread}/resume", "invalid_request", "no body", raw=b""
    ),
    "unknown decision": decide("'decision'", APPROVE | {"decision": "always"}),
    "no hash": decide("'operationHash' is required", {"decision": "approve"}),
    "empty hash": decide("'operationHash'", APPROVE | {"operationHash": ""}),
    "other operation": decide("another operation", APPROVE, "permission_operation_mismatch"),
    "unknown request of a run": decide(
        "no question",
        APPROVE,
        "permission_request_not_found",
        "/runs/{waiting}/permissions/perm_x/decision",
    ),
    "request of another run": decide(
        "no question",
        APPROVE,
        "permission_request_not_found",
        "/runs/{ended}/permissions/{asked}/decision",
    ),
    "request of a later run": decide(
        "no question",
        APPROVE,
        "permission_request_not_found",
        "/runs/{before}/permissions/{asked}/decision",
    ),
    "request of an unknown run": decide(
        "no run", APPROVE, "run_not_found", "/runs/run_x/permissions/{asked}/decision"
    ),
    "malformed request of a run": decide(
        "requestId is malformed", APPROVE, path="/runs/{waiting}/permissions/a%20b/decision"
    ),
}

THREADS: dict[str, Bad] = {
    "long title": Bad("POST", "/threads", "invalid_request", "title", {"title": "x" * 201}),
    "title of another type": Bad("POST", "/threads", "invalid_request", "title", {"title": 1}),
    "half a character": Bad(
        "POST", "/threads", "invalid_request", "title", raw=b'{"title": "\\udfff"}'
    ),
    "unknown profile": Bad("POST", "/threads", "not_found", "no profile", {"profileId": "x"}),
    "misspelt field": Bad("POST", "/threads", "invalid_request", "'title'", {"titel": "x"}),
}


def filled(value: Any, ids: dict[str, str]) -> Any:
    """The value with the site's ids in the place of their names."""
    match value:
        case str() if value.startswith("{") and value.endswith("}"):
            return value.format(**ids)
        case dict():
            return {name: filled(item, ids) for name, item in value.items()}
        case _:
            return value


async def send(site: Site, bad: Bad) -> tuple[aiohttp.ClientResponse, bytes]:
    url = URL(f"{site.up.url}/api/v1{bad.path.format(**site.ids)}", encoded=True)
    data = bad.raw
    headers = dict(bad.headers)
    if bad.body is not None:
        data = json.dumps(filled(bad.body, site.ids)).encode()
    if data is not None:
        headers.setdefault("Content-Type", "application/json")
    sent = None if data is None else io.BytesIO(data)
    async with site.http.request(bad.method, url, data=sent, headers=headers) as response:
        return response, await response.read()


def check_envelope(response: aiohttp.ClientResponse, body: bytes, code: str) -> dict[str, Any]:
    """Fail unless this is how every error looks; return it."""
    assert response.content_type == "application/json"
    answer = json.loads(body)
    assert isinstance(answer, dict)
    assert (response.status, answer["error"]) == (CODES[code][0], code), answer
    assert answer["category"] == CODES[code][1]
    assert answer["correlationId"] == response.headers["X-Ownware-Correlation-Id"]
    assert str(UUID(answer["correlationId"])) == answer["correlationId"]
    assert answer["message"].endswith((".", "?")), answer["message"]
    assert not any(word in answer["message"] for word in INTERNAL), answer["message"]
    return answer


ALL = {
    f"{kind}: {name}": bad
    for kind, table in {
        "body": BODIES,
        "path": PATHS,
        "decision": DECISIONS,
        "thread": THREADS,
    }.items()
    for name, bad in table.items()
}


@pytest.mark.parametrize("bad", ALL.values(), ids=ALL.keys())
async def test_a_bad_request_gets_a_clear_error_and_changes_nothing(site: Site, bad: Bad) -> None:
    before = site.rows()
    response, body = await send(site, bad)
    assert site.rows() == before
    if bad.method == "HEAD":
        assert response.status == bad.status
        return
    answer = check_envelope(response, body, bad.code)
    assert bad.says in answer["message"]
    assert str(site.folder) not in body.decode()
    if bad.code == "method_not_allowed":
        assert response.headers["Allow"]


async def test_a_method_not_allowed_names_those_that_are(site: Site) -> None:
    response, _ = await send(site, PATHS["method that a path does not take"])
    assert response.headers["Allow"] == "POST"
    response, _ = await send(site, PATHS["head of a stream"])
    assert response.headers["Allow"] == "GET"


async def test_a_body_without_a_type_is_taken_for_json(site: Site) -> None:
    body = json.dumps(run_body(threadId=site.ids["hanging_thread"])).encode()
    async with site.http.post(
        f"{site.up.url}/api/v1/run", data=body, skip_auto_headers=["Content-Type"]
    ) as response:
        assert (await response.json())["error"] == "run_in_progress"


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "in pieces"])
async def test_a_body_of_40_megabytes_is_too_large(site: Site, chunked: bool) -> None:
    before = site.rows()
    piece = b"x" * 1_048_576

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield piece

    async with site.http.post(
        f"{site.up.url}/api/v1/run",
        data=pieces() if chunked else io.BytesIO(piece * 40),
        headers={"Content-Type": "application/json"},
    ) as response:
        check_envelope(response, await response.read(), "payload_too_large")
    assert site.rows() == before


@pytest.mark.parametrize(
    ("bad", "details"),
    [
        (BODIES["busy thread"], {"runId": "{hanging}"}),
        (PATHS["cursor ahead"], {"streamHighWaterCursor": 15}),
        (PATHS["cursor of another epoch"], {"earliestRetainedCursor": 0}),
        (PATHS["cursor before the run"], {"runStartSeq": 7, "runEndSeq": 15}),
        (DECISIONS["decided request"], {"granted": False, "decidedBy": "user"}),
    ],
    ids=lambda value: value.code if isinstance(value, Bad) else "",
)
async def test_an_error_says_what_to_go_on_with(
    site: Site, bad: Bad, details: dict[str, Any]
) -> None:
    _, body = await send(site, bad)
    answer = json.loads(body)
    assert {name: answer[name] for name in details} == filled(details, site.ids)


async def test_a_mismatch_shows_the_hash_that_a_decision_must_name(site: Site) -> None:
    _, body = await send(site, DECISIONS["other operation"])
    async with site.http.get(f"{site.up.url}/api/v1/approvals") as response:
        (asked,) = (await response.json())["items"]
    assert json.loads(body)["operationHash"] == asked["operationHash"]


@pytest.mark.parametrize(
    "last_event_id", ["x", "99999", "deadbeef.1"], ids=["invalid", "ahead", "expired"]
)
async def test_an_automatic_reconnect_is_told_in_the_stream(site: Site, last_event_id: str) -> None:
    path = f"/runs/{site.ids['ended']}/events"
    async with open_stream(site.http, site.up.url, path, last_event_id) as response:
        read = await read_frames(response, "done")
    assert [frame.event for frame in read[:3]] == ["stream.start", "stream.reset", "user.message"]
    reset = json.loads(read[1].data)
    assert reset["reason"] in ("cursor_invalid", "cursor_ahead", "cursor_expired")
    assert reset["earliestRetainedCursor"] == 0


async def test_a_bug_tells_nothing_of_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: KnownModels) -> None:
        raise RuntimeError("at /internal/path")

    monkeypatch.setattr(KnownModels, "list", fail)
    async with site.http.get(f"{site.up.url}/api/v1/models") as response:
        answer = check_envelope(response, await response.read(), "internal")
    assert "/internal/path" not in json.dumps(answer)
    assert "/internal/path" in caplog.text
    assert answer["correlationId"] in caplog.text


async def test_a_key_in_a_bad_request_is_not_said_back_or_logged(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    key = "sk-" + "k" * 24
    for bad in (bad_run("", run_body(prompt=[key])), Bad("GET", f"/runs/{key}", "run_not_found")):
        response, body = await send(site, bad)
        check_envelope(response, body, bad.code)
        assert key not in body.decode()
    assert key not in caplog.text


@pytest_asyncio.fixture(loop_scope="module")
async def gateways(tmp_path: Path) -> AsyncIterator[Gateways]:
    write_profile(tmp_path / "profiles", "assistant", model="demo:assistant")
    defaults = {
        "port": 0,
        "profiles": str(tmp_path / "profiles"),
        "data_dir": str(tmp_path / "data"),
    }
    gateways = Gateways(defaults)
    yield gateways
    await gateways.stop_all()


async def refused(
    http: aiohttp.ClientSession, up: Gateway, code: str, headers: dict[str, str] | None = None
) -> aiohttp.ClientResponse:
    """Ask for a run, which must be refused with this code."""
    url = f"{up.url}/api/v1/run"
    async with http.post(url, json=run_body(), headers=headers) as response:
        check_envelope(response, await response.read(), code)
        return response


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer nope"}, {"X-API-Key": "nope"}, {"Authorization": ""}]
)
async def test_nobody_comes_in_without_the_token(
    gateways: Gateways, site: Site, headers: dict[str, str]
) -> None:
    up = await gateways(require_auth=True)
    response = await refused(site.http, up, "unauthorized", headers)
    assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_a_caller_over_its_limit_is_told_when_to_come_back(
    gateways: Gateways, site: Site
) -> None:
    up = await gateways(host="0.0.0.0", rate_limit_run=1)
    headers = {"Authorization": f"Bearer {up.token}"}
    async with site.http.post(f"{up.url}/api/v1/run", json=run_body(), headers=headers) as response:
        assert response.status == 200
    limited = await refused(site.http, up, "rate_limited", headers)
    assert int(limited.headers["Retry-After"]) >= 1


async def test_a_gateway_that_leaves_takes_no_runs(gateways: Gateways, site: Site) -> None:
    up = await gateways()
    up.engine.refuse()
    response = await refused(site.http, up, "shutting_down")
    assert int(response.headers["Retry-After"]) >= 1
    async with site.http.get(f"{up.url}/api/v1/ready") as ready:
        assert ready.status == 503
        assert (await ready.json())["missing"] == ["The gateway is shutting down."]


async def test_a_full_gateway_takes_no_more_runs(gateways: Gateways, site: Site) -> None:
    up = await gateways(runs_active_max=1)
    run = await start_run(site.http, up.url, "slowly count to 100000")
    response = await refused(site.http, up, "overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    await post_json(site.http, up.url, f"/runs/{run['runId']}/cancel")
    await run_events(site.http, up.url, run["runId"])


async def test_every_code_is_met_here() -> None:
    met = {bad.code for bad in ALL.values()}
    alone = {"internal", "unauthorized", "rate_limited", "shutting_down", "overloaded"}
    # What these are about has tests of its own: test_threads.py, reliability/test_idempotency.py,
    # mcp/test_servers.py, test_budgets.py, test_trouble.py.
    alone |= {"thread_deleted", "idempotency_conflict", "idempotency_key_invalid"}
    alone |= {"server_exists", "budget_exceeded", "body_timeout"}
    assert met | alone == set(CODES)
