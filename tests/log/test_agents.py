"""What the log guards for agents that work for a run: one beginning, one question at a time."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from ownware_gateway.events import AgentComplete, AgentSpawn, Usage
from ownware_gateway.log import (
    DAY_MS,
    INBOX,
    Append,
    Drives,
    NewRun,
    Permission,
    Record,
    Refused,
    Retention,
    Run,
    Starts,
    Stream,
)
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import (
    STREAM,
    Clock,
    cancel,
    drives,
    message,
    question,
    reply,
    session_end,
    session_start,
    starts,
    turn_end,
)

CHILD = Stream(STREAM.thread_id, "agent_1")
OTHER = Stream(STREAM.thread_id, "agent_2")
PARENT = Drives("run_1", 1)


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqliteLog]:
    """A log with a run under way."""
    opened = await SqliteLog.open(tmp_path / "gateway.db", Clock())
    opened.append(starts("run_1"))
    await opened.append(drives("run_1", session_start("run_1"))).wait()
    yield opened
    await opened.close()


def begins(run_id: str = "run_2", stream: Stream = CHILD, parent: str = "run_1") -> Append:
    row = NewRun(run_id, "helps", "m", 1_000, "", parent_run_id=parent, name="helper")
    return Append(stream, Starts(row, goes_on=True), [message(run_id, "do")])


async def begun(log: SqliteLog, run_id: str = "run_2", stream: Stream = CHILD) -> Run:
    run = await log.begin(begins(run_id, stream))
    await log.append(drives(run_id, session_start(run_id), stream=stream)).wait()
    return run


async def found(log: SqliteLog, run_id: str) -> Run:
    run = await log.run(run_id)
    assert run is not None
    return run


def asks(run_id: str, request_id: str, stream: Stream) -> Append:
    return Append(stream, Drives(run_id, 1, asks=True), [question(request_id)])


async def refused(log: SqliteLog, append: Append) -> object:
    with pytest.raises(Refused) as info:
        await log.append(append).wait()
    return info.value.winner


async def test_an_agent_begins_once_also_when_it_has_ended(log: SqliteLog) -> None:
    run = await begun(log)
    assert (run.parent_run_id, run.name, run.stream) == ("run_1", "helper", CHILD)
    winner = await refused(log, begins())
    assert isinstance(winner, Run)
    assert winner.id == "run_2"
    await log.append(drives("run_2", session_end("run_2"), stream=CHILD)).wait()
    assert isinstance(await refused(log, begins()), Run)
    assert [record.type for record in await log.read(CHILD, 0)] == [
        "user.message",
        "session.start",
        "session.end",
    ]
    thread = await log.thread(STREAM.thread_id)
    assert thread is not None
    assert (thread.profile_id, thread.title) == ("p", "of run_1")


@pytest.mark.parametrize("how", ["cancelled", "ended"])
async def test_an_agent_does_not_begin_when_its_run_is_to_stop(log: SqliteLog, how: str) -> None:
    end = cancel("run_1") if how == "cancelled" else session_end("run_1")
    await log.append(drives("run_1", end)).wait()
    winner = await refused(log, begins())
    assert isinstance(winner, Run)
    assert winner.id == "run_1"
    assert await log.head(CHILD) is None


async def test_the_stream_of_an_agent_is_there_as_soon_as_it_is_spawned(log: SqliteLog) -> None:
    spawn = AgentSpawn(
        agent_id="agent_1",
        parent_agent_id="root",
        run_id="run_2",
        tool_call_id="call",
        name="helper",
        profile_name="helps",
        model="m",
        task="do",
        time_left_ms=1,
        turn_index=0,
    )
    await log.append(drives("run_1", spawn)).wait()
    head = await log.head(CHILD)
    assert head is not None
    assert head.last == 0


async def test_a_run_rests_only_while_it_is_as_it_was_seen(log: SqliteLog) -> None:
    await begun(log)
    assert not await log.park(PARENT, "agents", agents=0, cancelled=False)
    assert await log.park(PARENT, "agents", agents=1, cancelled=False)
    assert (await found(log, "run_1")).rests_on == "agents"
    assert await log.ready(STREAM.thread_id) == ["run_2"]
    await log.append(drives("run_2", session_end("run_2"), stream=CHILD)).wait()
    assert (await found(log, "run_1")).rests_on is None, "there is something to tell"
    assert not await log.park(PARENT, "agents", agents=1, cancelled=False)
    await log.append(drives("run_1", cancel("run_1"))).wait()
    assert not await log.park(PARENT, "agents", agents=0, cancelled=False)
    with pytest.raises(Refused):
        await log.park(Drives("run_1", 2), "agents", agents=0, cancelled=True)


async def test_nobody_stands_in_line_behind_nobody(log: SqliteLog) -> None:
    await begun(log)
    await begun(log, "run_3", OTHER)
    second = Drives("run_3", 1)
    assert not await log.park(second, "line", agents=0, cancelled=False)
    await log.append(asks("run_2", "first", CHILD)).wait()
    assert await log.park(second, "line", agents=0, cancelled=False)
    answer = Append(CHILD, Drives("run_2", 1), [reply("first")])
    await log.append(answer).wait()
    assert (await found(log, "run_3")).rests_on is None
    assert await log.ready(STREAM.thread_id) == ["run_1", "run_2", "run_3"]


async def test_one_question_is_open_in_a_thread_and_others_do_not_count(log: SqliteLog) -> None:
    await begun(log)
    await begun(log, "run_3", OTHER)
    elsewhere = Stream("thread_2")
    log.append(starts("run_9", elsewhere))
    await log.append(asks("run_9", "elsewhere", elsewhere)).wait()
    await log.append(asks("run_2", "first", CHILD)).wait()
    winner = await refused(log, asks("run_3", "second", OTHER))
    assert isinstance(winner, Permission)
    assert winner.request_id == "first"
    assert [item.request_id for item in await log.pending(thread_id=STREAM.thread_id)] == ["first"]
    await log.append(Append(CHILD, Drives("run_2", 1), [reply("first")])).wait()
    await log.append(asks("run_3", "second", OTHER)).wait()


async def test_a_question_and_its_answer_stand_in_the_streams_of_all_agents_above(
    log: SqliteLog,
) -> None:
    await begun(log)
    await log.begin(begins("run_3", OTHER, parent="run_2"))
    await log.append(drives("run_3", session_start("run_3"), stream=OTHER)).wait()
    heads = {stream: (await log.read(stream, 0))[-1].seq for stream in (STREAM, CHILD, OTHER)}
    await log.append(asks("run_3", "q", OTHER)).wait()
    runs = ["run_1", "run_2", "run_3"]
    assert [(await found(log, run_id)).status for run_id in runs] == ["waiting"] * 3
    await log.append(Append(OTHER, Drives("run_3", 1), [reply("q")])).wait()
    assert [(await found(log, run_id)).status for run_id in runs] == ["running"] * 3

    def told(records: list[Record], where: bytes) -> list[bytes]:
        return [record.payload.rpartition(b',"seq":')[0].replace(where, b"") for record in records]

    own = told(await log.read(OTHER, heads[OTHER]), b"")
    assert len(own) == 2
    for stream in (STREAM, CHILD):
        records = await log.read(stream, heads[stream])
        assert told(records, b',"agentId": "agent_2"') == own
        assert [record.seq for record in records] == [heads[stream] + 1, heads[stream] + 2]
    assert [record.type for record in await log.read(Stream(INBOX), 0)] == [
        "permission.request",
        "permission.response",
    ]


async def test_what_an_agent_has_used_counts_for_its_run_as_it_goes_on(log: SqliteLog) -> None:
    complete = AgentComplete(
        agent_id="agent_1",
        result="",
        status="completed",
        duration_ms=1,
        usage=Usage(input_tokens=5, model="m", cost_usd=0.5),
        turn_index=0,
    )
    await log.append(drives("run_1", complete)).wait()
    usage = (await found(log, "run_1")).usage
    assert (usage.input_tokens, usage.cost_usd) == (5, 0.5)


async def test_an_agent_that_has_asked_no_model_makes_no_secret_of_what_its_run_has_cost(
    log: SqliteLog,
) -> None:
    own = Usage(input_tokens=7, model="m", cost_usd=0.25)
    await log.append(drives("run_1", turn_end(own))).wait()
    for used in (Usage(), Usage(input_tokens=5, model="other", cost_usd=0.5)):
        complete = AgentComplete(
            agent_id="agent_1",
            result="",
            status="error",
            duration_ms=1,
            usage=used,
            turn_index=1,
        )
        await log.append(drives("run_1", complete)).wait()
    usage = (await found(log, "run_1")).usage
    assert (usage.input_tokens, usage.cost_usd, usage.model) == (12, 0.75, "m")


async def test_the_run_that_keeps_a_thread_from_being_deleted_is_the_one_above_all_others(
    log: SqliteLog,
) -> None:
    await begun(log)
    with pytest.raises(Refused) as info:
        await log.delete(STREAM.thread_id, "test")
    assert info.value.winner == await log.run("run_1")


async def test_a_run_at_rest_goes_on_from_the_time_that_it_has_been_active(log: SqliteLog) -> None:
    await begun(log)
    assert await log.park(PARENT, "agents", agents=1, cancelled=False, active_ms=700)
    assert (await found(log, "run_1")).active_ms == 700
    assert (await log.spent("p", Clock()() // DAY_MS)).active_ms == 700


async def test_an_agents_time_counts_for_the_day_where_the_agent_has_appended_it(
    log: SqliteLog,
) -> None:
    drive = drives("run_1", turn_end(Usage()))
    await log.append(replace(drive, active_ms=100)).wait()
    await log.append(replace(drive, active_ms=1_000, charged_ms=850)).wait()
    assert (await found(log, "run_1")).active_ms == 1_000
    assert (await log.spent("p", Clock()() // DAY_MS)).active_ms == 150


async def test_agents_are_counted_through_all_that_they_spawn(log: SqliteLog) -> None:
    await begun(log)
    await begun(log, "run_3", OTHER)
    deep = Stream(STREAM.thread_id, "agent_3")
    await log.begin(begins("run_4", deep, parent="run_3"))
    assert [await log.agents_below(f"run_{number}") for number in range(1, 5)] == [3, 0, 1, 0]
    runs = await log.agent_runs(STREAM.thread_id)
    assert {agent_id: run.id for agent_id, run in runs.items()} == {
        "root": "run_1",
        "agent_1": "run_2",
        "agent_2": "run_3",
        "agent_3": "run_4",
    }


async def test_what_an_agent_has_said_is_kept_until_its_run_has_ended(log: SqliteLog) -> None:
    await begun(log)
    await log.append(drives("run_2", session_end("run_2"), stream=CHILD)).wait()
    policy = Retention(events_ms=-1)
    assert await log.prune(policy) == 0
    assert len(await log.read(CHILD, 0)) == 3
    await log.append(drives("run_1", session_end("run_1"))).wait()
    assert await log.prune(policy) > 0
    assert [record.type for record in await log.read(CHILD, 0)] == ["stream.gap"]
