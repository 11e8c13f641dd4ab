"""A caller that sends a start again, for whatever reason, starts one run."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from tests.gateway import Gateways, get_json, post_json, run_events, until_status
from tests.provider import Call, Provider, Reply
from tests.reliability.process import Http, ask, rows, served

#: Sockets that send the same request at once.
SOCKETS: Final = 32

BODY: Final = {"profileId": "assistant", "prompt": "go"}

#: Points between the arrival of a start and the answer to it.
POINTS: Final = (
    "start.before",
    "commit.before:user.message",
    "commit.within:user.message",
    "commit.after:user.message",
    "publish.after:user.message",
    "start.after",
)


async def send(
    http: Http, url: str, key: str, body: Any = None
) -> tuple[int, Any, Mapping[str, str]]:
    """Send a start with a key; return status, JSON and headers."""
    async with http.post(
        f"{url}/api/v1/run", json=body or BODY, headers={"Idempotency-Key": key}
    ) as response:
        return response.status, await response.json(), response.headers


async def run_count(http: Http, url: str) -> int:
    return len((await get_json(http, url, "/runs?limit=500"))["items"])


async def test_the_same_key_gives_the_same_answer_while_the_run_is_active_and_for_ever(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["Done."], gate=gate))
    status, first, headers = await send(http, up.url, "a key")
    assert status == 200
    assert "Idempotency-Replayed" not in headers
    await provider.requested()

    async def replayed(up: Gateway) -> None:
        status, answer, headers = await send(http, up.url, "a key")
        assert (status, answer) == (200, first)
        assert headers["Idempotency-Replayed"] == "true"
        assert headers["Location"] == f"/api/v1/runs/{first['runId']}/events"

    await replayed(up)
    gate.set()
    await run_events(http, up.url, first["runId"])
    await replayed(up)
    up = await start_gateway.restart(up)
    await replayed(up)
    assert await run_count(http, up.url) == 1
    assert len(provider.requests) == 1


async def test_a_body_means_the_same_whatever_the_order_of_its_fields(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    _, first, _ = await send(http, up.url, "k")
    backwards: dict[str, Any] = dict(reversed(BODY.items())) | {"model": None, "attachments": []}
    _, again, headers = await send(http, up.url, "k", backwards)
    assert again == first
    assert headers["Idempotency-Replayed"] == "true"


async def test_many_sockets_that_send_it_at_once_start_one_run(
    start_gateway: Gateways, provider: Provider
) -> None:
    up = await start_gateway()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=SOCKETS, force_close=True)
    ) as http:
        answers = await asyncio.gather(*(send(http, up.url, "k") for _ in range(SOCKETS)))
        assert {status for status, _, _ in answers} == {200}
        assert len({json.dumps(answer) for _, answer, _ in answers}) == 1
        replays = ["Idempotency-Replayed" in headers for _, _, headers in answers]
        assert replays.count(False) == 1
        await run_events(http, up.url, answers[0][1]["runId"])
        assert await run_count(http, up.url) == 1
    assert len(provider.requests) == 1


async def test_another_body_under_the_same_key_is_a_conflict_and_starts_nothing(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    _, first, _ = await send(http, up.url, "k")
    for body in (BODY | {"prompt": "other"}, BODY | {"threadId": first["threadId"]}):
        status, answer, _ = await send(http, up.url, "k", body)
        assert (status, answer["error"]) == (409, "idempotency_conflict")
    assert await run_count(http, up.url) == 1


async def test_a_refused_request_stores_nothing(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    up = await start_gateway()
    gate = asyncio.Event()
    provider.reply(Reply(text=["Done."], gate=gate))
    _, busy, _ = await send(http, up.url, "first")
    refused = {
        "busy": (BODY | {"threadId": busy["threadId"]}, 409, "run_in_progress"),
        "later": (BODY | {"profileId": "later"}, 404, "not_found"),
        "model": (BODY | {"model": "nobody:none"}, 400, "unknown_model"),
        "strict": (BODY | {"colour": "red"}, 400, "invalid_request"),
    }
    for key, (body, code, error) in refused.items():
        status, answer, _ = await send(http, up.url, key, body)
        assert (status, answer["error"]) == (code, error)
    assert rows(up.data_dir, "SELECT key FROM idempotency") == [("first",)]
    gate.set()
    await run_events(http, up.url, busy["runId"])
    make_profile("later")
    for key in ("busy", "later"):
        status, started, headers = await send(http, up.url, key, refused[key][0])
        assert status == 200, started
        assert "Idempotency-Replayed" not in headers
    assert await run_count(http, up.url) == 3


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"], ids=["empty", "long", "tab"])
async def test_what_is_no_key_is_said(start_gateway: Gateways, http: Http, key: str) -> None:
    up = await start_gateway()
    status, answer, _ = await send(http, up.url, key)
    assert (status, answer["error"]) == (400, "idempotency_key_invalid")
    assert await run_count(http, up.url) == 0
    status, answer, _ = await send(http, up.url, "x" * 255)
    assert status == 200


async def test_the_key_of_a_deleted_thread_starts_nothing_again(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    _, first, _ = await send(http, up.url, "k")
    async with http.delete(f"{up.url}/api/v1/threads/{first['threadId']}") as response:
        assert response.status == 200
    for _ in range(2):
        status, answer, _ = await send(http, up.url, "k")
        assert (status, answer["error"]) == (410, "thread_deleted")
        up = await start_gateway.restart(up)
    assert await run_count(http, up.url) == 0


async def test_a_key_belongs_to_its_caller_and_outlives_the_token(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway(require_auth=True)
    headers = {"Authorization": f"Bearer {up.token}", "Idempotency-Key": "k"}
    async with http.post(f"{up.url}/api/v1/run", json=BODY, headers=headers) as response:
        first = await response.json()
    await start_gateway.stop(up)
    (up.data_dir / "gateway-token").unlink()
    again = await start_gateway(require_auth=True)
    assert again.token != up.token
    headers["Authorization"] = f"Bearer {again.token}"
    async with http.post(f"{again.url}/api/v1/run", json=BODY, headers=headers) as response:
        assert response.headers["Idempotency-Replayed"] == "true"
        assert await response.json() == first
    headers["Authorization"] = "Bearer " + "w" * 43
    async with http.post(f"{again.url}/api/v1/run", json=BODY, headers=headers) as response:
        assert response.status == 401


async def test_a_run_that_waits_is_not_started_again(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    provider.reply(Reply(calls=[Call("write_file", {"path": "a", "content": "x"})]))
    _, first, _ = await send(http, up.url, "k")
    await until_status(http, up.url, first, "waiting")
    up = await start_gateway.restart(up)
    _, again, headers = await send(http, up.url, "k")
    assert again == first
    assert headers["Idempotency-Replayed"] == "true"
    status, _ = await post_json(http, up.url, f"/runs/{first['runId']}/cancel")
    assert status == 202
    await run_events(http, up.url, first["runId"])


async def kill_between(http: Http, folder: Path, points: tuple[str, ...], sockets: int) -> None:
    """Kill the process on the way of a start that many sockets send, until all have an answer."""
    async with served(folder) as gateway:
        for number, point in enumerate(points):
            gateway.arm(point)
            body = {"profileId": "asks", "prompt": f"prompt {number}"}
            key = {"Idempotency-Key": f"key {number}"}
            async with asyncio.timeout(20):
                answers = await asyncio.gather(
                    *(ask(http, gateway, "POST", "/run", body, **key) for _ in range(sockets))
                )
                await gateway.died(number + 1)
            assert {status for status, _ in answers} == {200}
            assert len({answer["runId"] for _, answer in answers}) == 1
        ((count,),) = rows(gateway.data, "SELECT count(*) FROM runs")
        assert count == len(points)


@pytest.mark.timeout(90)
async def test_a_start_sent_again_after_a_kill_before_its_answer_starts_one_run(
    http: Http, tmp_path: Path
) -> None:
    await kill_between(http, tmp_path, ("commit.within:user.message", "start.after"), sockets=4)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_start_of_many_sockets_outlives_kills_all_the_way(tmp_path: Path) -> None:
    connector = aiohttp.TCPConnector(limit=SOCKETS, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        await kill_between(http, tmp_path, POINTS * 5, SOCKETS)
