"""Conversations that are longer than the model's window."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.compaction import INSTRUCTIONS, OMITTED, PIECES_MAX, pieces
from ownware_gateway.conversation import conversation
from ownware_gateway.events import CompactionEnd, Position, UserMessage
from ownware_gateway.log import Retention, Stream
from ownware_gateway.models import UserTurn
from ownware_gateway.run import OVERFLOWS_MAX
from ownware_gateway.sse import Frame
from ownware_gateway.tokens import text_tokens
from ownware_gateway.transcript import RunFacts, load, load_told
from tests.gateway import (
    FAKE_KEY,
    PATIENCE_S,
    Gateways,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
    text,
    until_status,
)
from tests.provider import Call, Provider, Reply
from tests.windowed import Windowed, asks_for_summary, remember, said

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]
StartGateway = Callable[..., Any]
Events = list[dict[str, Any]]

WINDOW: Final = 8_192

#: Some three hundred tokens.
LONG: Final = (
    "Here is something that I want to tell you at some length, number {}: " + "word " * 220
)

AUTO: Final = {"permissionMode": "auto"}

#: Every run is older than this.
SOON_MS: Final = -(10**13)


@pytest.fixture
async def small() -> AsyncIterator[Windowed]:
    async with Windowed(WINDOW) as up:
        yield up


@pytest.fixture
def start(start_gateway: Gateways, small: Windowed, make_profile: MakeProfile) -> StartGateway:
    """Start a gateway whose `assistant` talks to the model of a small window, without tools."""
    make_profile("assistant", compaction={"contextWindow": WINDOW}, tools={"preset": "none"})

    async def start(**settings: Any) -> Gateway:
        return await start_gateway(openai_base_url=small.base_url, **settings)

    return start


@pytest.fixture
def abrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ownware_gateway.app.GRACE_S", 0.0)
    monkeypatch.setattr("ownware_gateway.app.HANDLERS_GRACE_S", 0.05)


async def say(
    http: Http, up: Gateway, prompt: str, thread: str | None = None
) -> tuple[str, Events]:
    """Have a run in a thread; return the thread and the run's events."""
    run = await start_run(http, up.url, prompt, **({"threadId": thread} if thread else {}))
    return run["threadId"], await run_events(http, up.url, run["runId"])


async def talk(
    http: Http, up: Gateway, count: int, first: str = "The code word is: the code word is tulip."
) -> tuple[str, Events]:
    """Begin a conversation and say so much; return its thread and all events."""
    thread, events = await say(http, up, first)
    for number in range(count):
        events += (await say(http, up, LONG.format(number), thread))[1]
    return thread, events


def of(events: Events, kind: str) -> Events:
    return [event for event in events if event["type"] == kind]


def starts_or_ends(frame: Frame) -> bool:
    return frame.event in ("compaction.start", "session.end")


def check_prompts(small: Windowed) -> int:
    """Fail unless every prompt is well-formed; return how often one did not begin as the last.

    It begins with a person, calls have their results, and roles alternate.
    """
    breaks = 0
    for body in small.prompts.spoken:
        messages = [message for message in body["messages"] if message["role"] != "system"]
        assert messages[0]["role"] == "user"
        wanted: list[str] = []
        for message in messages:
            if message["role"] == "tool":
                wanted.remove(message["tool_call_id"])
                continue
            assert not wanted
            wanted = [call["id"] for call in message.get("tool_calls", ())]
        roles = [message["role"] for message in messages if message["role"] != "tool"]
        assert not any(a == b == "user" for a, b in itertools.pairwise(roles))
    for before, after in itertools.pairwise(small.prompts.spoken):
        breaks += after["messages"][: len(before["messages"])] != before["messages"]
    return breaks


# -- a conversation


@pytest.mark.parametrize("turns", [120, pytest.param(500, marks=pytest.mark.soak)])
async def test_a_long_conversation_goes_on_with_a_model_of_a_small_window(
    start: StartGateway, small: Windowed, http: Http, turns: int
) -> None:
    up = await start()
    thread, events = await talk(http, up, turns)
    thread, answer = await say(http, up, "what is the code word?", thread)
    assert text(answer) == "tulip"
    assert small.refused == 0
    assert small.longest <= WINDOW
    assert {end["status"] for end in of(events, "session.end")} == {"succeeded"}
    ends = of(events, "compaction.end")
    assert len(ends) >= turns // 20
    assert all(end["postTokenCount"] < end["preTokenCount"] for end in ends)
    # Nothing is lost to people, and a provider's cache holds between two compactions.
    assert len(await get_json(http, up.url, f"/threads/{thread}/messages")) == 2 * (turns + 2)
    assert check_prompts(small) == len(ends) == len(of(events, "compaction.start"))
    # Not with every prompt, but each time before there is room again.
    assert len(of(events, "context.pressure")) == len(ends)


