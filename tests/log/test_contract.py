"""What every log must do; an implementation is done when it passes."""

import asyncio
import contextlib
import random
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given, settings, strategies as st

from ownware_gateway import sse
from ownware_gateway.events import Event, TextDelta, ToolCallEnd, Usage
from ownware_gateway.log import (
    CHUNK_BYTES_MAX,
    DAY_MS,
    INBOX,
    Append,
    Cancels,
    Commit,
    Decides,
    Drives,
    Log,
    NewRun,
    Opening,
    Permission,
    Private,
    Refused,
    Retention,
    Run,
    RunQuery,
    Spent,
    Starts,
    Stream,
    ThreadQuery,
)
from ownware_gateway.log.sqlite import SqliteLog
from tests.log import (
    PATIENCE_S,
    STREAM,
    Clock,
    answer,
    cancel,
    decides,
    delta,
    drives,
    message,
    question,
    read_chunks,
    reply,
    session_end,
    session_start,
    starts,
    turn_end,
    whole_run,
    words,
)


class Backend(Protocol):
    """Where an implementation keeps its log, so that it can be opened again."""

    clock: Clock

    async def open(self) -> Log: ...

    async def close(self) -> None:
        """Close what a failed test left open."""
        ...

    def held(self) -> contextlib.AbstractContextManager[None]:
        """While this lasts no commit can finish."""
        ...


