"""A question of the agent's own: the run waits for words, and what is said is the call's result.

Answers that race each other, and a process that dies meanwhile, are in reliability/.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from ownware_gateway.app import Gateway
from ownware_gateway.doors.native.bodies import ANSWER_BYTES_MAX
from ownware_gateway.log import Retention
from ownware_gateway.tools.ask import OPTIONS_MAX
from tests.gateway import (
    FAKE_KEY,
    Gateways,
    events,
    get_json,
    open_stream,
    post_json,
    read_frames,
    run_events,
    start_run,
)
from tests.provider import Call, Provider, Reply

Http = aiohttp.ClientSession
Json = dict[str, Any]

DONE: Final = Reply(text=["Done."])
OPTIONS: Final = ["red", "green"]

#: Looks like a key that no gateway knows.
STRANGE_KEY: Final = "ghp_" + "s" * 30

WRITE: Final = Call("write_file", {"path": "a.txt", "content": "x"})


def asks(question: str = "Which one?", **more: Any) -> Call:
    return Call("ask_user", {"question": question, **more})


async def begin(http: Http, up: Gateway, provider: Provider, *calls: Call, **body: Any) -> Json:
    """Start a run whose model makes these calls, and then is done."""
    provider.default = DONE
    provider.reply(Reply(calls=calls))
    return await start_run(http, up.url, "go", **body)


async def question(http: Http, up: Gateway, run: Json, number: int = 1) -> Json:
    """Return the run's question of this number, of whatever kind."""
    async with open_stream(http, up.url, f"/runs/{run['runId']}/events") as response:
        left = number

        def is_it(frame: Any) -> bool:
            nonlocal left
            left -= frame.event in ("question.request", "permission.request")
            return not left

        return events(await read_frames(response, until=is_it))[-1]


async def resume(http: Http, up: Gateway, run: Json, **body: Any) -> tuple[int, Any]:
    return await post_json(http, up.url, f"/threads/{run['threadId']}/resume", body)


async def answered(http: Http, up: Gateway, run: Json, answer: str) -> list[Json]:
    """Answer the run's question and return all of the run's events."""
    status, said = await resume(http, up, run, action="answer", answer=answer)
    assert status == 200, said
    return await run_events(http, up.url, run["runId"])


def only(said: list[Json], event_type: str) -> Json:
    (found,) = [event for event in said if event["type"] == event_type]
    return found


def results(said: list[Json]) -> list[tuple[str, str, bool]]:
    ends = [event for event in said if event["type"] == "tool.call.end"]
    return [(event["toolName"], event["result"], event["isError"]) for event in ends]


def told(provider: Provider) -> list[str]:
    """The results that the model was given last."""
    messages = provider.requests[-1].body["messages"]
    return [message["content"] for message in messages if message["role"] == "tool"]


@pytest.fixture
async def up(start_gateway: Gateways) -> Gateway:
    return await start_gateway()


# -- asked and answered


