"""kill -9 while a conversation is made shorter: it goes on, and one summary stands in the end."""

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from tests.gateway import write_profile
from tests.reliability.process import (
    PATIENCE_S,
    Follower,
    Http,
    check_truth,
    served,
    start,
)

#: Where a run dies that has to make room, and how many summaries are begun by both its lives.
POINTS: Final = (
    ("commit.before:context.pressure", 1),
    ("commit.after:compaction.start", 2),
    ("commit.before:compaction.end", 2),
    ("commit.within:compaction.end", 2),
    ("commit.after:compaction.end", 1),
)

#: The least that a window can be; the built-in model counts a token for each word.
COMPACTION: Final = {"contextWindow": 1_000, "threshold": 0.5, "keepTurns": 1}


@pytest.mark.timeout(120)
async def test_a_conversation_outlives_a_kill_at_each_step_of_being_made_shorter(
    http: Http, tmp_path: Path
) -> None:
    async with served(tmp_path) as gateway:
        write_profile(
            gateway.profiles,
            "long",
            model="demo:assistant",
            tools={"preset": "none"},
            compaction=COMPACTION,
        )
        for point, begun in POINTS:
            body: dict[str, Any] = {}
            for number in range(2):
                run = await start(http, gateway, f"count to 26{number}", "long", **body)
                body = {"threadId": run["threadId"]}
                await Follower(http, gateway, run).follow()
            deaths = len(gateway.deaths)
            gateway.arm(point)
            async with asyncio.timeout(PATIENCE_S):
                run = await start(http, gateway, "count to 3", "long", **body)
                follower = Follower(http, gateway, run)
                await follower.follow()
                await gateway.died(deaths + 1)
                await gateway.up.wait()
            check_truth(gateway.data, follower)
            kinds = [event["type"] for event in follower.events]
            assert follower.events[-1]["status"] == "succeeded", (point, kinds)
            ends = [event for event in follower.events if event["type"] == "compaction.end"]
            assert [end["status"] for end in ends] == ["succeeded"], (point, kinds)
            assert kinds.count("compaction.start") == begun, (point, kinds)
        assert set(gateway.deaths) == {-9}