async def test_one_run_of_very_many_turns_goes_on_with_a_model_of_a_small_window(
    start: StartGateway, small: Windowed, http: Http, make_profile: MakeProfile
) -> None:
    turns = 300

    def work(body: Mapping[str, Any]) -> Reply:
        done = next(numbers)
        if done < turns:
            return Reply(calls=[Call("read_file", {"path": f"{done}.txt"})])
        told = "\n".join(text for _, text in said(body))
        return Reply(text=[f"{'the code word is tulip' in told}, {'the colour is red' in told}"])

    numbers = itertools.count()
    small.answer = work
    make_profile(
        "assistant",
        compaction={"contextWindow": WINDOW},
        security=AUTO,
        maxTurns=turns + 1,
        tools={"preset": "none", "allow": ["read_file"]},
    )
    up = await start()
    for number in range(turns):
        fact = "the colour is red" if number == 0 else ""
        (up.workspace / f"{number}.txt").write_text(f"File {number} {fact}\n" + "data " * 200)
    _, events = await say(http, up, "Read all files; the code word is tulip.")
    assert events[-1]["status"] == "succeeded"
    assert text(events) == "True, True"
    assert small.refused == 0
    assert len(of(events, "tool_result.drop")) > 3
    assert len(of(events, "compaction.end")) > 1
    assert len(of(events, "tool.call.end")) == turns
    changed = len(of(events, "tool_result.drop")) + len(of(events, "compaction.end"))
    assert check_prompts(small) <= changed


async def test_a_result_that_is_larger_than_the_window_is_cut(
    start: StartGateway, small: Windowed, http: Http, make_profile: MakeProfile
) -> None:
    make_profile("assistant", compaction={"contextWindow": WINDOW}, security=AUTO)
    answers = iter([Reply(calls=[Call("read_file", {"path": "big.txt"})]), Reply(text=["Big."])])
    small.answer = lambda _: next(answers)
    up = await start()
    (up.workspace / "big.txt").write_text("line of text\n" * 5_000)
    _, events = await say(http, up, "read it")
    assert (events[-1]["status"], text(events), small.refused) == ("succeeded", "Big.", 0)
    (drop,) = of(events, "tool_result.drop")
    assert drop["keptChars"] > 1_000
    assert "dropped to save room" in said(small.prompts.spoken[-1])[-1][1]
    assert of(events, "compaction.start") == []
    assert len(of(events, "tool.call.end")[0]["result"]) > WINDOW


async def test_the_small_fast_model_writes_the_summary_and_what_it_costs_is_the_run_s(
    start: StartGateway, small: Windowed, http: Http, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        model="openai:gpt-4o",
        smallFastModel="openai:gpt-4o-mini",
        compaction={"contextWindow": WINDOW},
        tools={"preset": "none"},
    )
    up = await start()
    _, events = await talk(http, up, 25)
    assert {body["model"] for body in small.prompts.summed} == {"gpt-4o-mini"}
    end = of(events, "compaction.end")[0]
    assert end["usage"]["model"] == "openai:gpt-4o-mini"
    assert end["usage"]["costUsd"] > 0
    position = events.index(end)
    session = next(event for event in events[position:] if event["type"] == "session.end")
    turn = next(event for event in events[position:] if event["type"] == "turn.end")
    total = session["totalUsage"]
    assert total["inputTokens"] == end["usage"]["inputTokens"] + turn["usage"]["inputTokens"]
    assert total["costUsd"] == pytest.approx(end["usage"]["costUsd"] + turn["usage"]["costUsd"])
    assert total["model"] == "openai:gpt-4o"
    assert (await get_json(http, up.url, f"/runs/{session['runId']}"))["usage"] == total
    ends = of(events, "session.end")
    spent = await get_json(http, up.url, "/usage?profileId=assistant")
    assert spent["costUsd"] == pytest.approx(sum(item["totalUsage"]["costUsd"] for item in ends))
    assert spent["turns"] == 26