async def test_a_run_waits_for_words_and_they_are_the_result(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks(options=OPTIONS, multiple=True))
    asked = await question(http, up, run)
    assert asked.pop("expiresAt") > 0
    (shown,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert asked == {
        "type": "question.request",
        "requestId": shown["requestId"],
        "toolCallId": asked["toolCallId"],
        "toolName": "ask_user",
        "question": "Which one?",
        "options": OPTIONS,
        "multiple": True,
        "operationHash": shown["operationHash"],
        "turnIndex": 0,
        "seq": asked["seq"],
    }
    assert shown["kind"] == "question"
    assert (shown["question"], shown["options"], shown["multiple"]) == ("Which one?", OPTIONS, True)
    waiting = await get_json(http, up.url, f"/runs/{run['runId']}")
    assert (waiting["status"], waiting["pendingPermissions"]) == ("waiting", [shown])

    status, said = await resume(
        http, up, run, action="answer", requestId=asked["requestId"], answer="red, and blue"
    )
    assert (status, said) == (
        200,
        {
            "threadId": run["threadId"],
            "requestId": asked["requestId"],
            "action": "answer",
            "approved": True,
            "pendingCount": 0,
        },
    )
    seen = await run_events(http, up.url, run["runId"])
    assert [event["type"] for event in seen if not event["type"].startswith("text.")] == [
        "user.message",
        "session.start",
        "turn.start",
        "tool.call.start",
        "tool.call.args_delta",
        "question.request",
        "question.response",
        "tool.call.end",
        "turn.end",
        "turn.start",
        "turn.end",
        "session.end",
    ]
    response = only(seen, "question.response")
    assert (response["answer"], response["decidedBy"]) == ("red, and blue", "user")
    assert results(seen) == [("ask_user", "red, and blue", False)]
    assert told(provider) == ["red, and blue"]
    assert (await get_json(http, up.url, "/approvals"))["items"] == []
    messages = await get_json(http, up.url, f"/threads/{run['threadId']}/messages")
    part = messages[1]["parts"][0]
    assert (part["result"], part["granted"]) == ("red, and blue", True)
    assert part["input"] == {"question": "Which one?", "options": OPTIONS, "multiple": True}


async def test_a_question_that_is_declined_is_a_result_and_not_the_end(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks())
    await question(http, up, run)
    status, said = await resume(http, up, run, action="deny")
    assert (status, said["approved"]) == (200, False)
    seen = await run_events(http, up.url, run["runId"])
    response = only(seen, "question.response")
    assert (response["answer"], response["decidedBy"]) == (None, "user")
    assert results(seen) == [("ask_user", "The person declined to answer.", True)]
    assert seen[-1]["status"] == "succeeded"
    status, said = await resume(
        http, up, run, action="answer", answer="red", requestId=response["requestId"]
    )
    assert (status, said["error"]) == (409, "permission_already_decided")
    assert (said["granted"], said["decidedBy"]) == (False, "user")
    assert "closed without an answer by user" in said["message"]


async def test_a_question_that_nobody_answers_expires(
    start_gateway: Gateways, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    make_profile("assistant", security={"hitlTimeoutMs": 100})
    up = await start_gateway()
    run = await begin(http, up, provider, asks())
    seen = await run_events(http, up.url, run["runId"])
    response = only(seen, "question.response")
    assert (response["answer"], response["decidedBy"]) == (None, "timeout")
    assert results(seen) == [("ask_user", "Nobody answered within 0.1 s.", True)]
    assert seen[-1]["status"] == "succeeded"
    assert "Nobody answered within 0.1 s." in told(provider)[0]


async def test_a_run_that_is_cancelled_while_it_asks_closes_its_question(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks())
    await question(http, up, run)
    assert (await post_json(http, up.url, f"/runs/{run['runId']}/cancel"))[0] == 202
    seen = await run_events(http, up.url, run["runId"])
    response = only(seen, "question.response")
    assert (response["answer"], response["decidedBy"]) == (None, "cancel")
    assert results(seen) == [("ask_user", "Not answered: the run ended.", True)]
    assert seen[-1]["status"] == "cancelled"
    assert (await get_json(http, up.url, "/approvals"))["items"] == []


async def test_a_question_is_answered_after_a_restart(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway()
    run = await begin(http, up, provider, asks(options=OPTIONS))
    await question(http, up, run)
    before = (await get_json(http, up.url, "/approvals"))["items"]
    up = await start_gateway.restart(up)
    assert (await get_json(http, up.url, "/approvals"))["items"] == before
    seen = await answered(http, up, run, "2")
    assert results(seen) == [("ask_user", "2", False)]
    assert seen[-1]["status"] == "succeeded"


# -- several, and among other calls


async def test_questions_come_one_after_the_other_when_free_calls_have_run(
    up: Gateway, http: Http, provider: Provider
) -> None:
    listing = Call("list_files", {})
    run = await begin(http, up, provider, asks("First?"), WRITE, asks("Second?"), listing)
    first = await question(http, up, run)
    assert first["question"] == "First?"
    assert (await resume(http, up, run, action="answer", answer="one"))[0] == 200
    second = await question(http, up, run, 2)
    assert second["toolName"] == "write_file"
    assert (await resume(http, up, run, action="always"))[0] == 200
    third = await question(http, up, run, 3)
    assert third["question"] == "Second?"
    assert not (up.workspace / "a.txt").exists(), "what was granted waits for the last question"
    seen = await answered(http, up, run, "two")
    assert [name for name, *_ in results(seen)] == [
        "list_files",
        "ask_user",
        "ask_user",
        "write_file",
    ]
    assert (up.workspace / "a.txt").exists()
    assert [result for result in told(provider) if result in ("one", "two")] == ["one", "two"]


async def test_no_always_spares_a_question(up: Gateway, http: Http, provider: Provider) -> None:
    run = await begin(http, up, provider, asks(), WRITE)
    await question(http, up, run)
    await resume(http, up, run, action="answer", answer="yes to all")
    await question(http, up, run, 2)
    await resume(http, up, run, action="always")
    await run_events(http, up.url, run["runId"])
    again = await begin(http, up, provider, asks(), WRITE, threadId=run["threadId"])
    asked = await question(http, up, again)
    assert asked["type"] == "question.request"
    seen = await answered(http, up, again, "no")
    assert [event["type"] for event in seen].count("permission.request") == 0
    assert results(seen)[-1][:2] == ("ask_user", "no")


async def test_a_call_of_an_answer_that_was_cut_off_asks_nobody(
    up: Gateway, http: Http, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ownware_gateway.run.RETRY_S", 0.01)
    provider.default = DONE
    provider.reply(Reply(calls=[asks("Cut?")], cut_after=1), Reply(calls=[asks("Whole?")]))
    run = await start_run(http, up.url, "go")
    assert (await question(http, up, run))["question"] == "Whole?"
    seen = await answered(http, up, run, "yes")
    assert only(seen, "recovery")["supersedes"] == 0
    assert only(seen, "question.request")["turnIndex"] == 1
    assert results(seen) == [("ask_user", "yes", False)]


# -- who may ask


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"security": {"permissionMode": "ask"}}, id="ask"),
        pytest.param({"security": {"permissionMode": "auto"}}, id="auto"),
        pytest.param({"security": {"permissionMode": "deny"}}, id="deny"),
        pytest.param(
            {
                "security": {"permissionMode": "allowlist"},
                "tools": {"preset": "coding", "allow": ["ask_user"]},
            },
            id="listed",
        ),
        pytest.param({"tools": {"preset": "readonly"}}, id="readonly"),
        pytest.param({"policies": [{"tool": "*", "decision": "ask"}]}, id="a rule that asks"),
        pytest.param(
            {
                "security": {"permissionMode": "allowlist"},
                "policies": [{"tool": "ask_user", "decision": "allow"}],
            },
            id="a rule that allows",
        ),
    ],
)
async def test_a_question_is_asked_at_once_wherever_a_tool_that_reads_would_run(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: Callable[..., Path],
    fields: Json,
) -> None:
    make_profile("assistant", **fields)
    up = await start_gateway()
    run = await begin(http, up, provider, asks())
    assert (await question(http, up, run))["type"] == "question.request"
    seen = await answered(http, up, run, "this one")
    assert results(seen) == [("ask_user", "this one", False)]


