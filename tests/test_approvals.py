"""People's answers: one inbox over all threads, clocks that jump, restarts, and time that is over.

Answers that race each other are in test_engine.py and in reliability/.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway import approvals
from ownware_gateway.app import Gateway, steady_clock
from ownware_gateway.log.sqlite import ReadConnection
from ownware_gateway.sse import Frame
from tests.gateway import (
    Gateways,
    events,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    until_status,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]

HOUR_MS: Final = 3_600_000
DONE: Final = Reply(text=["Done."])


def write(name: str) -> Reply:
    return Reply(calls=[Call("write_file", {"path": name, "content": name})])


async def ask(http: Http, up: Gateway, provider: Provider, name: str = "a", **body: Any) -> Json:
    """Have a run wait for a person's yes; return its question."""
    provider.default = DONE
    provider.reply(write(name))
    run = await start_run(http, up.url, f"write {name}", **body)
    shown = await until_status(http, up.url, run, "waiting")
    question: Json = shown["pendingPermissions"][0]
    return question


async def resume(http: Http, up: Gateway, asked: Json, action: str = "approve") -> tuple[int, Any]:
    body = {"action": action, "requestId": asked["requestId"]}
    return await post_json(http, up.url, f"/threads/{asked['threadId']}/resume", body)


def in_time(make_profile: Callable[..., Path], timeout_ms: int) -> None:
    security = {"permissionMode": "ask", "hitlTimeoutMs": timeout_ms}
    make_profile("assistant", security=security)


