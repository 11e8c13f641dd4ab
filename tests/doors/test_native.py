import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio

from ownware_gateway import __version__
from ownware_gateway.app import Gateway
from ownware_gateway.models.catalogue import DEMO_ID
from ownware_gateway.sse import Frame
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
    write_profile,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOLDEN: Final = Path(__file__).parent.parent / "golden"

#: What differs from run to run, and what stands in its place in a golden file.
VARYING: Final = (
    (rb"(?m)^id: [0-9a-f]+\.", b"id: EPOCH."),
    (rb'"epoch":"[0-9a-f]+"', b'"epoch":"EPOCH"'),
    (rb"\b(run|thread|perm)_[0-9a-f]{20}\b", rb"\1_ID"),
    (rb'"(timestamp|expiresAt|durationMs)":[0-9]+', rb'"\1":0'),
    (rb'"operationHash":"[0-9a-f]{64}"', b'"operationHash":"HASH"'),
)

RUN_FIELDS: Final = {
    "runId",
    "threadId",
    "agentId",
    "parentRunId",
    "profileId",
    "model",
    "status",
    "terminal",
    "acceptedAt",
    "startedAt",
    "updatedAt",
    "terminalAt",
    "cancelRequestedAt",
    "startSeq",
    "endSeq",
    "timeoutMs",
    "code",
    "usage",
    "pendingPermissions",
}
THREAD_FIELDS: Final = {
    "id",
    "profileId",
    "model",
    "title",
    "createdAt",
    "updatedAt",
    "historyTo",
    "forkedFrom",
    "activeRunId",
    "hidden",
    "status",
}


@dataclass(frozen=True)
class Site:
    """A gateway whose profile asks the offline model, and who calls it."""

    up: Gateway
    http: aiohttp.ClientSession

    async def get(self, path: str) -> Any:
        answer = await get_json(self.http, self.up.url, path)
        check_names(answer)
        return answer

    async def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        status, answer = await post_json(self.http, self.up.url, path, body)
        check_names(answer)
        return status, answer

    async def run(self, prompt: str, **body: Any) -> dict[str, Any]:
        return await start_run(self.http, self.up.url, prompt, **body)

    async def whole_run(self, prompt: str, **body: Any) -> dict[str, Any]:
        run = await self.run(prompt, **body)
        await run_events(self.http, self.up.url, run["runId"])
        return run

    async def waiting_run(self, prompt: str, **body: Any) -> dict[str, Any]:
        run = await self.run(prompt, **body)
        return await until_status(self.http, self.up.url, run, "waiting")

    async def raw(self, path: str) -> bytes:
        async with self.http.get(f"{self.up.url}/api/v1{path}") as response:
            assert response.status == 200
            return await response.read()


def check_names(value: Any) -> None:
    """Fail unless every field has a name in camelCase."""
    match value:
        case dict():
            for name, item in value.items():
                assert re.fullmatch(r"[a-z][a-zA-Z]*", name), name
                if name != "input":
                    check_names(item)
        case list():
            for item in value:
                check_names(item)
        case _:
            pass


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    write_profile(folder / "profiles", "assistant", model=DEMO_ID, soul="Be kind.")
    write_profile(folder / "profiles", "reader", model=DEMO_ID, tools={"preset": "readonly"})
    broken = write_profile(folder / "profiles", "broken")
    (broken / "agent.json").write_text('{"name": "broken", "modle": "x"}')
    gateways = Gateways(
        {
            "port": 0,
            "profiles": str(folder / "profiles"),
            "data_dir": str(folder / "data"),
            "openai_api_key": FAKE_KEY,
            "ollama_host": "127.0.0.1:9",
        }
    )
    async with aiohttp.ClientSession() as http:
        up = await gateways()
        (up.workspace / "notes.txt").write_text("Buy milk.\n")
        try:
            yield Site(up, http)
        finally:
            await gateways.stop_all()


# -- runs


async def test_a_run_is_answered_with_where_to_read_it(site: Site) -> None:
    body = {"profileId": "assistant", "prompt": "hello"}
    async with site.http.post(f"{site.up.url}/api/v1/run", json=body) as response:
        assert response.status == 200
        run = await response.json()
        location = response.headers["Location"]
    assert re.fullmatch(r"run_[0-9a-f]{20}", run.pop("runId"))
    assert re.fullmatch(r"thread_[0-9a-f]{20}", run.pop("threadId"))
    assert run == {
        "agentId": "root",
        "profileId": "assistant",
        "model": DEMO_ID,
        "status": "accepted",
        "startSeq": 0,
        "timeoutMs": 1_800_000,
    }
    async with site.http.get(site.up.url + location) as stream:
        assert stream.content_type == "text/event-stream"
        assert b"event: session.end\n" in await stream.read()