@pytest.mark.parametrize(
    ("fields", "says", "rule"),
    [
        pytest.param(
            {"security": {"permissionMode": "allowlist"}}, "only runs what", None, id="not listed"
        ),
        pytest.param(
            {"policies": [{"tool": "ask_*", "decision": "deny"}]},
            "A rule of the profile denies this",
            "policies.0",
            id="a rule",
        ),
        pytest.param(
            {"tools": {"preset": "coding", "deny": ["ask_user"]}},
            "no tool named 'ask_user'",
            None,
            id="taken away",
        ),
        pytest.param(
            {"tools": {"preset": "none"}}, "no tool named 'ask_user'", None, id="no preset"
        ),
    ],
)
async def test_a_profile_can_keep_its_agent_from_asking(
    start_gateway: Gateways,
    http: Http,
    provider: Provider,
    make_profile: Callable[..., Path],
    fields: Json,
    says: str,
    rule: str | None,
) -> None:
    make_profile("assistant", **fields)
    up = await start_gateway()
    run = await begin(http, up, provider, asks())
    seen = await run_events(http, up.url, run["runId"])
    assert "question.request" not in {event["type"] for event in seen}
    end = only(seen, "tool.call.end")
    assert end["isError"]
    assert says in end["result"]
    assert (end.get("rule") or "").startswith(rule or "")


