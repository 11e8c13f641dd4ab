"""Clients are cut off again and again, and the gateway restarts: all of them see the same."""

import asyncio
import hashlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from tests.gateway import Gateways, start_run
from tests.reliability.process import PATIENCE_S, Follower, check_truth

RUNS: Final = 10

#: Two for each connection of a client in the same process, and some more.
FILES: Final = 4_096


class Place:
    """Where the gateway is, and whether it is there."""

    def __init__(self, gateway: Gateway) -> None:
        self.url = gateway.url
        self.up = asyncio.Event()
        self.up.set()


async def storm(
    start_gateway: Gateways, clients: int, cuts: int, count_to: int, patience_s: float
) -> dict[str, Any]:
    """Let clients follow runs through their own cuts and a restart; check what each has seen."""
    gateway = await start_gateway()
    place = Place(gateway)
    began_s = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        runs = [
            await start_run(http, gateway.url, f"slowly count to {count_to}") for _ in range(RUNS)
        ]
        followers = [
            Follower(http, place, runs[number % RUNS], None, cuts) for number in range(clients)
        ]
        following = [asyncio.ensure_future(follower.follow()) for follower in followers]
        async with asyncio.timeout(patience_s):
            # In the middle of it: when the first run has written a good part.
            while len(followers[0].frames) < count_to // 3:
                await asyncio.sleep(0.01)
            place.up.clear()
            gateway = await start_gateway.restart(gateway)
            place.up.set()
            await asyncio.gather(*following)
    seen: dict[str, set[str]] = {}
    for follower in followers:
        check_truth(gateway.data_dir, follower)
        assert follower.events[-1]["status"] == "succeeded"
        digest = hashlib.sha256(b"".join(follower.frames)).hexdigest()
        seen.setdefault(follower.run["runId"], set()).add(digest)
    assert len(seen) == RUNS
    assert all(len(digests) == 1 for digests in seen.values())
    made = sum(follower.cuts for follower in followers)
    assert made >= clients * cuts * 0.9
    frames = sum(len(follower.frames) for follower in followers)
    took_s = round(time.monotonic() - began_s, 1)
    return {"clients": clients, "cuts": made, "frames": frames, "seconds": took_s}


@pytest.fixture
def ready(make_profile: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile whose model writes for a while, and a gateway that leaves in the middle of it."""
    make_profile("assistant", model="demo:assistant")
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)


@pytest.mark.usefixtures("ready")
async def test_clients_that_are_cut_off_again_and_again_see_every_byte_once(
    start_gateway: Gateways,
) -> None:
    await storm(start_gateway, clients=40, cuts=5, count_to=60, patience_s=PATIENCE_S)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ready")
async def test_many_clients_that_are_cut_off_again_and_again_see_every_byte_once(
    start_gateway: Gateways, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    try:
        measured = await storm(start_gateway, 500, 20, 400, patience_s=500)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with capsys.disabled():
        sys.stdout.write(f"{measured}\n")
