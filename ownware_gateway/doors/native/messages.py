"""A conversation as people read it: runs as the messages of `GET /threads/{id}/messages`; pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from ownware_gateway.transcript import Call, RunFacts, Turn


def messages(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return the conversation as people read it: the answer of `GET /threads/{id}/messages`."""
    shown: list[dict[str, Any]] = []
    for run in runs:
        attachments = run.message.attachments
        shown.append(
            {
                "id": f"{run.message.run_id}.user",
                "role": "user",
                "content": run.message.text,
                "parts": [{"kind": "text", "text": run.message.text}],
                "attachments": attachments and [item.model_dump() for item in attachments],
                "usage": None,
                "timestamp": run.message.timestamp,
                "model": None,
            }
        )
        if run.turns or run.error is not None:
            shown.append(_reply(run))
    return shown


def _reply(run: RunFacts) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for turn in run.turns:
        if not turn.superseded:
            parts += _parts(turn)
    if run.error is not None:
        parts.append({"kind": "error", "code": run.error.code, "text": run.error.message})
    return {
        "id": f"{run.message.run_id}.assistant",
        "role": "assistant",
        "content": "\n\n".join(part["text"] for part in parts if part["kind"] == "text"),
        "parts": parts,
        "usage": run.usage.model_dump(),
        "status": run.end.status if run.end is not None else "running",
        "timestamp": run.turns[0].timestamp if run.turns else run.message.timestamp,
        "model": run.session.model if run.session is not None else None,
    }


def _parts(turn: Turn) -> Iterator[dict[str, Any]]:
    if turn.thinking:
        yield {"kind": "thinking", "text": turn.thinking}
    text = turn.text if turn.text is not None else turn.cut_text
    if text:
        part: dict[str, Any] = {"kind": "text", "text": text}
        yield part if turn.complete else part | {"interrupted": True}
    for call in turn.calls.values():
        yield {
            "kind": "tool",
            "toolCallId": call.id,
            "toolName": call.name,
            "input": call.input,
            "result": call.end.result if call.end is not None else None,
            "isError": call.end.is_error if call.end is not None else None,
            "granted": call.response.granted if call.response is not None else None,
            **_kept(call),
        }
        if call.agent is not None:
            yield {
                "kind": "subagent",
                "toolCallId": call.id,
                "agentId": call.agent.agent_id,
                "name": call.agent.name,
                "status": call.complete.status if call.complete is not None else "running",
            }


def _kept(call: Call) -> dict[str, Any]:
    """Return what there is of a call's output beside its result, and where it can be fetched."""
    end = call.end
    if end is None or (end.content is None and end.output_bytes_kept is None):
        return {}
    shown: dict[str, Any] = {"outputSeq": call.end_seq}
    if end.output_bytes_kept is not None:
        shown["outputBytesKept"] = end.output_bytes_kept
    if end.content is not None:
        shown["content"] = [part.model_dump(mode="json") for part in end.content]
    return shown