async def test_a_secret_that_a_model_puts_into_a_summary_is_masked(
    start: StartGateway, small: Windowed, http: Http
) -> None:
    small.summary = lambda _: Reply(text=["The key is ", FAKE_KEY])
    up = await start()
    _, events = await talk(http, up, 25)
    (end,) = of(events, "compaction.end")
    assert end["summary"] == "The key is [secret]"
    assert FAKE_KEY not in json.dumps(small.prompts.spoken)


# -- a summary that does not come


def status_500(_: Mapping[str, Any]) -> Reply:
    return Reply(status=500, error="The test wants it so.")


def refusal(_: Mapping[str, Any]) -> Reply:
    return Reply(text=["I had rather not."], stop="refusal")


def nothing(_: Mapping[str, Any]) -> Reply:
    return Reply(text=[" "])


def silence(_: Mapping[str, Any]) -> Reply:
    return Reply(hang=True)


def too_long(_: Mapping[str, Any]) -> Reply:
    return Reply(status=400, error="prompt is too long: 9000 tokens > 8192 maximum")


@pytest.mark.parametrize("how", [status_500, refusal, nothing, silence, too_long])
async def test_a_conversation_goes_on_without_the_summary_that_it_does_not_get(
    start: StartGateway,
    small: Windowed,
    http: Http,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Mapping[str, Any]], Reply],
) -> None:
    monkeypatch.setattr("ownware_gateway.relief.SUMMARY_S_MAX", 0.2 if how is silence else 20.0)
    monkeypatch.setattr("ownware_gateway.relief.RETRY_S", 0.0)
    small.summary = how
    up = await start()
    thread, events = await talk(http, up, 40)
    assert {end["status"] for end in of(events, "session.end")} == {"succeeded"}
    assert (small.refused, check_prompts(small) > 0) == (0, True)
    ends = of(events, "compaction.end")
    failed = [end for end in ends if end["status"] == "failed"]
    left_out = [end for end in ends if end["strategy"] == "omission"]
    assert failed
    assert all(end["detail"] and "summary" not in end for end in failed)
    assert left_out
    assert all(end["summary"] == OMITTED for end in left_out)
    # The small window is tried again only after it has filled up further.
    assert len(failed) <= 4 * (len(left_out) + 1)
    small.summary = remember
    events += (await talk(http, up, 0))[1]
    later = [await say(http, up, LONG.format(n), thread) for n in range(25)]
    again = [end for _, said_then in later for end in of(said_then, "compaction.end")]
    assert "succeeded" in {end["status"] for end in again if end["strategy"] == "summary"}


async def test_the_runs_own_model_writes_the_summary_when_the_small_one_cannot(
    start: StartGateway, small: Windowed, http: Http, make_profile: MakeProfile
) -> None:
    make_profile(
        "assistant",
        smallFastModel="openai:tiny",
        compaction={"contextWindow": WINDOW},
        tools={"preset": "none"},
    )
    small.summary = lambda body: nothing(body) if body["model"] == "tiny" else remember(body)
    up = await start()
    _, events = await talk(http, up, 25)
    assert [end["status"] for end in of(events, "compaction.end")] == ["succeeded"]
    assert {body["model"] for body in small.prompts.summed} == {"tiny", "test-model"}


async def test_a_run_that_is_cancelled_while_it_waits_for_a_summary_closes_it(
    start: StartGateway, small: Windowed, http: Http
) -> None:
    small.summary = silence
    up = await start()
    thread, _ = await talk(http, up, 16)
    while True:
        run = await start_run(http, up.url, LONG.format("x"), threadId=thread)
        async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
            last = (await read_frames(response, until=starts_or_ends))[-1]
        if last.event == "compaction.start":
            break
    await post_json(http, up.url, f"/runs/{run['runId']}/cancel")
    events = await run_events(http, up.url, run["runId"])
    assert [event["type"] for event in events[-3:]] == [
        "compaction.end",
        "turn.interrupted",
        "session.end",
    ]
    assert (events[-3]["status"], events[-1]["status"]) == ("failed", "cancelled")


# -- restarts, forks, retention