async def test_an_answer_counts_though_the_profile_lets_nobody_ask_any_more(
    up: Gateway, http: Http, provider: Provider, make_profile: Callable[..., Path]
) -> None:
    run = await begin(http, up, provider, asks())
    await question(http, up, run)
    make_profile("assistant", tools={"preset": "none"})
    seen = await answered(http, up, run, "red")
    assert results(seen) == [("ask_user", "red", False)]


# -- what may be asked


@pytest.mark.parametrize(
    ("more", "options", "multiple"),
    [
        ({}, None, False),
        ({"options": []}, None, False),
        ({"multiple": True}, None, False),
        ({"options": ["a"] * OPTIONS_MAX}, ["a"] * OPTIONS_MAX, False),
        ({"options": OPTIONS, "multiple": True}, OPTIONS, True),
    ],
)
async def test_options_are_there_where_there_is_something_to_choose(
    up: Gateway,
    http: Http,
    provider: Provider,
    more: Json,
    options: list[str] | None,
    multiple: bool,
) -> None:
    run = await begin(http, up, provider, asks(**more))
    asked = await question(http, up, run)
    (item,) = (await get_json(http, up.url, "/approvals"))["items"]
    for shown in (asked, item):
        assert (shown["options"], shown["multiple"]) == (options, multiple)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"question": " "},
        {"question": 7},
        {"question": "?", "options": ["a"] * (OPTIONS_MAX + 1)},
        {"question": "?", "options": "red"},
        {"question": "?", "options": [""]},
        {"question": "?", "multiple": "yes"},
        {"question": "?", "answers": []},
    ],
    ids=json.dumps,
)
async def test_a_question_that_is_none_is_told_to_the_model(
    up: Gateway, http: Http, provider: Provider, arguments: Json
) -> None:
    run = await begin(http, up, provider, Call("ask_user", arguments))
    seen = await run_events(http, up.url, run["runId"])
    end = only(seen, "tool.call.end")
    assert end["isError"]
    assert "do not fit" in end["result"]
    assert seen[-1]["status"] == "succeeded"