class SqliteBackend:
    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self._file = folder / "gateway.db"
        self._opened: list[Log] = []

    async def open(self) -> Log:
        self._opened.append(await SqliteLog.open(self._file, self.clock))
        return self._opened[-1]

    async def close(self) -> None:
        for log in self._opened:
            await log.close()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with contextlib.closing(sqlite3.connect(self._file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")


@pytest.fixture(params=[SqliteBackend])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Backend]:
    made: Backend = request.param(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def log(backend: Backend) -> Log:
    return await backend.open()


async def refused(log: Log, append: Append) -> object:
    """Return the winner of an append that must be refused."""
    with pytest.raises(Refused) as raised:
        await log.append(append).wait()
    return raised.value.winner


async def texts(log: Log, stream: Stream = STREAM) -> list[str]:
    events = [record.event() for record in await log.read(stream, 0)]
    return [event.text for event in events if isinstance(event, TextDelta)]


# -- numbers


async def test_every_stream_counts_from_1_whatever_is_appended_at_the_same_time(log: Log) -> None:
    streams = [Stream(f"t{n}", agent) for n in range(4) for agent in ("root", "child")]

    async def write(index: int, stream: Stream) -> None:
        chance = random.Random(index)
        run_id = f"run_{index}"
        assert await log.append(starts(run_id, stream)).wait() == 1
        last = 1
        for _ in range(20):
            count = chance.randint(1, 5)
            commit = log.append(drives(run_id, *[delta() for _ in range(count)], stream=stream))
            if chance.random() < 0.5:
                assert await commit.wait() == last + 1
            else:
                await asyncio.sleep(0)
            last += count
        await log.append(drives(run_id, session_end(run_id), stream=stream)).wait()

    await asyncio.gather(*[write(index, stream) for index, stream in enumerate(streams)])

    for stream in streams:
        records = await log.read(stream, 0)
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        assert all(record.payload.endswith(b',"seq":%d}' % record.seq) for record in records)
        head = await log.head(stream)
        assert head is not None
        assert (head.earliest, head.last) == (1, len(records))
    assert len({(await log.head(stream)).epoch for stream in streams}) == len(streams)  # type: ignore[union-attr]


async def test_the_order_of_events_is_the_order_of_the_calls(log: Log) -> None:
    log.append(starts("run_1"))
    commits = [log.append(drives("run_1", delta(f"{n}"), delta(f"{n}'"))) for n in range(300)]
    firsts = [await commit.wait() for commit in commits]

    assert firsts == list(range(2, 602, 2))
    read = [record.event() for record in await log.read(STREAM, 1, limit=1000)]
    assert [event.text for event in read if isinstance(event, TextDelta)] == [
        text for n in range(300) for text in (f"{n}", f"{n}'")
    ]


async def test_a_commit_may_be_waited_for_by_many_and_by_one_who_gives_up(
    backend: Backend, log: Log
) -> None:
    with backend.held():
        commit = log.append(starts("run_1"))
        waits = [asyncio.create_task(commit.wait()) for _ in range(3)]
        await log.run("run_1")
        waits[0].cancel()
    assert await asyncio.gather(*waits[1:]) == [1, 1]
    assert await commit.wait() == 1


# -- guards


async def test_a_second_run_on_a_stream_is_refused_and_names_the_first(log: Log) -> None:
    await log.append(starts("run_1")).wait()

    winner = await refused(log, starts("run_2"))

    assert isinstance(winner, Run)
    assert (winner.id, winner.status) == ("run_1", "accepted")
    assert await log.run("run_2") is None
    await log.append(drives("run_1", session_end("run_1"))).wait()
    assert await log.append(starts("run_2")).wait() == 3
    run = await log.run("run_2")
    assert run is not None
    assert run.start_seq == 2


async def test_of_many_starts_at_once_one_wins(log: Log) -> None:
    commits = [log.append(starts(f"run_{n}")) for n in range(20)]
    results = await asyncio.gather(*[item.wait() for item in commits], return_exceptions=True)

    assert results[0] == 1
    assert all(isinstance(result, Refused) for result in results[1:])
    head = await log.head(STREAM)
    assert head is not None
    assert head.last == 1


async def test_only_the_latest_generation_drives_a_run(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", delta("in time"))).wait()
    taken = await log.take_over("run_1")

    assert taken.generation == 2
    assert await refused(log, drives("run_1", delta("stale"))) == taken
    assert await refused(log, drives("run_1", delta("ahead"), generation=3)) == taken
    await log.append(drives("run_1", delta("mine"), generation=2)).wait()
    assert await texts(log) == ["in time", "mine"]


async def test_nothing_drives_a_run_that_has_ended_or_never_was(log: Log) -> None:
    await whole_run(log, "run_1")

    winner = await refused(log, drives("run_1", delta()))

    assert isinstance(winner, Run)
    assert winner.status == "succeeded"
    assert await refused(log, drives("run_1", session_end("run_1", "failed"))) == winner
    assert (await log.take_over("run_1")).generation == winner.generation
    assert await refused(log, drives("unknown", delta())) is None


async def test_a_question_is_decided_once(log: Log) -> None:
    log.append(starts("run_1"))
    await log.append(drives("run_1", session_start("run_1"), question("req_1"))).wait()

    answers = [
        log.append(Append(STREAM, Decides("req_1"), [reply("req_1", granted=granted)]))
        for granted in (False, True, True)
    ]
    results = await asyncio.gather(*[item.wait() for item in answers], return_exceptions=True)

    assert results[0] == 4
    for result in results[1:]:
        assert isinstance(result, Refused)
        assert isinstance(result.winner, Permission)
        assert (result.winner.granted, result.winner.decided_by) == (False, "user")
    assert await refused(log, decides("unknown")) is None


async def test_a_question_in_words_is_answered_once(log: Log) -> None:
    log.append(starts("run_1"))
    await log.append(drives("run_1", session_start("run_1"), words("req_1"))).wait()

    answers = [
        log.append(Append(STREAM, Decides("req_1"), [answer("req_1", text)]))
        for text in (None, "red", "green")
    ]
    results = await asyncio.gather(*[item.wait() for item in answers], return_exceptions=True)

    assert results[0] == 4
    for result in results[1:]:
        assert isinstance(result, Refused)
        assert isinstance(result.winner, Permission)
        assert (result.winner.granted, result.winner.kind) == (False, "question")
    assert [item.type for item in await log.read(Stream(INBOX), 0)] == [
        "question.request",
        "question.response",
    ]


async def test_a_question_is_answered_before_it_expires_and_closed_after(
    backend: Backend, log: Log
) -> None:
    expiry = backend.clock.now_ms + 1000
    log.append(starts("run_1"))
    await log.append(drives("run_1", session_start("run_1"), question("req_1", expiry))).wait()
    asked = await log.permission("req_1")

    backend.clock.now_ms = expiry - 1
    assert await refused(log, decides("req_1", late=True)) == asked
    backend.clock.now_ms = expiry
    assert await refused(log, decides("req_1")) == asked
    await log.append(decides("req_1", late=True)).wait()
    closed = await log.permission("req_1")
    assert closed is not None
    assert (closed.decided_by, closed.decided_at) == ("timeout", expiry)


async def test_a_run_is_cancelled_once_and_not_after_its_end(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    asks = Append(STREAM, Cancels("run_1"), [cancel("run_1")])
    await log.append(asks).wait()

    winner = await refused(log, asks)

    assert isinstance(winner, Run)
    assert winner.status == "cancel_requested"
    await log.append(drives("run_1", session_end("run_1", "cancelled"))).wait()
    winner = await refused(log, asks)
    assert isinstance(winner, Run)
    assert winner.status == "cancelled"
    assert await refused(log, Append(STREAM, Cancels("unknown"), [cancel("unknown")])) is None


async def test_a_refused_append_stores_nothing_and_undoes_nothing_of_its_group(
    backend: Backend, log: Log
) -> None:
    await log.append(starts("run_1")).wait()
    private = [Private("message", b"never")]
    with backend.held():
        # The first is on its way; the rest are sure to commit together.
        log.append(drives("run_1", delta("first")))
        await log.run("run_1")
        before = log.append(drives("run_1", delta("before")))
        stale = replace(drives("run_1", delta("stale"), private=private, generation=7), active_ms=9)
        losing = [log.append(stale), log.append(starts("run_2"))]
        after = log.append(drives("run_1", delta("after"), turn_end(Usage(input_tokens=1))))
        other = log.append(starts("run_3", Stream("thread_3")))
    assert await before.wait() == 3
    assert await after.wait() == 4
    assert await other.wait() == 1
    for commit in losing:
        with pytest.raises(Refused):
            await commit.wait()

    assert await texts(log) == ["first", "before", "after"]
    assert await log.private(STREAM, "message") == []
    run = await log.run("run_1")
    assert run is not None
    assert (run.active_ms, run.usage.input_tokens) == (0, 1)
    assert await log.run("run_2") is None


# -- durable before visible


async def test_nobody_sees_an_event_before_its_commit_has_finished(
    backend: Backend, log: Log
) -> None:
    log.append(starts("run_1"))
    await log.append(drives("run_1", session_start("run_1"))).wait()
    waiting = asyncio.create_task(log.wait(STREAM, 2, PATIENCE_S))
    with backend.held():
        commit = log.append(
            drives("run_1", delta(), session_end("run_1"), private=[Private("message", b"1")])
        )
        done = asyncio.create_task(commit.wait())
        assert await log.wait(STREAM, 2, 0.05) is False
        assert await log.chunk(STREAM, 2) is None
        assert await log.read(STREAM, 2) == []
        assert await log.private(STREAM, "message") == []
        head, run = await log.head(STREAM), await log.run("run_1")
        assert head is not None
        assert run is not None
        assert (head.last, run.status) == (2, "running")
        assert not done.done()
        assert not waiting.done()
    assert await done == 3
    assert await waiting is True
    chunk = await log.chunk(STREAM, 2)
    assert chunk is not None
    assert chunk.last_seq == 4


async def test_what_was_acknowledged_is_there_after_the_log_is_opened_again(
    backend: Backend,
) -> None:
    log = await backend.open()
    await log.append(starts("run_1")).wait()
    await log.append(drives("run_1", delta(), delta())).wait()
    log.append(drives("run_1", delta("not waited for")))
    head, secret = await log.head(STREAM), log.secret
    await log.close()

    log = await backend.open()
    again = await log.head(STREAM)
    assert head is not None
    assert again == head._replace(last=4)
    assert log.secret == secret
    assert await log.append(drives("run_1", delta())).wait() == 5
    await log.close()


# -- rows beside the events


async def test_the_row_of_a_run_changes_with_its_events(backend: Backend, log: Log) -> None:
    clock = backend.clock

    async def step(append: Append) -> Run:
        clock.now_ms += 10
        await log.append(append).wait()
        run = await log.run("run_1")
        assert run is not None
        assert run.updated_at == clock.now_ms
        return run

    run = await step(starts("run_1"))
    assert (run.status, run.accepted_at, run.started_at) == ("accepted", clock.now_ms, None)
    assert (run.thread_id, run.agent_id, run.profile_id, run.model) == (
        "thread_1",
        "root",
        "p",
        "m",
    )
    assert (run.timeout_ms, run.generation, run.start_seq, run.end_seq) == (60_000, 1, 0, None)
    run = await step(drives("run_1", session_start("run_1")))
    assert (run.status, run.started_at) == ("running", clock.now_ms)
    run = await step(drives("run_1", question("req_1")))
    assert run.status == "waiting"
    run = await step(decides("req_1"))
    assert run.status == "running"
    cost = Usage(input_tokens=10, output_tokens=1, model="m", cost_usd=0.5)
    run = await step(replace(drives("run_1", turn_end(cost)), active_ms=70))
    assert (run.usage, run.active_ms) == (cost, 70)
    run = await step(drives("run_1", turn_end(cost)))
    assert (run.usage.input_tokens, run.usage.cost_usd, run.active_ms) == (20, 1.0, 70)
    assert not run.terminal
    run = await step(drives("run_1", session_end("run_1", usage=run.usage)))
    assert (run.status, run.terminal, run.terminal_at) == ("succeeded", True, clock.now_ms)
    assert (run.end_seq, run.usage.input_tokens) == (7, 20)
    assert await log.active_run(STREAM) is None


@pytest.mark.parametrize("status", ["failed", "cancelled", "timed_out"])
async def test_a_cancelled_run_stays_so_until_it_ends(log: Log, status: str) -> None:
    log.append(starts("run_1"))
    log.append(drives("run_1", session_start("run_1"), question("req_1")))
    log.append(Append(STREAM, Cancels("run_1"), [cancel("run_1")]))
    await log.append(drives("run_1", reply("req_1", granted=False))).wait()
    run = await log.active_run(STREAM)
    assert run is not None
    assert (run.status, run.cancel_requested_at) == ("cancel_requested", 1_000_000)

    end = session_end("run_1").model_copy(update={"status": status, "code": "why"})
    await log.append(drives("run_1", end)).wait()

    run = await log.run("run_1")
    assert run is not None
    assert (run.status, run.code) == (status, "why")


async def test_a_question_is_a_row_until_it_is_answered(log: Log) -> None:
    log.append(starts("run_1"))
    log.append(starts("run_2", Stream("thread_2")))
    log.append(drives("run_1", session_start("run_1"), question("req_1")))
    asks = drives("run_2", session_start("run_2"), question("req_2"), stream=Stream("thread_2"))
    await log.append(asks).wait()

    asked = await log.permission("req_1")
    assert asked == Permission(
        request_id="req_1",
        run_id="run_1",
        thread_id="thread_1",
        agent_id="root",
        tool_name="shell_execute",
        operation_hash="hash",
        turn_index=3,
        requested_at=1_000_000,
        expires_at=2_000_000,
        granted=None,
        decided_by=None,
        decided_at=None,
    )
    assert [item.request_id for item in await log.pending()] == ["req_1", "req_2"]
    assert [item.request_id for item in await log.pending(run_id="run_2")] == ["req_2"]
    await log.append(decides("req_1")).wait()
    assert await log.permission("req_1") == asked._replace(
        granted=True, decided_by="user", decided_at=1_000_000
    )
    assert [item.request_id for item in await log.pending()] == ["req_2"]
    assert await log.permission("unknown") is None


async def test_the_row_of_a_question_in_words_holds_them_until_it_is_answered(log: Log) -> None:
    log.append(starts("run_1"))
    text = "Half \ud800 of it? \U0001f600"
    await log.append(drives("run_1", session_start("run_1"), words("req_1", text))).wait()

    (asked,) = await log.pending()
    assert asked.kind == "question"
    assert asked.question == {"question": text, "options": ["red", "green"], "multiple": True}
    run = await log.run("run_1")
    assert run is not None
    assert run.status == "waiting"
    await log.append(Append(STREAM, Decides("req_1"), [answer("req_1", "red")])).wait()
    assert await log.permission("req_1") == asked._replace(
        granted=True, decided_by="user", decided_at=1_000_000, question={}
    )
    run = await log.run("run_1")
    assert run is not None
    assert run.status == "running"


async def test_a_run_asks_one_thing_at_a_time_of_whatever_kind(log: Log) -> None:
    log.append(starts("run_1"))
    await log.append(drives("run_1", session_start("run_1"), words("req_1"))).wait()
    for second in (words("req_2"), question("req_2")):
        with pytest.raises(sqlite3.IntegrityError):
            await log.append(drives("run_1", second)).wait()
    assert [item.request_id for item in await log.pending()] == ["req_1"]


async def test_a_thread_is_made_by_its_first_run_and_says_what_is_under_way(
    backend: Backend, log: Log
) -> None:
    assert await log.thread("thread_1") is None
    await log.append(starts("run_1")).wait()
    thread = await log.thread("thread_1")
    assert thread is not None
    assert (thread.title, thread.profile_id, thread.model) == ("of run_1", "p", "m")
    assert (thread.created_at, thread.active_run_id) == (1_000_000, "run_1")

    backend.clock.now_ms += 5
    await log.append(drives("run_1", session_end("run_1"))).wait()
    thread = await log.thread("thread_1")
    assert thread is not None
    assert (thread.created_at, thread.updated_at) == (1_000_000, 1_000_005)
    assert thread.active_run_id is None
    backend.clock.now_ms += 5
    await log.append(starts("run_2")).wait()
    thread = await log.thread("thread_1")
    assert thread is not None
    assert (thread.title, thread.active_run_id) == ("of run_1", "run_2")
    assert thread.updated_at == 1_000_010


async def test_an_empty_thread_can_be_followed_and_takes_the_title_of_its_first_run(
    log: Log,
) -> None:
    made = await log.make_thread("thread_1", title="", profile_id=None)

    assert made == await log.thread("thread_1")
    assert (made.title, made.profile_id, made.model) == ("", None, None)
    head = await log.head(STREAM)
    assert head is not None
    assert (head.earliest, head.last) == (1, 0)
    assert await log.agents("thread_1") == [("root", 0)]
    assert await log.chunk(STREAM, 0) is None
    assert await log.read(STREAM, 0) == []
    assert await log.wait(STREAM, 0, 0.01) is False
    waiting = asyncio.create_task(log.wait(STREAM, 0, PATIENCE_S))
    await log.append(starts("run_1")).wait()
    assert await waiting is True
    named = await log.thread("thread_1")
    assert named is not None
    assert named.title == "of run_1"
    await log.append(starts("run_2", Stream("thread_1", "child"))).wait()
    assert await log.agents("thread_1") == [("root", 1), ("child", 1)]


async def test_no_run_goes_on_in_the_stream_over_all_threads(log: Log) -> None:
    begin = starts("run_1", Stream(INBOX))
    assert isinstance(begin.guard, Starts)
    going_on = Append(begin.stream, begin.guard._replace(goes_on=True), begin.events)
    assert await refused(log, going_on) is None
    unknown = Append(Stream("nobody"), going_on.guard, begin.events)
    assert await refused(log, unknown) is None
    assert await log.unfinished() == []


# -- private facts


async def test_private_facts_belong_to_the_last_event_of_their_append(log: Log) -> None:
    profile, files = Private("profile", b"p"), [Private("attachment", b"%d" % n, n) for n in (0, 1)]
    await log.append(starts("run_1", private=[profile, *files])).wait()
    for text in (b"one", b"two"):
        facts = [Private("message", text)]
        await log.append(drives("run_1", delta(), delta(), private=facts)).wait()

    assert await log.private(STREAM, "profile") == [(1, 0, b"p")]
    assert await log.private(STREAM, "attachment") == [(1, 0, b"0"), (1, 1, b"1")]
    assert await log.private(STREAM, "message") == [(3, 0, b"one"), (5, 0, b"two")]
    assert await log.private(STREAM, "message", after=3) == [(5, 0, b"two")]
    assert await log.private(STREAM, "message", after=5) == []
    assert await log.private(Stream("thread_1", "child"), "message") == []
    assert b"two" not in await read_chunks(log)


async def test_the_last_summary_up_to_a_number_is_found(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    assert await log.last_summary(STREAM, 10) is None
    for text in (b"one", b"two"):
        facts = [Private("summary", text)]
        await log.append(drives("run_1", delta(), delta(), private=facts)).wait()
    assert await log.last_summary(STREAM, 2) is None
    assert await log.last_summary(STREAM, 4) == (3, b"one")
    assert await log.last_summary(STREAM, 5) == (5, b"two")
    assert await log.last_summary(Stream("nobody"), 5) is None


# -- what was spent


async def test_what_a_day_s_answers_cost_is_summed_by_profile(log: Log, backend: Backend) -> None:
    day = backend.clock.now_ms // DAY_MS
    await log.append(starts("run_1")).wait()
    await log.append(starts("run_2", Stream("thread_2"))).wait()
    for run_id, stream in (("run_1", STREAM), ("run_2", Stream("thread_2"))):
        answer = drives(run_id, delta(), stream=stream)
        for active_ms in (100, 250):
            spent = Spent(0.25, 1)
            await log.append(replace(answer, active_ms=active_ms, spent=spent)).wait()
    assert await log.spent("p", day) == Spent(1.0, 4, 500)
    assert await log.spent("p", day + 1) == Spent()
    assert await log.spent("other", day) == Spent()
    backend.clock.now_ms += DAY_MS
    await log.append(replace(drives("run_1", session_end("run_1")), active_ms=300)).wait()
    assert await log.spent("p", day + 1) == Spent(0.0, 0, 50)


async def test_an_append_that_is_refused_spends_nothing(log: Log, backend: Backend) -> None:
    await log.append(starts("run_1")).wait()
    stale = replace(drives("run_1", delta(), generation=7), active_ms=100, spent=Spent(1.0, 1))
    with pytest.raises(Refused):
        await log.append(stale).wait()
    assert await log.spent("p", backend.clock.now_ms // DAY_MS) == Spent()


async def test_what_is_kept_of_an_output_is_found_by_its_event_and_by_the_latest_call(
    log: Log,
) -> None:
    def ended(call_id: str) -> ToolCallEnd:
        return ToolCallEnd(
            tool_call_id=call_id,
            tool_name="t",
            result="",
            is_error=False,
            duration_ms=0,
            turn_index=0,
            output_bytes_raw=0,
        )

    await log.append(starts("run_1")).wait()
    for call_id, body in (("a", b"old"), ("b", b"other"), ("a", b"new")):
        facts = [Private("output", body), Private("image", body + b"!", 11)]
        await log.append(drives("run_1", ended(call_id), private=facts)).wait()
    await log.append(drives("run_1", ended("a"))).wait()
    assert await log.kept_output(STREAM, "a") == b"new"
    assert await log.kept_output(STREAM, "b") == b"other"
    assert await log.kept_output(STREAM, "c") is None
    assert await log.kept_output(Stream("thread_1", "child"), "a") is None
    assert await log.private_at(STREAM, 2, "output") == b"old"
    assert await log.private_at(STREAM, 2, "image", 11) == b"old!"
    assert await log.private_at(STREAM, 2, "image") is None
    assert await log.private_at(STREAM, 5, "output") is None
    assert await log.private_at(Stream("thread_2"), 2, "output") is None


async def test_private_facts_of_many_chunks_come_whole_though_many_have_one_seq(log: Log) -> None:
    def files(letter: bytes) -> list[Private]:
        return [Private("attachment", letter * 30_000, index) for index in range(8)]

    await log.append(starts("run_1", private=files(b"a"))).wait()
    await log.append(drives("run_1", session_end("run_1"))).wait()
    await log.append(starts("run_2", private=files(b"b"))).wait()

    found = await log.private(STREAM, "attachment")

    assert [(seq, index) for seq, index, _ in found] == [(s, i) for s in (1, 3) for i in range(8)]
    assert {body for _, _, body in found} == {b"a" * 30_000, b"b" * 30_000}
    assert [seq for seq, _, _ in await log.private(STREAM, "attachment", after=1)] == [3] * 8


# -- reading


async def test_a_page_holds_what_was_asked_for_and_no_more(log: Log) -> None:
    big = [delta("x" * 10_000) for _ in range(40)]
    log.append(starts("run_1"))
    await log.append(drives("run_1", *big, session_end("run_1"))).wait()

    assert [item.seq for item in await log.read(STREAM, 0)] == list(range(1, 43))
    assert [item.seq for item in await log.read(STREAM, 3, limit=20)] == list(range(4, 24))
    assert [item.seq for item in await log.read(STREAM, 0, limit=1)] == [1]
    assert [item.seq for item in await log.read(STREAM, 0, deltas=False)] == [1, 42]
    assert [item.seq for item in await log.read(STREAM, 1, limit=1, deltas=False)] == [42]
    assert await log.read(STREAM, 42) == []
    assert await log.read(Stream("unknown"), 0) == []


async def test_a_record_gives_back_the_event_that_was_stored(log: Log) -> None:
    events: list[Event] = [
        delta('line\nline \u2028 "quoted" \\ \0 é 漢 😀'),
        question("req_1"),
        turn_end(Usage(input_tokens=3, cost_usd=0.25)),
    ]
    log.append(starts("run_1"))
    await log.append(drives("run_1", *events)).wait()
    assert [record.event() for record in await log.read(STREAM, 1)] == events


async def test_runs_and_threads_are_listed_page_by_page(backend: Backend, log: Log) -> None:
    for n in range(7):
        backend.clock.now_ms += n % 2
        await whole_run(log, f"run_{n}", stream=Stream(f"thread_{n % 3}"))
    await log.append(starts("run_7", Stream("thread_0"))).wait()
    await log.make_thread("thread_9", title="empty", profile_id="other")

    async def run_ids(query: RunQuery) -> list[str]:
        ids = []
        while page := await log.runs(query):
            assert len(page) <= query.limit
            ids += [run.id for _, run in page]
            query = query._replace(before=page[-1][0])
        return ids

    assert await run_ids(RunQuery(limit=3)) == [f"run_{n}" for n in range(7, -1, -1)]
    assert await run_ids(RunQuery(thread_id="thread_1", limit=1)) == ["run_4", "run_1"]
    assert await run_ids(RunQuery(status="active")) == ["run_7"]
    assert len(await run_ids(RunQuery(status="succeeded", limit=2))) == 7
    assert await run_ids(RunQuery(status="failed")) == []

    thread_ids: list[str] = []
    query = ThreadQuery(profile_id="p", limit=1)
    while page := await log.threads(query):
        thread_ids += [thread.id for _, thread in page]
        query = query._replace(before=page[-1][0])
    assert sorted(thread_ids) == ["thread_0", "thread_1", "thread_2"]
    everything = [thread for _, thread in await log.threads(ThreadQuery())]
    assert len(everything) == 4
    times = [thread.updated_at for thread in everything]
    assert times == sorted(times, reverse=True)


async def test_every_run_that_has_not_ended_is_found_after_a_restart_oldest_first(
    backend: Backend,
) -> None:
    log = await backend.open()
    for n in (3, 1, 2):
        await log.append(starts(f"run_{n}", Stream(f"thread_{n}"))).wait()
    await log.append(drives("run_1", session_end("run_1"), stream=Stream("thread_1"))).wait()
    await log.close()

    log = await backend.open()
    assert [run.id for run in await log.unfinished()] == ["run_3", "run_2"]
    assert [(await log.take_over(run.id)).generation for run in await log.unfinished()] == [2, 2]
    await log.close()


# -- waiting


async def test_wait_returns_at_once_for_what_is_there_already(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    assert await log.wait(STREAM, 0, PATIENCE_S) is True
    assert await log.wait(STREAM, 1, 0.01) is False


async def test_no_wake_up_is_lost_between_an_append_and_a_wait(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    chance = random.Random(5)
    async with asyncio.timeout(PATIENCE_S):
        for last in range(1, 250):
            # The two meet at every possible place: each starts a little before or after the other.
            early = chance.random() < 0.5
            waiting = asyncio.create_task(log.wait(STREAM, last, 60))
            if early:
                for _ in range(chance.randint(0, 3)):
                    await asyncio.sleep(0)
            commit = log.append(drives("run_1", delta()))
            if not early:
                await commit.wait()
            assert await waiting is True
            await commit.wait()


async def test_an_append_wakes_all_who_wait_on_its_stream_and_nobody_else(log: Log) -> None:
    other = Stream("thread_2")
    await log.append(starts("run_1")).wait()
    await log.append(starts("run_2", other)).wait()
    waits = [asyncio.create_task(log.wait(STREAM, 1, PATIENCE_S)) for _ in range(50)]
    elsewhere = asyncio.create_task(log.wait(other, 1, PATIENCE_S))
    await log.append(drives("run_1", delta())).wait()

    assert await asyncio.gather(*waits) == [True] * 50
    assert not elsewhere.done()
    log.wake()
    await elsewhere


async def test_a_gateway_that_leaves_ends_every_wait(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    waits = [asyncio.create_task(log.wait(STREAM, 1, 60)) for _ in range(3)]
    waits.append(asyncio.create_task(log.wait(Stream("unknown"), 0, 60)))
    await log.run("run_1")
    log.wake()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*waits)


async def test_one_who_stops_waiting_takes_nothing_from_the_others(log: Log) -> None:
    await log.append(starts("run_1")).wait()
    waits = [asyncio.create_task(log.wait(STREAM, 1, PATIENCE_S)) for _ in range(2)]
    await log.run("run_1")
    waits[0].cancel()
    await log.append(drives("run_1", delta())).wait()
    assert await waits[1] is True
    assert waits[0].cancelled()


# -- chunks


async def test_a_chunk_holds_whole_frames_and_is_never_larger_than_its_limit(log: Log) -> None:
    log.append(starts("run_1"))
    sizes = [*[100] * 900, 40_000, 40_000, CHUNK_BYTES_MAX, 200_000, 10, 65_000, 500]
    await log.append(drives("run_1", *[delta("x" * size) for size in sizes])).wait()
    waiting = asyncio.create_task(log.wait(STREAM, 10_000, PATIENCE_S))
    head = await log.head(STREAM)
    assert head is not None
    expected = {
        record.seq: sse.frame(f"{head.epoch}.{record.seq}", record.type, record.payload)
        for record in await log.read(STREAM, 0, limit=2000)
    }

    after, data = 0, b""
    while (chunk := await log.chunk(STREAM, after)) is not None:
        assert chunk.data == b"".join(expected[n] for n in range(after + 1, chunk.last_seq + 1))
        assert len(chunk.data) <= CHUNK_BYTES_MAX or chunk.last_seq == after + 1
        assert not chunk.ends_run
        after = chunk.last_seq
        data += chunk.data

    assert data == b"".join(expected.values())
    log.wake()
    await waiting


async def test_a_chunk_ends_where_a_run_ends(log: Log) -> None:
    await whole_run(log, "run_1", delta())
    await whole_run(log, "run_2", delta(), delta())
    await log.append(starts("run_3")).wait()

    ends = []
    after = 0
    while (chunk := await log.chunk(STREAM, after)) is not None:
        after = chunk.last_seq
        ends.append((after, chunk.ends_run))
    assert ends == [(3, True), (7, True), (8, False)]


async def test_the_same_cursor_gives_the_same_bytes_live_replayed_and_after_a_restart(
    backend: Backend,
) -> None:
    log = await backend.open()
    await log.append(starts("run_0")).wait()

    async def follow() -> bytes:
        after, data = 0, b""
        while after < 401:
            await log.wait(STREAM, after, PATIENCE_S)
            while (chunk := await log.chunk(STREAM, after)) is not None:
                data += chunk.data
                after = chunk.last_seq
        return data

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        followers = [group.create_task(follow()) for _ in range(5)]
        for n in range(100):
            events = [delta(f"{n} é 😀"), delta("x" * n), delta(""), delta("\n\n")]
            commit = log.append(drives("run_0", *events))
            if n % 7 == 0:
                await commit.wait()
    live = {task.result() for task in followers}
    replayed = await read_chunks(log)
    await log.close()
    log = await backend.open()
    restarted = await read_chunks(log)
    from_the_middle = await read_chunks(log, after=200)
    await log.close()

    assert live == {replayed} == {restarted}
    assert replayed.endswith(from_the_middle)
    assert [
        block.partition(b"\n")[0].rpartition(b".")[2] for block in replayed.split(b"\n\n")[:-1]
    ] == [b"%d" % n for n in range(1, 402)]


# -- all of it, against a list in memory

OPERATIONS = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 6)),
    st.tuples(st.just("big"), st.integers(0, 2), st.integers(1, 80_000)),
    st.tuples(st.just("end"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("stale"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("take over"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, 2), st.integers(0, 12)),
    st.tuples(st.just("reopen"), st.just(0), st.just(0)),
)


class Model:
    """What a log must hold: lists in memory, and the run under way on each stream."""

    def __init__(self) -> None:
        self.streams = [Stream("t0"), Stream("t0", "child"), Stream("t1")]
        self.events: list[list[bytes]] = [[], [], []]
        self.runs: list[tuple[str, int] | None] = [None, None, None]
        self.count = 0
        self.commits: list[Commit] = []

    def store(self, index: int, *events: Event) -> None:
        for event in events:
            body = event.encode()[:-1]
            self.events[index].append(b'%b,"seq":%d}' % (body, len(self.events[index]) + 1))

    async def step(self, log: Log, kind: str, index: int, size: int) -> None:
        stream, active = self.streams[index], self.runs[index]
        if kind == "read":
            await self.compare(log, index, size)
        elif kind == "start":
            self.count += 1
            run_id = f"run_{self.count}"
            if active is not None:
                winner = await refused(log, starts(run_id, stream))
                assert isinstance(winner, Run)
                assert (winner.id, winner.generation) == active
                return
            self.store(index, message(run_id))
            assert await log.append(starts(run_id, stream)).wait() == len(self.events[index])
            self.runs[index] = run_id, 1
        elif active is not None:
            await self.drive(log, kind, index, size)

    async def drive(self, log: Log, kind: str, index: int, size: int) -> None:
        stream, active = self.streams[index], self.runs[index]
        assert active is not None
        run_id, generation = active
        mine = Drives(run_id, generation)
        if kind == "stale":
            stale = Drives(run_id, generation - 1)
            assert isinstance(await refused(log, Append(stream, stale, [delta()])), Run)
        elif kind == "take over":
            # Whatever is still under way is refused from here on, and may be.
            for commit in self.commits:
                await commit.wait()
            assert (await log.take_over(run_id)).generation == generation + 1
            self.runs[index] = run_id, generation + 1
        elif kind == "end":
            self.store(index, session_end(run_id))
            await log.append(Append(stream, mine, [session_end(run_id)])).wait()
            self.runs[index] = None
        else:
            text = delta("x" * size) if kind == "big" else delta("é")
            events = [text] * (1 if kind == "big" else size)
            self.store(index, *events)
            # Not waited for: what is read next must have been committed all the same.
            self.commits.append(log.append(Append(stream, mine, events)))

    async def compare(self, log: Log, index: int, after: int) -> None:
        """What can be seen is a part of what was appended, from its beginning on."""
        stored = self.events[index]
        after = min(after, len(stored))
        read = [record.payload for record in await log.read(self.streams[index], after)]
        assert read == stored[after : after + len(read)]

    async def compare_all(self, log: Log) -> None:
        for index, stream in enumerate(self.streams):
            read = await log.read(stream, 0, limit=10_000)
            assert [record.payload for record in read] == self.events[index]
            if not read:
                assert await log.head(stream) is None
                continue
            parser = sse.Parser()
            parsed = list(parser.feed(await read_chunks(log, stream)))
            assert [frame.data.encode() for frame in parsed] == self.events[index]
            run = await log.active_run(stream)
            assert (run and (run.id, run.generation)) == self.runs[index]


@given(st.lists(OPERATIONS, max_size=40))
@settings(max_examples=30, deadline=None, database=None)
def test_the_log_holds_what_a_list_in_memory_would_hold(
    operations: list[tuple[str, int, int]],
) -> None:
    async def play(backend: Backend) -> None:
        log, model = await backend.open(), Model()
        try:
            for kind, index, size in operations:
                if kind == "reopen":
                    await log.close()
                    log = await backend.open()
                    await model.compare_all(log)
                else:
                    await model.step(log, kind, index, size)
            await log.close()
            await model.compare_all(await backend.open())
        finally:
            await backend.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(SqliteBackend(Path(folder))))


# -- threads that begin with history


def opened(run_id: str, *history: Event, hidden: bool = False, private: Any = ()) -> Append:
    run = NewRun(id=run_id, profile_id="p", model="m", timeout_ms=60_000, title="t")
    guard = Starts(run, opening=Opening(len(history), hidden))
    return Append(STREAM, guard, [*history, message(run_id)], private)


async def test_a_thread_begins_with_history_that_is_nobodys_run(log: Log) -> None:
    past = (
        message("past"),
        session_start("past"),
        session_end("past", usage=Usage(input_tokens=9, model="m")),
    )
    private = [Private("attachment", b"first", place=0), Private("profile", b"last")]
    run = await log.begin(opened("r", *past, private=private))
    assert (run.start_seq, run.status, run.usage) == (3, "accepted", Usage())
    thread = await log.thread(STREAM.thread_id)
    assert thread is not None
    assert (thread.history_to, thread.active_run_id) == (3, "r")
    assert [run.id for _, run in await log.runs(RunQuery())] == ["r"]
    assert await log.private(STREAM, "attachment") == [(1, 0, b"first")]
    assert await log.private(STREAM, "profile") == [(4, 0, b"last")]


async def test_what_opens_a_thread_is_refused_where_there_is_one(log: Log) -> None:
    await whole_run(log, "before")
    with pytest.raises(Refused) as refused:
        await log.begin(opened("r", message("past"), session_end("past")))
    assert refused.value.winner is None
    assert len(await log.read(STREAM, 0)) == 2


async def test_hidden_threads_are_listed_for_those_who_ask(log: Log) -> None:
    await log.begin(opened("r", hidden=True))
    await whole_run(log, "other", stream=Stream("thread_2"))
    for profile_id in (None, "p"):
        shown = await log.threads(ThreadQuery(profile_id))
        assert [thread.id for _, thread in shown] == ["thread_2"]
        every = await log.threads(ThreadQuery(profile_id, hidden=True))
        assert {(thread.id, thread.hidden) for _, thread in every} == {
            ("thread_1", True),
            ("thread_2", False),
        }


async def test_the_history_of_a_hidden_thread_goes_with_its_run(backend: Backend, log: Log) -> None:
    for number, hidden in enumerate((True, False)):
        stream = Stream(f"t{number}")
        begun = opened(f"r{number}", message("past"), session_end("past"), hidden=hidden)
        await log.begin(replace(begun, stream=stream))
        end = session_end(f"r{number}")
        await log.append(drives(f"r{number}", end, stream=stream)).wait()
    backend.clock.now_ms += 10
    while await log.prune(Retention(events_ms=5)):
        pass
    kinds = [[item.type for item in await log.read(Stream(name), 0)] for name in ("t0", "t1")]
    assert kinds == [["stream.gap"], ["user.message", "session.end", "stream.gap"]]