async def fill(http: Http, up: Gateway, small: Windowed) -> tuple[str, dict[str, Any]]:
    """Talk until a summary is asked for that does not come; return the thread and that run."""
    small.summary = silence
    thread, _ = await say(http, up, "the code word is tulip")
    while True:
        run = await start_run(http, up.url, LONG.format("x"), threadId=thread)
        async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
            last = (await read_frames(response, until=starts_or_ends))[-1]
        if last.event == "compaction.start":
            # The event is there before the summary is asked for.
            async with asyncio.timeout(PATIENCE_S):
                await small.summing.wait()
            return thread, run


@pytest.mark.usefixtures("abrupt")
async def test_a_summary_that_a_restart_cuts_off_is_asked_for_again(
    start: StartGateway, start_gateway: Gateways, small: Windowed, http: Http
) -> None:
    up = await start()
    thread, run = await fill(http, up, small)
    small.summary = remember
    up = await start_gateway.restart(up)
    events = await run_events(http, up.url, run["runId"])
    assert len(of(events, "compaction.start")) == 2
    assert [end["status"] for end in of(events, "compaction.end")] == ["succeeded"]
    assert events[-1]["status"] == "succeeded"
    assert text((await say(http, up, "what is the code word?", thread))[1]) == "tulip"


@pytest.mark.usefixtures("abrupt")
async def test_a_prompt_is_the_same_bytes_after_a_restart_and_no_second_summary_is_asked_for(
    start: StartGateway, start_gateway: Gateways, small: Windowed, http: Http
) -> None:
    up = await start()
    thread, run = await fill(http, up, small)
    small.summary = remember
    small.answer = silence
    up = await start_gateway.restart(up)
    async with asyncio.timeout(PATIENCE_S):
        while not (small.prompts.spoken and any(map(is_summarised, small.prompts.spoken))):
            await asyncio.sleep(0.002)
    hung, summaries = small.prompts.spoken[-1], len(small.prompts.summed)
    small.answer = lambda _: Reply(text=["At last."])
    up = await start_gateway.restart(up)
    events = await run_events(http, up.url, run["runId"])
    assert text(events) == "At last."
    assert json.dumps(small.prompts.spoken[-1]) == json.dumps(hung)
    assert len(small.prompts.summed) == summaries
    up = await start_gateway.restart(up)
    await say(http, up, "and on", thread)
    assert small.prompts.spoken[-1]["messages"][: len(hung["messages"])] == hung["messages"]


def is_summarised(body: Mapping[str, Any]) -> bool:
    return "[To save room" in body["messages"][0]["content"]


async def test_a_fork_before_a_summary_has_everything_and_one_after_it_the_same_prompt(
    start: StartGateway, small: Windowed, http: Http
) -> None:
    up = await start()
    thread, events = await talk(http, up, 21)
    (end,) = of(events, "compaction.end")
    ends = [event["seq"] for event in of(events, "session.end")]
    before = max(seq for seq in ends if seq < end["seq"])
    forks = []
    for at in (before, ends[-1]):
        _, fork = await post_json(http, up.url, f"/threads/{thread}/fork", {"atSeq": at})
        forks.append(fork["id"])
    prompts = []
    for name in (forks[1], thread, forks[0]):
        await say(http, up, LONG.format("x"), name)
        prompts.append(small.prompts.spoken[-1])
    assert prompts[0] == prompts[1]
    assert is_summarised(prompts[0])
    # It is as long as the other was, so its first run has it summarised anew.
    assert is_summarised(prompts[2])
    again = await get_json(
        http, up.url, f"/threads/{forks[0]}/agents/root/events/history?since={before}"
    )
    assert len(of(again["events"], "compaction.start")) == 1


async def test_what_retention_removes_changes_no_prompt_that_a_summary_stands_in(
    start: StartGateway, small: Windowed, http: Http
) -> None:
    up = await start()
    thread, events = await talk(http, up, 21)
    _, fork = await post_json(http, up.url, f"/threads/{thread}/fork", {"atSeq": events[-1]["seq"]})
    await say(http, up, "what is the code word?", fork["id"])
    while await up.log.prune(Retention(deltas_ms=SOON_MS)):
        pass
    up.engine.forget_conversations()
    _, answer = await say(http, up, "what is the code word?", thread)
    assert text(answer) == "tulip"
    assert small.prompts.spoken[-1] == small.prompts.spoken[-2]