class Clocks:
    """The machine's clocks, as far as they are turned from what they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_ms = 0
        self.boot_ms = 0
        wall, since_boot = time.time_ns, time.clock_gettime_ns
        monkeypatch.setattr(time, "time_ns", lambda: wall() + self.wall_ms * 1_000_000)
        monkeypatch.setattr(
            time, "clock_gettime_ns", lambda which: since_boot(which) + self.boot_ms * 1_000_000
        )

    def suspend(self, ms: int) -> None:
        """Let the machine have slept: both clocks go on, timers do not."""
        self.wall_ms += ms
        self.boot_ms += ms


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


# -- the inbox


async def test_the_inbox_lists_the_questions_of_all_threads_and_where_to_read_on(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    assert (await get_json(http, up.url, "/approvals"))["items"] == []
    asked = [await ask(http, up, provider, name) for name in ("a", "b")]
    inbox = await get_json(http, up.url, "/approvals?status=pending")
    assert inbox["items"] == asked
    path = f"/approvals/events?since={inbox['cursor']}"
    async with open_stream(http, up.url, path) as response:
        await resume(http, up, asked[0])
        read = await read_frames(response, until="permission.response")
    (answered,) = events(read)
    assert answered["requestId"] == asked[0]["requestId"], "nothing between the list and the stream"
    assert (await get_json(http, up.url, "/approvals"))["items"] == asked[1:]


async def test_one_stream_shows_what_all_threads_ask_and_the_answers_and_resumes(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    async with open_stream(http, up.url, "/approvals/events") as response:
        following = asyncio.ensure_future(
            read_frames(response, lambda frame: (frame.id or "").endswith(".6"))
        )
        asked = [await ask(http, up, provider, name) for name in ("a", "b", "c")]
        for question, action in zip(asked, ("approve", "deny", "always"), strict=True):
            assert (await resume(http, up, question, action))[0] == 200
        read = await following
    said = events(read)
    assert [event["seq"] for event in said] == [1, 2, 3, 4, 5, 6]
    for question, request, response_ in zip(asked, said[:3], said[3:], strict=True):
        for event in (request, response_):
            where = {name: event[name] for name in ("threadId", "agentId", "runId", "requestId")}
            assert where == {name: question[name] for name in where}
        assert request["type"] == "permission.request"
        assert request["input"]["path"] in "abc"
        assert request["operationHash"] == question["operationHash"]
        assert response_["type"] == "permission.response"
    assert [event["granted"] for event in said[3:]] == [True, False, True]
    start = json.loads(read[0].data)
    assert (start["stream"], start["maxSeqAtStart"]) == ("approvals", 0)
    whole = [frame for frame in read if frame.id is not None]
    for place in range(len(whole)):
        await check_resumes(http, up, whole, place)
    up = await start_gateway.restart(up)
    await check_resumes(http, up, whole, 2)


async def check_resumes(http: Http, up: Gateway, whole: list[Frame], place: int) -> None:
    """One who comes back with the id of a frame gets the very frames behind it."""
    last = whole[place].id
    async with open_stream(http, up.url, "/approvals/events?since=0", last_event_id=last) as again:
        read = await read_frames(again, until="stream.replay.complete")
    assert [frame for frame in read if frame.id] == whole[place + 1 :]


async def test_the_inbox_stream_has_the_rules_of_every_stream(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    for since, status, code in (
        ("x", 400, "cursor_invalid"),
        ("7", 409, "cursor_ahead"),
        ("0badc0de.0", 410, "cursor_expired"),
    ):
        async with http.get(f"{up.url}/api/v1/approvals/events?since={since}") as response:
            assert (response.status, (await response.json())["error"]) == (status, code)
    path = "/approvals/events"
    async with open_stream(http, up.url, path, last_event_id="0badc0de.9") as response:
        read = await read_frames(response, until="stream.replay.complete")
    assert [frame.event for frame in read] == [
        "stream.start",
        "stream.reset",
        "stream.replay.complete",
    ]
    async with http.get(f"{up.url}/api/v1/approvals?status=decided") as response:
        assert response.status == 400
    for name in ("~approvals", "%7Eapprovals"):
        async with http.get(f"{up.url}/api/v1/threads/{name}") as response:
            assert response.status == 400, "the inbox is no thread"
    assert (await get_json(http, up.url, "/threads"))["items"] == []


async def test_a_request_id_can_be_required(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway(require_request_id=True)
    asked = await ask(http, up, provider)
    path = f"/threads/{asked['threadId']}/resume"
    status, answer = await post_json(http, up.url, path, {"action": "approve"})
    assert (status, answer["error"]) == (400, "invalid_request")
    assert "requestId" in answer["message"]
    assert (await get_json(http, up.url, "/approvals"))["items"] == [asked]
    assert (await resume(http, up, asked))[0] == 200
    await run_events(http, up.url, asked["runId"])
    assert (up.workspace / "a").read_text() == "a"


# -- restarts


@pytest.mark.parametrize("action", ["approve", "deny", "always"])
async def test_a_question_is_answered_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider, action: str
) -> None:
    up = await start_gateway()
    asked = await ask(http, up, provider)
    up = await start_gateway.restart(up)
    assert (await get_json(http, up.url, "/approvals"))["items"] == [asked]
    assert (await resume(http, up, asked, action))[0] == 200
    said = await run_events(http, up.url, asked["runId"])
    assert said[-1]["status"] == "succeeded"
    assert (up.workspace / "a").exists() is (action != "deny")
    provider.reply(write("b"))
    later = await start_run(http, up.url, "more", threadId=asked["threadId"])
    async with open_stream(http, up.url, f"/runs/{later['runId']}/events") as response:
        await read_frames(response, until="done" if action == "always" else "permission.request")


async def test_a_winning_answer_is_named_to_those_who_come_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    asked = await ask(http, up, provider)
    assert (await resume(http, up, asked, "deny"))[0] == 200
    await run_events(http, up.url, asked["runId"])
    up = await start_gateway.restart(up)
    status, answer = await resume(http, up, asked)
    assert (status, answer["error"]) == (409, "permission_already_decided")
    assert (answer["granted"], answer["decidedBy"]) == (False, "user")
    assert answer["requestId"] == asked["requestId"]
    assert not (up.workspace / "a").exists()


async def test_a_question_expires_while_no_gateway_is_there(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
) -> None:
    in_time(make_profile, HOUR_MS)
    up = await start_gateway()
    asked = await ask(http, up, provider)
    await start_gateway.stop(up)
    clocks.wall_ms += HOUR_MS
    up = await start_gateway()
    said = await run_events(http, up.url, asked["runId"])
    (answered,) = (event for event in said if event["type"] == "permission.response")
    assert (answered["granted"], answered["decidedBy"]) == (False, "timeout")
    assert "3600 s" in answered["reason"]
    assert said[-1]["status"] == "succeeded", "a no is a result, not a failure"
    status, answer = await resume(http, up, asked)
    assert (status, answer["decidedBy"], answer["granted"]) == (409, "timeout", False)
    assert not (up.workspace / "a").exists()


async def test_a_question_that_has_time_left_after_a_restart_is_still_open(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
) -> None:
    in_time(make_profile, HOUR_MS)
    up = await start_gateway()
    asked = await ask(http, up, provider)
    await start_gateway.stop(up)
    clocks.wall_ms += HOUR_MS - 60_000
    up = await start_gateway()
    assert (await get_json(http, up.url, "/approvals"))["items"] == [asked]
    assert (await resume(http, up, asked))[0] == 200
    await run_events(http, up.url, asked["runId"])
    assert (up.workspace / "a").exists()


# -- clocks


def test_the_steady_clock_goes_on_whatever_the_wall_clock_says(clocks: Clocks) -> None:
    now = steady_clock()
    before = now()
    assert abs(before - time.time_ns() // 1_000_000) < 1_000
    for jump in (HOUR_MS, -24 * HOUR_MS, 10**12):
        clocks.wall_ms += jump
        assert 0 <= now() - before < 1_000
    clocks.wall_ms = 0
    clocks.suspend(HOUR_MS)
    assert HOUR_MS <= now() - before < HOUR_MS + 1_000
    assert abs(steady_clock()() - now()) < 1_000


async def test_a_wall_clock_that_jumps_expires_no_question_and_stamps_nothing(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
) -> None:
    in_time(make_profile, HOUR_MS)
    up = await start_gateway()
    asked = await ask(http, up, provider)
    for jump in (24 * HOUR_MS, -48 * HOUR_MS):
        clocks.wall_ms += jump
        assert (await get_json(http, up.url, "/approvals"))["items"] == [asked]
        later = await ask(http, up, provider, f"after {jump}")
        assert 0 <= later["requestedAt"] - asked["requestedAt"] < HOUR_MS
        assert (await resume(http, up, later))[0] == 200
    assert (await resume(http, up, asked))[0] == 200
    said = await run_events(http, up.url, asked["runId"])
    stamps = [event["timestamp"] for event in said if "timestamp" in event]
    assert stamps == sorted(stamps)
    assert (up.workspace / "a").exists()


@pytest.mark.parametrize("jump", [24 * HOUR_MS, -24 * HOUR_MS])
async def test_a_question_expires_on_time_though_the_wall_clock_jumped(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
    jump: int,
) -> None:
    in_time(make_profile, 300)
    up = await start_gateway()
    began = time.monotonic()
    asked = await ask(http, up, provider)
    clocks.wall_ms += jump
    said = await run_events(http, up.url, asked["runId"])
    (answered,) = (event for event in said if event["type"] == "permission.response")
    assert answered["decidedBy"] == "timeout"
    assert time.monotonic() - began >= 0.3
    assert asked["expiresAt"] - asked["requestedAt"] <= 300


async def test_a_question_that_expires_sooner_need_not_wait_for_an_earlier_one(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    up = await start_gateway()
    waits = await ask(http, up, provider, "waits")
    for number in range(3):
        make_profile("hasty", security={"permissionMode": "ask", "hitlTimeoutMs": 20 + 20 * number})
        asked = await ask(http, up, provider, f"{number}", profileId="hasty")
        await run_events(http, up.url, asked["runId"])
    assert (await get_json(http, up.url, "/approvals"))["items"] == [waits]


async def test_many_questions_that_expired_together_all_get_their_answer(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(approvals, "EXPIRE_TOGETHER_MAX", 2)
    up = await start_gateway()
    waits = await ask(http, up, provider, "waits")
    make_profile("hasty", security={"permissionMode": "ask", "hitlTimeoutMs": 60_000})
    asked = [await ask(http, up, provider, f"{n}", profileId="hasty") for n in range(5)]
    await start_gateway.stop(up)
    clocks.wall_ms += 120_000
    up = await start_gateway()
    for question in asked:
        said = await run_events(http, up.url, question["runId"])
        assert said[-1]["status"] == "succeeded"
    assert (await get_json(http, up.url, "/approvals"))["items"] == [waits]


async def test_a_question_expires_though_the_log_could_not_be_read_when_its_time_was_over(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(approvals, "LOOK_S_MAX", 0.05)
    in_time(make_profile, 200)
    up = await start_gateway()
    asked = await ask(http, up, provider)
    failures = 3
    execute = ReadConnection.execute

    def fail(connection: ReadConnection, sql: str, parameters: Any = ()) -> Any:
        nonlocal failures
        if "granted IS NULL" in sql and time.time() * 1000 >= asked["expiresAt"] and failures:
            failures -= 1
            raise sqlite3.ProgrammingError
        return execute(connection, sql, parameters)

    monkeypatch.setattr(ReadConnection, "execute", fail)
    said = await run_events(http, up.url, asked["runId"])
    (answered,) = (event for event in said if event["type"] == "permission.response")
    assert answered["decidedBy"] == "timeout"
    assert not failures


async def test_an_answer_after_a_suspend_that_took_too_long_comes_too_late(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    clocks: Clocks,
    make_profile: Callable[..., Path],
) -> None:
    """The timer has slept with the machine; the decision's own guard has not."""
    in_time(make_profile, HOUR_MS)
    up = await start_gateway()
    asked = await ask(http, up, provider)
    clocks.suspend(HOUR_MS + 1_000)
    status, answer = await resume(http, up, asked)
    assert (status, answer["error"]) == (409, "permission_already_decided")
    assert (answer["granted"], answer["decidedBy"]) == (False, "timeout")
    assert not (up.workspace / "a").exists()
    # The next start notices what the timer has missed.
    up = await start_gateway.restart(up)
    said = await run_events(http, up.url, asked["runId"])
    (answered,) = (event for event in said if event["type"] == "permission.response")
    assert answered["decidedBy"] == "timeout"


async def test_an_answer_in_the_last_moment_wins_or_is_refused_but_never_both(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    in_time(make_profile, 60)
    up = await start_gateway()
    provider.default = DONE
    for number in range(8):
        name = f"file_{number}"
        provider.reply(write(name))
        run = await start_run(http, up.url, "go")
        async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
            read = await read_frames(response, until="permission.request")
        asked = json.loads(read[-1].data) | {"threadId": run["threadId"]}
        await asyncio.sleep(max(0, asked["expiresAt"] / 1000 - time.time() - number / 2_000))
        status, answer = await resume(http, up, asked)
        said = await run_events(http, up.url, run["runId"])
        (answered,) = (event for event in said if event["type"] == "permission.response")
        assert answered["granted"] is (status == 200)
        assert (up.workspace / name).exists() is (status == 200)
        if status != 200:
            assert (status, answer["granted"], answer["decidedBy"]) == (409, False, "timeout")
            assert answered["decidedBy"] == "timeout"
