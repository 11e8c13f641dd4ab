"""Events in, items and frames out: what a response is told by is pinned, byte for byte."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ownware_gateway.doors.openai.chunks import DONE
from ownware_gateway.doors.openai.errors import Failed, Wrong
from ownware_gateway.doors.openai.items import (
    Before,
    Items,
    ResponseFrames,
    ResponseShape,
    before,
    parse_response_id,
    response_id,
)
from ownware_gateway.events import (
    Event,
    Recovery,
    StreamGap,
    TextComplete,
    TextDelta,
    ThinkingDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallExecute,
    TurnInterrupted,
    TurnStart,
    UserMessage,
)
from tests.doors.openai.test_chunks import (
    ALL,
    ANSWERS,
    ASKED,
    ASKS,
    AT,
    EXACT,
    FAILS,
    RESULTS,
    end,
    sent,
)

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPE = ResponseShape("resp_1", "run_1", "assistant", AT // 1000, {"instructions": "Be brief."})
#: What the calls of the completion before have been asked for with.
CALLED = ToolCallExecute(tool_call_id="c1", tool_name="write_file", input={"a": 1}, turn_index=2)
FAILED = ToolCallEnd(
    tool_call_id="c1",
    tool_name="write_file",
    result="No.",
    is_error=True,
    duration_ms=1,
    turn_index=2,
    output_bytes_raw=3,
)
TOOLS: list[Event] = [ANSWERS[0], CALLED, CALLED, FAILED, *ANSWERS[3:]]
BEHIND = SHAPE._replace(
    id="resp_1-24", before=Before("resp_1", {"c1": '{"path": "é.txt"}'}, {"c1": "p1"})
)
BACKGROUND = SHAPE._replace(echo={"background": True, "text": {"format": {"type": "json_object"}}})
TOLD: list[tuple[Sequence[Event], ResponseShape]] = [
    *((events, SHAPE) for events in ALL if events is not RESULTS),
    (RESULTS, SHAPE._replace(before=Before("resp_1", by_client=frozenset({"c4", "c5"})))),
    (TOOLS, BEHIND),
    (
        [
            *ASKS[:6],
            TurnInterrupted(turn_index=0, reason="aborted", timestamp=AT),
            end("cancelled"),
        ],
        BACKGROUND,
    ),
]


def frames(
    events: Sequence[Event],
    shape: ResponseShape = SHAPE,
    starting_after: int = -1,
    seen: tuple[int, int] = (0, 0),
) -> bytes:
    made = ResponseFrames(shape, starting_after, seen)
    made.answer.exact.update(EXACT)
    pieces = [made.of(item) for item in sent(events)]
    assert made.answer.over
    return b"".join(pieces) + DONE


def bodies(events: Sequence[Event], shape: ResponseShape = SHAPE) -> list[dict[str, Any]]:
    blocks = frames(events, shape).split(b"\n\n")[:-2]
    return [json.loads(block.partition(b"data: ")[2]) for block in blocks]


def response(events: Sequence[Event], shape: ResponseShape = SHAPE) -> dict[str, Any]:
    items = Items(shape)
    items.answer.exact.update(EXACT)
    for item in sent(events):
        items.take(item)
    return items.response()


def test_the_frames_are_these() -> None:
    made = b"".join(frames(events, shape) for events, shape in TOLD)
    assert made == (GOLDEN / "responses.sse").read_bytes()


def test_the_last_frame_of_a_stream_holds_the_response_that_is_got_otherwise() -> None:
    for events, shape in TOLD:
        assert bodies(events, shape)[-1]["response"] == response(events, shape)


def test_frames_are_numbered_without_a_hole_and_go_on_behind_each() -> None:
    for told, shape in TOLD:
        events = [event for event in told if not isinstance(event, StreamGap)]
        whole = frames(events, shape)
        blocks = whole.split(b"\n\n")
        for number, block in enumerate(blocks[:-2]):
            assert f'"sequence_number":{number},'.encode() in block
            rest = b"\n\n".join(blocks[number + 1 :])
            assert frames(events, shape, number) == rest
            _, seq, place = block.split(b"\n")[1].split(b".")
            assert frames(events, shape, seen=(int(seq), int(place))) == rest


def test_what_is_said_in_deltas_is_what_the_items_hold_in_the_end() -> None:
    for events, shape in TOLD:
        output: dict[int, Any] = {}
        texts: dict[str, str] = {}
        for body in bodies(events, shape):
            match body["type"]:
                case "response.output_item.added":
                    assert body["output_index"] == len(output)
                    output[body["output_index"]] = None
                case "response.output_item.done":
                    assert output[body["output_index"]] is None
                    output[body["output_index"]] = body["item"]
                case kind if kind.endswith(".delta"):
                    texts[body["item_id"]] = texts.get(body["item_id"], "") + body["delta"]
                case _:
                    pass
        assert list(output.values()) == response(events, shape)["output"]
        for item in output.values():
            said = item.get("content") or item.get("summary") or [{"text": item.get("arguments")}]
            if item["type"] != "mcp_approval_request" and item["status"] != "incomplete":
                assert texts[item["id"]] == said[0]["text"]


def test_a_turn_that_is_asked_again_is_an_incomplete_item_and_no_part_of_the_text() -> None:
    messages = [item for item in response(ASKS)["output"] if item["type"] == "message"]
    assert [item["status"] for item in messages] == ["completed", "incomplete", "completed"]
    assert messages[1]["content"] == []


@pytest.mark.parametrize("has_tools", [True, False])
def test_json_that_is_asked_again_is_the_new_one_alone(has_tools: bool) -> None:
    events: list[Event] = [
        TurnStart(turn_index=0, timestamp=AT),
        TextDelta(text='{"a', turn_index=0),
        Recovery(reason="connection", attempt=1, detail="cut", turn_index=0, supersedes=0),
        TurnStart(turn_index=1, timestamp=AT),
        TextDelta(text='{"a":1}', turn_index=1),
        TextComplete(text='{"a":1}', turn_index=1),
        end(),
    ]
    output = response(events, SHAPE._replace(json=True, has_tools=has_tools))["output"]
    assert [item["content"][0]["text"] for item in output if item["content"]] == ['{"a":1}']


def test_a_call_that_never_began_is_told_with_its_arguments_and_its_failure() -> None:
    asked = ToolCallArgsDelta(tool_call_id="c1", delta='{"x', turn_index=0)
    (item,) = response([asked, FAILED, end()])["output"]
    assert (item["arguments"], item["status"]) == ('{"x', "failed")
    assert item["error"]["content"] == [{"type": "text", "text": "No."}]


def test_text_that_an_end_cuts_off_stays() -> None:
    told = response([TextDelta(text="half", turn_index=0), end("cancelled", "aborted")])
    assert (told["status"], told["output"][0]["status"]) == ("cancelled", "incomplete")
    assert told["output"][0]["content"][0]["text"] == "half"


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [
        ("end_turn", "completed", None),
        ("max_tokens", "incomplete", {"reason": "max_output_tokens"}),
        ("max_turns", "incomplete", {"reason": "max_output_tokens"}),
        ("refusal", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_the_end_of_a_run_as_a_status(reason: str, status: str, details: Any) -> None:
    told = response([end("succeeded", reason)])
    assert (told["status"], told["incomplete_details"]) == (status, details)
    assert bodies([end("succeeded", reason)])[-1]["type"] == f"response.{status}"


def test_a_number_cannot_be_found_again_where_frames_are_not_kept() -> None:
    gap = StreamGap(from_seq=2, to_seq=2, reason="retention")
    events = [UserMessage(run_id="run_1", text="Go", timestamp=AT), gap, *ASKS[2:]]
    with pytest.raises(Failed, match="starting_after"):
        frames(events, starting_after=5)
    assert frames(events, starting_after=0) == frames(events).partition(b"\n\n")[2]


def test_a_stream_that_fails_repeats_the_number_of_the_last_frame() -> None:
    made = ResponseFrames(SHAPE)
    last = made.of(sent([ThinkingDelta(text="x", turn_index=0)])[0]).count(b"sequence_number") - 1
    body = json.loads(made.failure(Wrong(503, "shutting_down", "Bye.")).partition(b"data: ")[2])
    assert (body["type"], body["sequence_number"]) == ("error", last)
    assert body["error"]["code"] == body["code"] == "shutting_down"
    begun = ResponseFrames(SHAPE, starting_after=50).failure(Wrong(503, "shutting_down", "Bye."))
    assert b'"sequence_number":50,' in begun, "what was seen is not to be sent again"


def test_what_earlier_responses_of_a_run_leave() -> None:
    events = [json.loads(item.data) for item in sent(ASKS)]
    assert before("run_1", events) == Before("resp_1", {"c0": "{}"}, {"c1": "p1"})
    later = [json.loads(item.data) for item in sent([*ASKS, *ANSWERS[:4], ASKED])]
    assert before("run_1", later).previous == f"resp_1-{len(ASKS)}"


def test_the_name_of_a_response_leads_to_its_run() -> None:
    for run_id, after in (("run_0a1b", None), ("run_0a1b", 17)):
        assert parse_response_id(response_id(run_id, after)) == (run_id, after)
    for name in ("x", "chatcmpl-a", "resp_a-b", "resp_a-" + "9" * 20):
        assert parse_response_id(name) is None


def test_a_failure_is_told_in_the_words_that_clients_know() -> None:
    told = response(FAILS)
    assert told["status"] == "failed"
    assert told["error"] == {
        "code": "server_error",
        "message": "It said no.",
        "type": "provider_error",
    }