async def test_a_thread_from_a_file_goes_on_from_its_summary(
    start: StartGateway, small: Windowed, http: Http
) -> None:
    up = await start()
    thread, _ = await talk(http, up, 21)
    async with http.get(f"{up.url}/api/v1/threads/{thread}/export") as response:
        file = await response.read()
    async with http.post(f"{up.url}/api/v1/threads/import", data=file) as response:
        copy = (await response.json())["id"]
    told = []
    for name in (thread, copy):
        assert text((await say(http, up, "what is the code word?", name))[1]) == "tulip"
        told.append([item for item in said(small.prompts.spoken[-1]) if item[1]])
    assert told[0] == told[1]


async def test_a_run_reads_of_a_long_thread_what_follows_its_last_summary(
    start: StartGateway, start_gateway: Gateways, http: Http, small: Windowed
) -> None:
    up = await start()
    thread, events = await talk(http, up, 40)
    stream, to = Stream(thread), events[-1]["seq"]
    whole = await load(up.log, stream)
    told = await load_told(up.log, stream, to=to)
    assert len(whole) == 41
    assert len(told) < 20
    assert conversation(told) == conversation(whole)


async def test_what_was_always_allowed_stays_so_when_its_run_is_not_read_any_more(
    start: StartGateway,
    start_gateway: Gateways,
    small: Windowed,
    http: Http,
    make_profile: MakeProfile,
) -> None:
    make_profile("assistant", compaction={"contextWindow": WINDOW}, tools={"preset": "coding"})
    plain = small.answer

    def work(body: Mapping[str, Any]) -> Reply:
        role, last = said(body)[-1]
        if role == "user" and last.endswith("write it"):
            return Reply(calls=[Call("write_file", {"path": "a", "content": "b"})])
        return plain(body)

    small.answer = work
    up = await start()
    run = await start_run(http, up.url, "write it")
    await until_status(http, up.url, run, "waiting")
    thread = run["threadId"]
    await post_json(http, up.url, f"/threads/{thread}/resume", {"action": "always"})
    await run_events(http, up.url, run["runId"])
    for number in range(25):
        await say(http, up, LONG.format(number), thread)
    _, events = await say(http, up, "And on.", thread)
    assert len(await load_told(up.log, Stream(thread), to=events[-1]["seq"])) < 25
    up = await start_gateway.restart(up)
    _, events = await say(http, up, "write it", thread)
    assert of(events, "permission.request") == []
    assert events[-1]["status"] == "succeeded"
    # A copy grants nothing, whatever its summary brings along.
    path, body = f"/threads/{thread}/fork", {"atSeq": events[-1]["seq"]}
    _, fork = await post_json(http, up.url, path, body)
    run = await start_run(http, up.url, "write it", threadId=fork["id"])
    await until_status(http, up.url, run, "waiting")


# -- providers that find a prompt too long

TOO_LONG: Final = {
    "openai": "Your input exceeds the context window of this model. Please adjust your input.",
    "anthropic": "prompt is too long: 213462 tokens > 200000 maximum",
    "google": "The input token count (1196265) exceeds the maximum number of tokens allowed.",
    "openrouter": "This endpoint's maximum context length is 8192 tokens.",
    "local": "the request exceeds the available context size, try increasing it",
    "ollama": "the input length exceeds the context length",
}


@pytest.mark.parametrize("name", TOO_LONG)
async def test_a_prompt_that_a_provider_finds_too_long_is_shortened_and_sent_again(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile, name: str
) -> None:
    make_profile("assistant", model=f"{name}:test-model", tools={"preset": "none"})
    base_url = {"anthropic": provider.url, "ollama": provider.url}.get(name, provider.base_url)
    address = "ollama_host" if name == "ollama" else f"{name}_base_url"
    key = {} if name == "ollama" else {f"{name}_api_key": FAKE_KEY}
    up = await start_gateway(**{address: base_url}, **key)
    thread, _ = await say(http, up, "My name is Ada.")
    await say(http, up, "word " * 200, thread)
    provider.reply(
        Reply(status=400, error=TOO_LONG[name], error_type="invalid_request_error"),
        Reply(text=["Their name is Ada."]),
        Reply(text=["Ada."]),
    )
    _, events = await say(http, up, "what is my name?", thread)
    assert (events[-1]["status"], text(events)) == ("succeeded", "Ada.")
    (recovery,) = of(events, "recovery")
    assert (recovery["reason"], recovery["attempt"]) == ("prompt_too_long", 1)
    (end,) = of(events, "compaction.end")
    assert end["summary"] == "Their name is Ada."
    assert "Their name is Ada." in json.dumps(provider.requests[-1].body)
    assert "My name is Ada." not in json.dumps(provider.requests[-1].body)