async def test_the_next_run_of_a_thread_starts_after_the_last_one(site: Site) -> None:
    first = await site.whole_run("hello")
    ended = await site.get(f"/runs/{first['runId']}")
    second = await site.whole_run("hello", threadId=first["threadId"])
    assert second["startSeq"] == ended["endSeq"]
    path = (
        f"/threads/{first['threadId']}/agents/root/events?since={second['startSeq']}&follow=false"
    )
    async with open_stream(site.http, site.up.url, path) as response:
        read = [frame.event for frame in await read_frames(response, "done")]
    assert read[1] == "user.message"
    assert read.count("session.end") == 1


async def test_a_run_is_shown_with_everything_about_it(site: Site) -> None:
    run = await site.whole_run("hello")
    shown = await site.get(f"/runs/{run['runId']}")
    assert set(shown) == RUN_FIELDS
    assert (shown["status"], shown["terminal"], shown["code"]) == ("succeeded", True, None)
    assert shown["acceptedAt"] <= shown["startedAt"] <= shown["terminalAt"] <= shown["updatedAt"]
    assert shown["cancelRequestedAt"] is None
    assert shown["pendingPermissions"] == []
    assert shown["usage"]["model"] == DEMO_ID
    assert shown["usage"]["costUsd"] == 0


async def test_a_waiting_run_shows_what_it_waits_for(site: Site) -> None:
    shown = await site.waiting_run("write a.txt: hello")
    assert set(shown) == RUN_FIELDS
    assert (shown["terminal"], shown["terminalAt"], shown["endSeq"]) == (False, None, None)
    (asked,) = shown["pendingPermissions"]
    assert set(asked) == {
        "kind",
        "requestId",
        "runId",
        "threadId",
        "agentId",
        "toolName",
        "operationHash",
        "turnIndex",
        "requestedAt",
        "expiresAt",
        "granted",
        "decidedBy",
        "decidedAt",
    }
    assert (asked["toolName"], asked["turnIndex"], asked["granted"]) == ("write_file", 0, None)
    assert asked["expiresAt"] - asked["requestedAt"] == pytest.approx(1_800_000, abs=5_000)
    thread = await site.get(f"/threads/{shown['threadId']}")
    assert (thread["status"], thread["activeRunId"]) == ("active", shown["runId"])
    await site.post(f"/runs/{shown['runId']}/cancel")


async def test_a_run_is_cancelled_once(site: Site) -> None:
    run = await site.waiting_run("write a.txt: hello")
    path = f"/runs/{run['runId']}/cancel"
    status, answer = await site.post(path)
    assert status == 202
    assert set(answer) == {"runId", "status", "terminal", "cancellation"}
    assert (answer["runId"], answer["cancellation"]) == (run["runId"], "requested")
    await run_events(site.http, site.up.url, run["runId"])
    status, answer = await site.post(path)
    assert (status, answer) == (
        200,
        {
            "runId": run["runId"],
            "status": "cancelled",
            "terminal": True,
            "cancellation": "already_terminal",
        },
    )


async def test_aborting_a_thread_at_rest_changes_nothing(site: Site) -> None:
    run = await site.whole_run("hello")
    before = await site.get(f"/threads/{run['threadId']}")
    status, answer = await site.post(f"/threads/{run['threadId']}/abort")
    assert status == 200
    assert answer == {"aborted": True, "cancelRequested": False, "threadId": run["threadId"]}
    assert await site.get(f"/threads/{run['threadId']}") == before


async def test_runs_are_listed_newest_first_page_by_page(site: Site) -> None:
    first = await site.whole_run("one")
    ids = [first["runId"]]
    for prompt in ("two", "three", "four"):
        later = await site.whole_run(prompt, threadId=first["threadId"])
        ids.append(later["runId"])
    listed: list[str] = []
    cursor = ""
    while True:
        page = await site.get(f"/runs?threadId={first['threadId']}&limit=3{cursor}")
        assert all(set(item) == RUN_FIELDS for item in page["items"])
        listed += [item["runId"] for item in page["items"]]
        if page["nextCursor"] is None:
            break
        cursor = f"&cursor={page['nextCursor']}"
    assert listed == ids[::-1]