@pytest.mark.parametrize(
    "text",
    [
        "é \U0001f600 \u202e\u2028\u0000 \x1b[2J",
        "\U0001f600" * (ANSWER_BYTES_MAX // 4),
        "x" * ANSWER_BYTES_MAX,
    ],
    ids=["odd characters", "as long as may be, of many bytes", "as long as may be"],
)
async def test_any_text_is_asked_and_answered_as_it_is(
    up: Gateway, http: Http, provider: Provider, text: str
) -> None:
    run = await begin(http, up, provider, asks(text[:4_000]))
    assert (await question(http, up, run))["question"] == text[:4_000]
    (item,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert item["question"] == text[:4_000]
    seen = await answered(http, up, run, text)
    assert only(seen, "question.response")["answer"] == text
    assert told(provider) == [text]


async def test_half_a_character_stops_neither_a_question_nor_its_answer(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, Call("ask_user", '{"question": "a\\ud83d"}'))
    assert (await question(http, up, run))["question"] == "a\ufffd"
    assert (await get_json(http, up.url, "/approvals"))["items"][0]["question"].startswith("a")
    headers = {"Content-Type": "application/json"}
    path = f"{up.url}/api/v1/threads/{run['threadId']}/resume"
    body = b'{"action": "answer", "answer": "b\\ud83d"}'
    async with http.post(path, data=body, headers=headers) as response:
        assert response.status == 200
    seen = await run_events(http, up.url, run["runId"])
    assert results(seen) == [("ask_user", "b\ufffd", False)]


async def test_secrets_are_masked_in_questions_options_and_answers(
    up: Gateway, http: Http, provider: Provider
) -> None:
    question_ = f"Is {STRANGE_KEY} right?"
    run = await begin(http, up, provider, asks(question_, options=[f"no, {STRANGE_KEY}"]))
    asked = await question(http, up, run)
    assert (asked["question"], asked["options"]) == ("Is [secret] right?", ["no, [secret]"])
    (item,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert item["question"] == "Is [secret] right?"
    seen = await answered(http, up, run, f"it is {FAKE_KEY}, or {STRANGE_KEY}")
    assert only(seen, "question.response")["answer"] == "it is [secret], or [secret]"
    assert told(provider) == ["it is [secret], or [secret]"]
    assert FAKE_KEY not in json.dumps(seen)
    assert STRANGE_KEY not in json.dumps(seen)


async def test_a_secret_of_the_gateway_is_not_asked_about(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks(f"Is it {FAKE_KEY}?"))
    seen = await run_events(http, up.url, run["runId"])
    assert only(seen, "tool.call.end")["rule"] == "floor.secrets"
    assert FAKE_KEY not in json.dumps(seen)


# -- answers that are none


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"action": "approve"}, "wants an answer in words"),
        ({"action": "always"}, "wants an answer in words"),
        ({"action": "approve", "answer": "red"}, "wants an answer in words"),
        ({"action": "answer"}, "needs words"),
        ({"action": "answer", "answer": None}, "needs words"),
        ({"action": "answer", "answer": " \n"}, "needs words"),
        ({"action": "answer", "answer": 7}, "'answer'"),
        ({"action": "answer", "answer": "x" * (ANSWER_BYTES_MAX + 1)}, "16384 bytes"),
        ({"action": "answer", "answer": "é" * (ANSWER_BYTES_MAX // 2 + 1)}, "16384 bytes"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
async def test_what_is_no_answer_is_refused_and_the_question_stays_open(
    up: Gateway, http: Http, provider: Provider, body: Json, says: str
) -> None:
    run = await begin(http, up, provider, asks())
    await question(http, up, run)
    status, said = await resume(http, up, run, **body)
    assert (status, said["error"]) == (400, "invalid_request")
    assert says in said["message"]
    assert len((await get_json(http, up.url, "/approvals"))["items"]) == 1
    assert results(await answered(http, up, run, "red")) == [("ask_user", "red", False)]


async def test_words_for_a_permission_neither_allow_nor_deny_it(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, WRITE)
    await question(http, up, run)
    (before,) = (await get_json(http, up.url, "/approvals"))["items"]
    assert before["kind"] == "permission"
    assert "question" not in before
    status, said = await resume(http, up, run, action="answer", answer="yes")
    assert (status, said["error"]) == (400, "invalid_request")
    assert "whether a tool may run" in said["message"]
    assert (await get_json(http, up.url, "/approvals"))["items"] == [before]
    assert (await resume(http, up, run, action="approve"))[0] == 200
    await run_events(http, up.url, run["runId"])
    assert (up.workspace / "a.txt").exists()


async def test_an_answer_can_name_the_very_question_that_it_is_for(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks())
    asked = await question(http, up, run)
    body = {"action": "answer", "answer": "red", "operationHash": "0" * 64}
    status, said = await resume(http, up, run, **body)
    assert (status, said["error"]) == (409, "permission_operation_mismatch")
    assert said["operationHash"] == asked["operationHash"]
    body["operationHash"] = asked["operationHash"]
    assert (await resume(http, up, run, **body))[0] == 200


async def test_a_decision_is_no_answer_but_can_decline(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks())
    asked = await question(http, up, run)
    path = f"/runs/{run['runId']}/permissions/{asked['requestId']}/decision"
    body = {"decision": "approve", "operationHash": asked["operationHash"]}
    status, said = await post_json(http, up.url, path, body)
    assert (status, said["error"]) == (400, "invalid_request")
    status, said = await post_json(http, up.url, path, body | {"decision": "deny"})
    assert (status, said["approved"]) == (200, False)
    seen = await run_events(http, up.url, run["runId"])
    assert results(seen) == [("ask_user", "The person declined to answer.", True)]


# -- where it is kept


async def test_the_stream_of_all_questions_shows_both_kinds(
    up: Gateway, http: Http, provider: Provider
) -> None:
    async with open_stream(http, up.url, "/approvals/events") as response:
        run = await begin(http, up, provider, asks(options=OPTIONS), WRITE)
        asked = await question(http, up, run)
        await resume(http, up, run, action="answer", answer="green")
        await question(http, up, run, 2)
        await resume(http, up, run, action="deny")
        said = events(await read_frames(response, lambda f: (f.id or "").endswith(".4")))
    assert [event["type"] for event in said] == [
        "question.request",
        "question.response",
        "permission.request",
        "permission.response",
    ]
    for event in said:
        assert (event["threadId"], event["runId"]) == (run["threadId"], run["runId"])
    assert (said[0]["question"], said[0]["options"]) == (asked["question"], OPTIONS)
    assert said[1]["answer"] == "green"


async def test_a_copied_question_is_history(up: Gateway, http: Http, provider: Provider) -> None:
    run = await begin(http, up, provider, asks("Red?"))
    asked = await question(http, up, run)
    end = (await answered(http, up, run, "blue"))[-1]["seq"]
    _, fork = await post_json(http, up.url, f"/threads/{run['threadId']}/fork", {"atSeq": end})
    async with http.get(f"{up.url}/api/v1/threads/{run['threadId']}/export") as response:
        data = await response.read()
    async with http.post(f"{up.url}/api/v1/threads/import", data=data) as response:
        adopted = await response.json()
    for copy in (fork, adopted):
        assert (await get_json(http, up.url, f"/threads/{copy['id']}"))["status"] == "idle"
        again = {"threadId": copy["id"]}
        body = {"action": "answer", "answer": "x", "requestId": asked["requestId"]}
        assert (await resume(http, up, again, **body))[0] == 404
        later = await begin(http, up, provider, asks("Red?"), **again)
        assert "blue" in told(provider), "the model knows what was answered there"
        assert (await question(http, up, later))["requestId"] != asked["requestId"]
        await answered(http, up, later, "no")


async def test_a_file_whose_question_was_never_answered_opens_none(
    up: Gateway, http: Http, provider: Provider
) -> None:
    run = await begin(http, up, provider, asks("Red?"))
    await question(http, up, run)
    await answered(http, up, run, "blue")
    async with http.get(f"{up.url}/api/v1/threads/{run['threadId']}/export") as response:
        lines = (await response.read()).splitlines(keepends=True)
    forged = b"".join(line for line in lines if b'"question.response"' not in line)
    async with http.post(f"{up.url}/api/v1/threads/import", data=forged) as response:
        assert response.status == 201
    assert (await get_json(http, up.url, "/approvals"))["items"] == []


async def test_what_was_asked_and_answered_goes_with_its_thread(
    up: Gateway, http: Http, provider: Provider
) -> None:
    marks = ["asked" + "f00d" * 3, "option" + "f00d" * 3, "answer" + "f00d" * 3]
    for is_answered in (True, False):
        run = await begin(http, up, provider, asks(marks[0], options=[marks[1]]))
        await question(http, up, run)
        if is_answered:
            await answered(http, up, run, marks[2])
        async with http.delete(f"{up.url}/api/v1/threads/{run['threadId']}") as response:
            assert response.status == 200
        kept = b"".join(path.read_bytes() for path in up.data_dir.glob("gateway.db*"))
        assert [mark for mark in marks if mark.encode() in kept] == []


async def test_what_was_asked_goes_with_the_events_of_its_run(
    up: Gateway, http: Http, provider: Provider
) -> None:
    mark = "asked" + "f00d" * 3
    run = await begin(http, up, provider, asks(mark))
    asked = await question(http, up, run)
    await answered(http, up, run, mark)
    # Of an age that every run has.
    while await up.log.prune(Retention(events_ms=-1_000)):
        pass
    left = await up.log.permission(asked["requestId"])
    assert left is not None
    assert (left.kind, left.granted) == ("question", True)
    assert mark not in repr(left)