async def test_a_prompt_that_cannot_be_shortened_ends_the_run(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.default = Reply(status=400, error=TOO_LONG["anthropic"])
    up = await start_gateway()
    _, events = await say(http, up, LONG.format(1))
    assert (events[-1]["status"], events[-1]["code"]) == ("failed", "context_overflow")
    assert len(provider.requests) == 1
    assert "nothing that could be left out" in of(events, "error")[0]["message"]


async def test_a_provider_that_finds_every_prompt_too_long_is_asked_so_often(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", security=AUTO)
    up = await start_gateway()
    thread, _ = await say(http, up, "hello")
    for number in range(8):
        await say(http, up, LONG.format(number), thread)
    asked = len(provider.requests)
    provider.default = Reply(status=400, error=TOO_LONG["openrouter"])
    _, events = await say(http, up, "hello", thread)
    assert (events[-1]["status"], events[-1]["code"]) == ("failed", "context_overflow")
    spoken = [r for r in provider.requests[asked:] if not asks_for_summary(r.body)]
    assert len(spoken) <= OVERFLOWS_MAX + 1


async def test_without_compaction_the_first_refusal_ends_the_run(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: MakeProfile
) -> None:
    make_profile("assistant", compaction={"enabled": False, "contextWindow": 1_000})
    up = await start_gateway()
    thread, events = await say(http, up, LONG.format(0))
    assert of(events, "context.pressure")
    assert of(events, "compaction.start") == []
    provider.reply(Reply(status=400, error=TOO_LONG["anthropic"]))
    _, events = await say(http, up, "hello", thread)
    assert (events[-1]["status"], events[-1]["code"]) == ("failed", "context_overflow")


async def test_the_window_is_what_a_server_of_ones_own_says(
    start_gateway: Gateways, small: Windowed, http: Http, make_profile: MakeProfile
) -> None:
    make_profile("assistant", model="local:test-model", tools={"preset": "none"})
    up = await start_gateway(local_base_url=small.base_url)
    shown = {model["id"]: model for model in await get_json(http, up.url, "/models")}
    assert shown["local:test-model"]["contextWindow"] == WINDOW
    _, events = await talk(http, up, 25)
    assert of(events, "context.pressure")[0]["contextWindow"] == WINDOW
    assert len(of(events, "compaction.end")) == 1
    assert small.refused == 0


# -- the pure parts


def run_of(number: int, prompt: str) -> RunFacts:
    return RunFacts(UserMessage(run_id=f"run_{number}", text=prompt, timestamp=0), number)


def test_a_summary_of_what_is_not_there_any_more_stands_before_all_that_is() -> None:
    end = CompactionEnd(
        strategy="summary",
        status="succeeded",
        pre_token_count=9,
        post_token_count=1,
        saved_percent=88,
        summary="It was long.",
        through=Position(run_id="run_gone"),
        turn_index=0,
    )
    history = [run_of(1, "one"), run_of(2, "two")]
    history[1].reliefs.append(end)
    first, second = (message for message in conversation(history) if isinstance(message, UserTurn))
    assert "It was long." in first.text
    assert first.text.endswith("one")
    assert second.text == "two"


def test_a_text_in_another_script_is_not_taken_for_shorter_than_it_is() -> None:
    assert text_tokens("word " * 100) in range(100, 180)
    assert text_tokens("слово " * 100) in range(200, 450)
    assert text_tokens("言葉" * 100) in range(150, 300)


def test_of_a_text_of_very_many_pieces_the_oldest_are_left_out() -> None:
    made = pieces([f"{number} " + "word " * 100 for number in range(200)], 500)
    assert len(made) == PIECES_MAX
    assert made[0].startswith(OMITTED)
    assert made[-1].rstrip().endswith("word")
    assert "199 " in made[-1]
    assert all(text_tokens(piece) < 700 for piece in made)


def test_the_instructions_name_no_person_and_fit_into_a_small_window() -> None:
    assert text_tokens(INSTRUCTIONS) < 600