async def test_a_page_that_is_just_full_is_followed_by_an_empty_one(site: Site) -> None:
    run = await site.whole_run("one")
    page = await site.get(f"/runs?threadId={run['threadId']}&limit=1")
    assert len(page["items"]) == 1
    after = await site.get(f"/runs?threadId={run['threadId']}&limit=1&cursor={page['nextCursor']}")
    assert after == {"items": [], "nextCursor": None}


async def test_runs_are_found_by_their_status(site: Site) -> None:
    ended = await site.whole_run("hello")
    waiting = await site.waiting_run("write a.txt: hello")
    found = {
        status: {item["runId"] for item in (await site.get(f"/runs?status={status}"))["items"]}
        for status in ("active", "waiting", "succeeded", "failed")
    }
    assert waiting["runId"] in found["active"] & found["waiting"]
    assert ended["runId"] in found["succeeded"]
    assert not found["succeeded"] & found["active"]
    assert found["failed"] == set()
    (listed,) = (await site.get(f"/runs?threadId={waiting['threadId']}"))["items"]
    assert listed["pendingPermissions"] == waiting["pendingPermissions"]
    await site.post(f"/runs/{waiting['runId']}/cancel")


# -- threads


async def test_a_thread_is_made_empty_and_filled_by_a_run(site: Site) -> None:
    body = {"title": "Käse", "profileId": "reader"}
    async with site.http.post(f"{site.up.url}/api/v1/threads", json=body) as response:
        assert response.status == 201
        thread = await response.json()
        assert response.headers["Location"] == f"/api/v1/threads/{thread['id']}"
    assert set(thread) == THREAD_FIELDS
    assert (thread["title"], thread["profileId"], thread["model"]) == ("Käse", "reader", None)
    assert (thread["status"], thread["activeRunId"]) == ("idle", None)
    assert await site.get(f"/threads/{thread['id']}") == thread
    assert await site.get(f"/threads/{thread['id']}/messages") == []
    (root,) = (await site.get(f"/threads/{thread['id']}/agents"))["agents"]
    assert (root["agentId"], root["status"], root["maxSeq"]) == ("root", None, 0)
    await site.whole_run("hello", threadId=thread["id"])
    filled = await site.get(f"/threads/{thread['id']}")
    assert (filled["title"], filled["model"]) == ("Käse", DEMO_ID)
    assert filled["profileId"] == "assistant", "a run uses the profile it names"


async def test_a_thread_without_a_title_is_called_by_its_first_prompt(site: Site) -> None:
    first = await site.whole_run("hello \n there " + "x" * 100)
    await site.whole_run("another", threadId=first["threadId"])
    thread = await site.get(f"/threads/{first['threadId']}")
    assert thread["title"] == ("hello there " + "x" * 100)[:80]


async def test_threads_are_listed_the_last_changed_first_page_by_page(site: Site) -> None:
    await site.whole_run("elsewhere")
    runs = [await site.whole_run(f"hello {n}", profileId="reader") for n in range(4)]
    await site.whole_run("again", threadId=runs[0]["threadId"], profileId="reader")
    ids = [runs[number]["threadId"] for number in (0, 3, 2, 1)]
    listed: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await site.get(f"/threads?profileId=reader&limit=3{cursor}")
        listed += page["items"]
        if page["nextCursor"] is None:
            break
        cursor = f"&cursor={page['nextCursor']}"
    assert all(set(item) == THREAD_FIELDS for item in listed)
    assert {item["profileId"] for item in listed} == {"reader"}
    assert [item["id"] for item in listed if item["id"] in ids] == ids
    assert len({item["id"] for item in listed}) == len(listed)
    everywhere = await site.get("/threads?limit=500")
    assert {item["profileId"] for item in everywhere["items"]} > {"reader"}


