"""A storm of reconnects while runs are written and the gateway is killed again and again."""

import asyncio
import contextlib
import hashlib
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.gateway import get_json, start_run
from tests.test_stream import gateway_process, stored_frames

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

THREADS: Final = 5
CLIENTS: Final = 100
KILLS: Final = 8

#: The connection is cut somewhere in the next so many bytes, or when nothing came for so long.
CUT_BYTES_MAX: Final = 30_000
SILENCE_S: Final = 1.0

DEMO: Final = {"model": "demo:assistant"}


@dataclass(slots=True)
class Follower:
    """A client that is cut off all the time, and what it has seen."""

    path: str
    chance: random.Random
    last_event_id: str = ""
    connections: int = 0
    seen: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def seq(self) -> int:
        return int(self.last_event_id.partition(".")[2] or 0)

    async def connect(self, http: aiohttp.ClientSession, url: str) -> None:
        """Read until the connection is cut, wherever that is."""
        headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        cut, body = self.chance.randint(1, CUT_BYTES_MAX), b""
        # A gateway that was killed refuses connections or ends them; so does a silent one here.
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
            async with http.get(f"{url}{self.path}", headers=headers) as response:
                assert response.status == 200
                self.connections += 1
                while len(body) < cut:
                    async with asyncio.timeout(SILENCE_S):
                        data = await response.content.readany()
                    if not data:
                        break
                    body += data
        assert b"event: stream.reset\n" not in body
        for frame in stored_frames(body[:cut]):
            event_id = frame.partition(b"\n")[0].removeprefix(b"id: ").decode()
            assert int(event_id.partition(".")[2]) == self.seq + 1
            self.last_event_id = event_id
            self.seen.update(frame)

    async def follow(self, http: aiohttp.ClientSession, url: str, ends: dict[str, int]) -> None:
        while self.seq < ends.get(self.path, math.inf):
            await self.connect(http, url)
            await asyncio.sleep(self.chance.random() * 0.05)


async def until_all_have_ended(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while (await get_json(http, url, "/runs?status=active"))["items"]:
            await asyncio.sleep(0.1)


async def test_no_client_loses_or_repeats_an_event_however_often_all_are_cut_off(
    profiles: Path, tmp_path: Path
) -> None:
    settings = {"profiles": str(profiles), "data_dir": str(tmp_path / "storm")}
    chance = random.Random()
    ends: dict[str, int] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        async with gateway_process(**settings) as (url, _):
            first = [await start_run(http, url, "count to 10", **DEMO) for _ in range(THREADS)]
            await until_all_have_ended(http, url)
        again = {**settings, "port": urlsplit(url).port}
        threads = [run["threadId"] for run in first]
        paths = [f"/api/v1/threads/{thread}/agents/root/events" for thread in threads]
        followers = [
            Follower(paths[n % THREADS], random.Random(chance.random())) for n in range(CLIENTS)
        ]
        async with asyncio.TaskGroup() as group:
            for follower in followers:
                group.create_task(follower.follow(http, url, ends))
            for _ in range(KILLS):
                async with gateway_process(**again) as (_, process):
                    await until_all_have_ended(http, url)
                    for thread in threads:
                        prompt = chance.choice(["slowly count to 200", "count to 3000"])
                        await start_run(http, url, prompt, threadId=thread, **DEMO)
                    await asyncio.sleep(chance.random() * 2)
                    process.kill()
                    await process.wait()
            async with gateway_process(**again):
                await until_all_have_ended(http, url)
                whole = {}
                for path in paths:
                    async with http.get(f"{url}{path}?follow=false") as response:
                        stored = stored_frames(await response.read())
                    whole[path] = hashlib.sha256(b"".join(stored)).hexdigest()
                    ends[path] = len(stored)
                async with asyncio.timeout(60):
                    while any(follower.seq < ends[follower.path] for follower in followers):
                        await asyncio.sleep(0.1)

    for follower in followers:
        assert follower.seen.hexdigest() == whole[follower.path]
    assert sum(ends.values()) > KILLS * THREADS * 50
    assert sum(follower.connections for follower in followers) > CLIENTS * KILLS
