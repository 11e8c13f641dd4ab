"""What a response was given: the events of its request as the input items that they were; pure."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ownware_gateway.doors.openai.items import parse_response_id, text_part
from ownware_gateway.doors.openai.tools import Place, call_id

#: Brings the bytes of a message's file, by the number of its event and its own.
Files = Mapping[tuple[int, int], bytes]


def input_items(name: str, events: Sequence[Mapping[str, Any]], files: Files) -> list[Any]:
    """Return what a response was given, as the events tell it, in their order."""
    items: list[dict[str, Any]] = []
    arguments: dict[str, str] = {}
    for event in events:
        match str(event["type"]):
            case "user.message":
                content = [{"type": "input_text", "text": event["text"]}] if event["text"] else []
                for index, file in enumerate(event["attachments"] or ()):
                    content.append(_file(file, files[event["seq"], index]))
                item = {"type": "message", "role": "user", "content": content}
                items.append({"id": f"msg_{name}_in{event['seq']}", "status": "completed", **item})
            case "text.complete" if event["text"]:
                item = {
                    "type": "message",
                    "role": "assistant",
                    "content": [text_part(event["text"])],
                }
                items.append({"id": f"msg_{name}_in{event['seq']}", "status": "completed", **item})
            case "tool.call.args_delta":
                arguments[event["toolCallId"]] = event["delta"]
            case "tool.call.end":
                items += _given_call(event, arguments.get(event["toolCallId"], ""), name)
            case "client.result":
                items += _results(event, name)
            case "permission.response":
                item = {
                    "id": f"mcpa_{name}_in{event['seq']}",
                    "type": "mcp_approval_response",
                    "approval_request_id": event["requestId"],
                    "approve": event["granted"],
                    "reason": event["reason"],
                }
                items.append(item)
            case "question.response":
                content = [{"type": "input_text", "text": event["answer"] or ""}]
                item = {"type": "message", "role": "user", "content": content}
                items.append({"id": f"msg_{name}_in{event['seq']}", "status": "completed", **item})
            case _:
                pass  # What else happened is no input.
    return items


def _results(event: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return what a client's tools have returned."""
    parsed = parse_response_id(f"resp_{name}")
    assert parsed is not None
    return [
        {
            "id": f"fco_{name}_in{event['seq']}_{number}",
            "type": "function_call_output",
            "call_id": call_id(Place(parsed[0], event["turnIndex"], number)),
            "output": item["result"],
            "status": "completed",
        }
        for number, item in enumerate(event["results"] or ())
    ]


def _given_call(event: Mapping[str, Any], arguments: str, name: str) -> list[dict[str, Any]]:
    """Return a call that a client has brought along, and its result."""
    call_id, place = event["toolCallId"], f"{name}_in{event['seq']}"
    call = {"name": event["toolName"], "arguments": arguments, "status": "completed"}
    return [
        {"id": f"fc_{place}", "type": "function_call", "call_id": call_id, **call},
        {
            "id": f"fco_{place}",
            "type": "function_call_output",
            "call_id": call_id,
            "output": event["result"],
            "status": "completed",
        },
    ]


def _file(file: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    uri = f"data:{file['mimeType']};base64,{base64.b64encode(data).decode()}"
    if file["mimeType"].startswith("image/"):
        detail = file.get("detail") or "auto"
        return {"type": "input_image", "detail": detail, "image_url": uri, "file_id": None}
    return {"type": "input_file", "filename": file["filename"], "file_data": uri}