async def test_a_conversation_reads_as_its_messages(site: Site) -> None:
    first = await site.whole_run("my name is Ada")
    await site.whole_run("what is my name?", threadId=first["threadId"])
    shown = await site.get(f"/threads/{first['threadId']}/messages")
    assert [message["role"] for message in shown] == ["user", "assistant"] * 2
    assert shown[2]["content"] == "what is my name?"
    assert shown[3]["content"] == "Your name is Ada."
    assert set(shown[3]) == {
        "id",
        "role",
        "content",
        "parts",
        "usage",
        "status",
        "timestamp",
        "model",
    }
    assert shown[3]["parts"] == [{"kind": "text", "text": "Your name is Ada."}]
    assert (shown[3]["status"], shown[3]["model"]) == ("succeeded", DEMO_ID)


async def test_a_thread_names_its_agents(site: Site) -> None:
    run = await site.whole_run("hello")
    ended = await site.get(f"/runs/{run['runId']}")
    assert await site.get(f"/threads/{run['threadId']}/agents") == {
        "threadId": run["threadId"],
        "count": 1,
        "agents": [
            {
                "agentId": "root",
                "parentAgentId": None,
                "name": None,
                "profileId": "assistant",
                "runId": run["runId"],
                "status": "succeeded",
                "maxSeq": ended["endSeq"],
            }
        ],
    }


async def test_history_is_what_the_stream_says(site: Site) -> None:
    run = await site.whole_run("read notes.txt")
    path = f"/threads/{run['threadId']}/agents/root/events"
    async with open_stream(site.http, site.up.url, f"{path}?follow=false") as response:
        read = await read_frames(response, "done")
    said = [json.loads(frame.data) for frame in read if frame.id is not None]
    history = await site.get(f"{path}/history")
    assert history == {
        "threadId": run["threadId"],
        "agentId": "root",
        "since": 0,
        "count": len(said),
        "maxSeq": said[-1]["seq"],
        "epoch": json.loads(read[0].data)["epoch"],
        "events": said,
    }
    page = await site.get(f"{path}/history?since=2&limit=3")
    assert page["events"] == said[2:5]
    assert (page["since"], page["count"], page["maxSeq"]) == (2, 3, len(said))
    last = await site.get(f"{path}/history?since={history['epoch']}.{len(said)}")
    assert last["events"] == []


# -- people's answers


async def test_a_question_is_answered_through_its_thread(site: Site) -> None:
    run = await site.waiting_run("write b.txt: hello")
    (asked,) = run["pendingPermissions"]
    inbox = await site.get("/approvals?status=pending")
    assert asked in inbox["items"]
    status, answer = await site.post(f"/threads/{run['threadId']}/resume", {"action": "approve"})
    assert (status, answer) == (
        200,
        {
            "threadId": run["threadId"],
            "requestId": asked["requestId"],
            "action": "approve",
            "approved": True,
            "pendingCount": 0,
        },
    )
    await run_events(site.http, site.up.url, run["runId"])
    assert (site.up.workspace / "b.txt").read_text() == "hello"
    assert asked not in (await site.get("/approvals"))["items"]


@pytest.mark.parametrize(("decision", "approved"), [("approve", True), ("deny", False)])
async def test_a_question_is_answered_through_its_run(
    site: Site, decision: str, approved: bool
) -> None:
    run = await site.waiting_run(f"write {decision}.txt: hello")
    (asked,) = run["pendingPermissions"]
    path = f"/runs/{run['runId']}/permissions/{asked['requestId']}/decision"
    body = {"decision": decision, "operationHash": asked["operationHash"]}
    status, answer = await site.post(path, body)
    assert (status, answer) == (
        200,
        {
            "runId": run["runId"],
            "requestId": asked["requestId"],
            "decision": decision,
            "approved": approved,
        },
    )
    await run_events(site.http, site.up.url, run["runId"])
    assert (site.up.workspace / f"{decision}.txt").exists() is approved


# -- what there is


async def test_profiles_are_listed_with_what_is_wrong_with_the_others(site: Site) -> None:
    answer = await site.get("/profiles")
    assert [item["id"] for item in answer["items"]] == ["assistant", "reader"]
    (broken,) = answer["broken"]
    assert broken["folder"] == "broken"
    assert "did you mean 'model'?" in broken["message"]
    shown = await site.get("/profiles/assistant")
    assert shown == answer["items"][0]
    assert (shown["id"], shown["name"], shown["model"]) == ("assistant", "assistant", DEMO_ID)
    custom = {"enabled": True, "env": {}, "memoryMb": 2048, "timeout": 120_000}
    assert shown["tools"] == {
        "preset": "coding",
        "allow": [],
        "deny": [],
        "mcp": {},
        "services": {},
        "custom": custom,
    }
    assert shown["missing"] == []
    assert shown["security"] == {"permissionMode": "ask", "hitlTimeoutMs": 1_800_000}
    assert "soul" not in shown


