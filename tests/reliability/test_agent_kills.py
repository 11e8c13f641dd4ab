"""kill -9 wherever a run and its agents hand over: each agent runs once, and is told of once."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from ownware_gateway.events import decode
from tests.reliability.process import (
    PATIENCE_S,
    Follower,
    Http,
    Served,
    ask,
    check_truth,
    rows,
    served,
    start,
    transcript,
)
from tests.test_run import check_whole

#: One kill at each named point where something of an agent changes hands, when it is passed for so
#: many times.
POINTS: Final = (
    ("commit.within:agent.spawn", 1),
    ("commit.after:agent.spawn", 1),
    ("begin.after", 1),
    ("park.after", 1),
    ("decide.after", 1),
    ("commit.after:session.end", 1),
    ("commit.within:agent.complete", 1),
    ("publish.before:agent.complete", 2),
)
MORE_POINTS: Final = (
    ("commit.before:agent.spawn", 1),
    ("begin.before", 1),
    ("begin.before", 2),
    ("begin.after", 2),
    ("park.before", 1),
    ("commit.within:permission.request", 1),
    ("commit.after:permission.response", 1),
    ("commit.within:session.end", 1),
    ("publish.after:session.end", 2),
    ("commit.before:agent.complete", 1),
    ("commit.after:agent.complete", 1),
    ("commit.before:session.end", 3),
)


def prompt(name: str) -> str:
    """Two agents at once: one that reads, and one that asks and changes something."""
    return f"ask reader to read a.txt and also ask writer to run: echo x >> {name}"


async def kill_at(http: Http, gateway: Served, point: str, passes: int, name: str) -> None:
    """Have a run and its agents meet their process's death, and check what becomes of them."""
    deaths = len(gateway.deaths)
    gateway.arm(point, passes)
    try:
        async with asyncio.timeout(PATIENCE_S):
            follower = Follower(http, gateway, await start(http, gateway, prompt(name), "tree"))
            await follower.follow()
            await gateway.died(deaths + 1)
            await gateway.up.wait()
    except TimeoutError:
        pytest.fail(f"{point}: reached: {not gateway.armed}, {gateway.said()}")
    assert gateway.deaths[deaths:] == [-9], gateway.said()
    check_truth(gateway.data, follower)
    assert follower.events[-1]["status"] == "succeeded"
    thread_id = follower.run["threadId"]
    kinds = Counter(event["type"] for event in follower.events)
    assert (kinds["agent.spawn"], kinds["agent.complete"]) == (2, 2)
    spawns = [event for event in follower.events if event["type"] == "agent.spawn"]
    said = [
        event for spawn in spawns for event in await agent_said(http, gateway, thread_id, spawn)
    ]
    executed = [e for e in said if e["type"] == "tool.call.execute" and "shell" in e["toolName"]]
    assert len(executed) == 1, "nothing is run twice"
    lost = any(e["type"] == "tool.call.end" and e["isError"] for e in said)
    file = gateway.work / name
    assert (file.read_text() if file.exists() else "") in (("x\n", "") if lost else ("x\n",))


async def agent_said(
    http: Http, gateway: Served, thread_id: str, spawn: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return an agent's events, which must be as they are kept, and one run that ended once."""
    path = f"/threads/{thread_id}/agents/{spawn['agentId']}/events/history"
    status, page = await ask(http, gateway, "GET", path)
    assert status == 200, page
    kept = transcript(gateway.data, thread_id, page["epoch"], spawn["agentId"])
    told = [json.loads(frame.partition(b"\ndata: ")[2]) for frame in kept]
    assert told == page["events"]
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    check_whole([decode(json.dumps(event).encode()) for event in told])
    found = rows(gateway.data, "SELECT id FROM runs WHERE agent_id = ?", spawn["agentId"])
    assert found == [(spawn["runId"],)]
    return told


async def kill_at_each(http: Http, folder: Path, points: Sequence[tuple[str, int]]) -> None:
    async with served(folder) as gateway:
        (gateway.work / "a.txt").write_text("A")
        for number, (point, passes) in enumerate(points):
            await kill_at(http, gateway, point, passes, f"c{number}")
        ((unfinished,),) = rows(gateway.data, "SELECT count(*) FROM runs WHERE terminal_at IS NULL")
        assert unfinished == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", range(2))
async def test_agents_outlive_a_kill_at_each_point_where_they_are_handed_over(
    http: Http, tmp_path: Path, part: int
) -> None:
    await kill_at_each(http, tmp_path, POINTS[part::2])


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_agents_outlive_a_kill_at_more_points(http: Http, tmp_path: Path) -> None:
    await kill_at_each(http, tmp_path, MORE_POINTS)
