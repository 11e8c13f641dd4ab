"""The types of the Open Responses specification: every frame that is pinned, and those of a run.

It has no items for tools that a server runs; these, and the frames about them, are left out.
"""

import json
import os
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openresponses_types import types
from pydantic import BaseModel

KNOWN = {"message", "reasoning", "function_call"}


FRAMES: dict[str, type[BaseModel]] = {
    "error": types.ErrorStreamingEvent,
    "response.completed": types.ResponseCompletedStreamingEvent,
    "response.content_part.added": types.ResponseContentPartAddedStreamingEvent,
    "response.content_part.done": types.ResponseContentPartDoneStreamingEvent,
    "response.created": types.ResponseCreatedStreamingEvent,
    "response.failed": types.ResponseFailedStreamingEvent,
    "response.function_call_arguments.delta": (
        types.ResponseFunctionCallArgumentsDeltaStreamingEvent
    ),
    "response.function_call_arguments.done": types.ResponseFunctionCallArgumentsDoneStreamingEvent,
    "response.in_progress": types.ResponseInProgressStreamingEvent,
    "response.incomplete": types.ResponseIncompleteStreamingEvent,
    "response.output_item.added": types.ResponseOutputItemAddedStreamingEvent,
    "response.output_item.done": types.ResponseOutputItemDoneStreamingEvent,
    "response.output_text.delta": types.ResponseOutputTextDeltaStreamingEvent,
    "response.output_text.done": types.ResponseOutputTextDoneStreamingEvent,
    "response.queued": types.ResponseQueuedStreamingEvent,
    "response.reasoning_summary_part.added": types.ResponseReasoningSummaryPartAddedStreamingEvent,
    "response.reasoning_summary_part.done": types.ResponseReasoningSummaryPartDoneStreamingEvent,
    "response.reasoning_summary_text.delta": types.ResponseReasoningSummaryDeltaStreamingEvent,
    "response.reasoning_summary_text.done": types.ResponseReasoningSummaryDoneStreamingEvent,
}


def check(body: dict[str, Any]) -> bool:
    """Parse a frame strictly; return whether it is one that the specification knows."""
    if "mcp_" in body["type"] or body.get("item", {}).get("type", "message") not in KNOWN:
        return False
    if "response" in body:
        output = [item for item in body["response"]["output"] if item["type"] in KNOWN]
        body = {**body, "response": {**body["response"], "output": output}}
    FRAMES[body["type"]].model_validate_json(json.dumps(body), strict=True)
    return True


def frames(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line[:7] == "data: {"]
    return [json.loads(line) for line in lines]


pinned = frames((Path(sys.argv[1]) / "responses.sse").read_text("utf-8"))
assert sum(map(check, pinned)) > len(pinned) / 2
request = urllib.request.Request(
    os.environ["GATEWAY"] + "/v1/responses",
    json.dumps({"input": "one two", "stream": True}).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as answer:
    live = frames(answer.read().decode())
assert live and all(map(check, live))
whole = json.dumps(live[-1]["response"])
types.ResponseResource.model_validate_json(whole, strict=True)
print(json.dumps({"client": f"openresponses-types {version('openresponses-types')}"}))