async def test_models_are_listed_the_offline_one_last(site: Site) -> None:
    listed = await site.get("/models")
    assert {frozenset(model) for model in listed} == {
        frozenset(
            {
                "id",
                "name",
                "provider",
                "hasCredentials",
                "default",
                "contextWindow",
                "maxOutputTokens",
                "inputCostPerMTok",
                "outputCostPerMTok",
            }
        )
    }
    assert listed[-1]["id"] == DEMO_ID
    assert listed[-1]["hasCredentials"] is True
    usable = {model["provider"] for model in listed if model["hasCredentials"]}
    assert usable == {"openai", "demo"}
    defaults = [model["provider"] for model in listed if model["default"]]
    assert len(defaults) == len(set(defaults))
    assert all(model["id"].startswith(f"{model['provider']}:") for model in listed)


async def test_the_gateway_says_how_it_is(site: Site) -> None:
    health = await site.get("/health")
    assert health.pop("uptime") > 0
    assert health == {"status": "healthy", "version": __version__}
    assert await site.get("/ready") == {"ready": True, "missing": []}
    async with site.http.head(f"{site.up.url}/api/v1/health") as response:
        assert response.status == 200


async def test_any_text_comes_back_as_it_was_sent(site: Site) -> None:
    prompt = 'Ünïcode 😀 \u2028 \0 "quoted" \\ data: x\n\nevent: done\r\n'
    run = await site.whole_run(prompt)
    message, *_ = await site.get(f"/threads/{run['threadId']}/messages")
    assert message["content"] == prompt
    async with open_stream(site.http, site.up.url, f"/runs/{run['runId']}/events") as response:
        read = await read_frames(response, "done")
    assert json.loads(read[1].data)["text"] == prompt


# -- golden files


def normalised(stream: bytes) -> bytes:
    for pattern, instead in VARYING:
        stream = re.sub(pattern, instead, stream)
    return stream


@pytest.mark.parametrize(
    ("name", "prompt", "actions"),
    [
        ("answer", "count to 3", []),
        ("thinking", "think about cheese", []),
        ("read", "read notes.txt", []),
        ("write", "write c.txt: hello", ["approve"]),
        ("denied", "run: echo one and also run: echo two", ["deny", "deny"]),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
async def test_a_run_of_the_offline_model_streams_as_its_golden_file(
    site: Site, name: str, prompt: str, actions: list[str]
) -> None:
    run = await site.run(prompt)
    for number, action in enumerate(actions, 1):
        await question(site, run, number)
        await site.post(f"/threads/{run['threadId']}/resume", {"action": action})
    await run_events(site.http, site.up.url, run["runId"])
    stream = await site.raw(f"/runs/{run['runId']}/events")
    golden = GOLDEN / f"{name}.sse"
    if not golden.exists():
        golden.write_bytes(normalised(stream))
        pytest.fail(f"{golden.name} was missing and has been written; look at it.")
    assert normalised(stream) == golden.read_bytes()


async def question(site: Site, run: dict[str, Any], number: int) -> None:
    """Wait for a run's question of this number."""
    count = 0

    def fits(frame: Frame) -> bool:
        nonlocal count
        count += frame.event == "permission.request"
        return count == number

    path = f"/runs/{run['runId']}/events"
    async with open_stream(site.http, site.up.url, path) as response:
        await read_frames(response, fits)


async def test_a_live_stream_has_the_bytes_of_a_replay(site: Site) -> None:
    run = await site.run("slowly count to 20")
    path = f"/threads/{run['threadId']}/agents/root/events?since=0&follow=false"
    live = await site.raw(path)
    replayed = await site.raw(path)
    assert frames_of(live) == frames_of(replayed)
    assert replayed == await site.raw(path)
    assert frames_of(live) == frames_of(await site.raw(f"/runs/{run['runId']}/events"))


def frames_of(stream: bytes) -> list[bytes]:
    """The frames of the log's events, as they stand in a stream."""
    return [block for block in stream.split(b"\n\n") if block.startswith(b"id: ")]
