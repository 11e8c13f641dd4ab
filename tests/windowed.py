"""A model of a small window for tests: it counts its prompts, refuses long ones, and remembers.

What it knows of a conversation is what it is sent. Told "the … is …", it can say so as long as that
stands in its prompt; asked for a summary, it writes down all such facts that it was given.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from ownware_gateway.compaction import INSTRUCTIONS
from tests.provider import Asked, Call, Provider, Reply

#: As English prose has it; what counts is that it is not the gateway's own figure.
CHARS_PER_TOKEN: Final = 4

FACT: Final = re.compile(r"the (code word|colour|city) is (\w+)")
ASKED: Final = re.compile(r"what is the (code word|colour|city)\?")


def said(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Role and text of the messages of a Chat Completions request, calls included."""
    found = []
    for message in body["messages"]:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = " ".join(part.get("text", "") for part in content)
        calls = "".join(json.dumps(call["function"]) for call in message.get("tool_calls", ()))
        found.append((message["role"], content + calls))
    return found


def tokens(body: Mapping[str, Any]) -> int:
    """How many tokens a prompt has here, tools included."""
    chars = sum(len(text) for _, text in said(body)) + len(json.dumps(body.get("tools", ())))
    return chars // CHARS_PER_TOKEN


def asks_for_summary(body: Mapping[str, Any]) -> bool:
    return bool(body["messages"][0]["content"] == INSTRUCTIONS)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What it was sent: the prompts of conversations, and those that asked for summaries."""

    spoken: list[dict[str, Any]] = field(default_factory=list)
    summed: list[dict[str, Any]] = field(default_factory=list)


class Windowed(Provider):
    """The server; `window` is in its tokens, and `longest` the longest prompt that it took.

    `summary` answers what asks for a summary, `answer` everything else; each may be replaced.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.longest = 0
        self.refused = 0
        self.prompts = Prompts()
        #: Set once it was asked for a summary.
        self.summing = asyncio.Event()
        self.summary: Callable[[Mapping[str, Any]], Reply] = remember
        self.answer: Callable[[Mapping[str, Any]], Reply] = recall

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self.models[0], "object": "model", "max_model_len": self.window}
        return web.json_response({"object": "list", "data": [model]})

    async def _take(self, request: web.Request) -> tuple[Reply, Asked]:
        _, asked = await super()._take(request)
        return self._reply(asked.body), asked

    def _reply(self, body: dict[str, Any]) -> Reply:
        count = tokens(body)
        if count + (body.get("max_tokens") or 0) > self.window:
            self.refused += 1
            message = f"This model's maximum context length is {self.window} tokens."
            return Reply(status=400, error=message, error_type="invalid_request_error")
        self.longest = max(self.longest, count)
        summing = asks_for_summary(body)
        if summing:
            self.summing.set()
        (self.prompts.summed if summing else self.prompts.spoken).append(body)
        reply = (self.summary if summing else self.answer)(body)
        return Reply(
            text=reply.text,
            calls=[
                call if call.id else Call(call.name, call.arguments, f"call_{next(self._numbers)}")
                for call in reply.calls
            ],
            stop=reply.stop,
            status=reply.status,
            error=reply.error,
            hang=reply.hang,
            gate=reply.gate,
            usage=(count, sum(map(len, reply.text)) // CHARS_PER_TOKEN + 1),
        )


def remember(body: Mapping[str, Any]) -> Reply:
    """Write a summary: every fact that was given, once."""
    facts = dict.fromkeys(match[0] for match in FACT.finditer(said(body)[-1][1]))
    return Reply(text=["Facts: ", "; ".join(facts) or "none"])


def recall(body: Mapping[str, Any]) -> Reply:
    """Answer a question about a fact from the prompt, and anything else with a few words."""
    texts = [text for role, text in said(body) if role != "system"]
    question = ASKED.search(texts[-1])
    if question is None:
        return Reply(text=["I have heard that. ", "Go on."])
    facts = dict(FACT.findall("\n".join(texts)))
    return Reply(text=[facts.get(question[1], "I do not know.")])
