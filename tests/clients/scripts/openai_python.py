"""The official Python client: everything that its users do. Prints what it saw as JSON."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import openai
from openai.types import CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

URL = os.environ["GATEWAY"] + "/v1"
client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)


class Point(BaseModel):
    x: int
    y: int


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def plain() -> None:
    answer = client.chat.completions.create(model="assistant", messages=said("one two"))
    assert answer.choices[0].message.content == "one two", answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 15
    assert answer.usage.model_dump()["cost_usd"] is None
    raw = client.chat.completions.with_raw_response.create(
        model="assistant", messages=said("one two")
    )
    assert raw.headers["x-run-id"] == raw.parse().model_dump()["run_id"]
    strictly(ChatCompletion, raw.text)


def streamed() -> None:
    stream = client.chat.completions.create(
        model="assistant",
        messages=said("one two three"),
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert (text, usage and usage.total_tokens) == ("one two three", 15)
    # As the quickstart of many a tutorial has it, without a look at how many choices there are.
    again = client.chat.completions.create(model="assistant", messages=said("one two"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in again) == "one two"


def helpers() -> None:
    with client.chat.completions.stream(model="assistant", messages=said("one two")) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.choices[0].message.content == "one two"
    parsed = client.chat.completions.parse(
        model="assistant", messages=said('{"x":1,"y":2}'), response_format=Point
    )
    assert parsed.choices[0].message.parsed == Point(x=1, y=2)
    with client.chat.completions.stream(
        model="assistant", messages=said('{"x":3,"y":4}'), response_format=Point
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Point(x=3, y=4)
    with client.chat.completions.with_streaming_response.create(
        model="assistant", messages=said("one two"), stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    for line in lines:
        strictly(ChatCompletionChunk, line.removeprefix("data: "))
    assert len(lines) > 2


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="unused") as other:
        stream = await other.chat.completions.create(
            model="assistant", messages=said("one two"), stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == "one two"
        several = [
            other.chat.completions.create(model="assistant", messages=said(f"number {n}"))
            for n in range(5)
        ]
        answers = await asyncio.gather(*several)
        assert [a.choices[0].message.content for a in answers] == [f"number {n}" for n in range(5)]


def others() -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "assistant"
    for name in (names[0], names[-1], "openai:a/b:c"):
        assert client.models.retrieve(name).id == name
        strictly(Model, client.models.with_raw_response.retrieve(name).text)
    made = client.embeddings.create(model="openai:embed", input=["four", "letters"])
    assert [item.embedding for item in made.data] == [[4.0, 0.5], [7.0, 0.5]]
    raw = client.embeddings.with_raw_response.create(
        model="openai:embed", input="four", encoding_format="float"
    )
    strictly(CreateEmbeddingResponse, raw.text)


def conversation() -> None:
    named = client.with_options(default_headers={"X-Conversation-Id": "python"})
    named.chat.completions.create(model="assistant", messages=said("I am Ada"))
    named.chat.completions.create(model="assistant", messages=said("and you"))


class Weather(BaseModel):
    """How the weather is."""

    city: str


def tools() -> None:
    offered: Any = [openai.pydantic_function_tool(Weather, name="weather")]
    messages: list[Any] = said("CALL")
    seen = client.chat.completions.with_raw_response.create(
        model="assistant", messages=messages, tools=offered
    )
    strictly(ChatCompletion, seen.text)
    run_id = seen.headers["x-run-id"]
    # The loop that every guide has.
    turns = 0
    while (answer := seen.parse().choices[0]).finish_reason == "tool_calls":
        assert answer.message.tool_calls, answer
        messages.append(answer.message)
        for call in answer.message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            result = {"role": "tool", "tool_call_id": call.id, "content": f"sunny in {city}"}
            messages.append(result)
        seen = client.chat.completions.with_raw_response.create(
            model="assistant", messages=messages, tools=offered
        )
        turns += 1
    assert (turns, answer.message.content) == (1, "sunny in Rome and sunny in Oslo"), answer
    assert seen.headers["x-run-id"] == run_id
    with client.chat.completions.stream(
        model="assistant", messages=said("CALL"), tools=offered
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds, kinds
    parsed = [call.function.parsed_arguments for call in final.tool_calls or ()]
    assert parsed == [Weather(city="Rome"), Weather(city="Oslo")]
    chunks = client.chat.completions.create(
        model="assistant",
        messages=[
            *said("CALL"),
            final.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
            *({"role": "tool", "tool_call_id": c.id, "content": "x"} for c in final.tool_calls),
        ],
        tools=offered,
        stream=True,
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "x and x"


def errors() -> None:
    wanted: list[tuple[type[openai.APIStatusError], dict[str, Any]]] = [
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"model": "assistant", "n": 2}),
    ]
    for kind, body in wanted:
        try:
            client.chat.completions.create(messages=said("x"), **body)
        except kind as error:
            assert error.body is not None and error.param in ("model", "n"), error
        else:
            raise AssertionError(kind)
    try:
        for _ in client.chat.completions.create(
            model="assistant", messages=said("FAIL"), stream=True
        ):
            pass
    except openai.APIError as error:
        assert "no such thing" in error.message
    else:
        raise AssertionError("a failure in a stream was not told")


def golden(folder: Path) -> None:
    """What is pinned, as the client's own types have it."""
    for line in (folder / "openai.sse").read_text("utf-8").split("\n"):
        if line.startswith("data: {") and '"error"' not in line:
            strictly(ChatCompletionChunk, line.removeprefix("data: "))
    for line in (folder / "openai.jsonl").read_text("utf-8").strip("\n").split("\n"):
        if '"error"' not in line:
            strictly(ChatCompletion, line)


def strictly(kind: type[BaseModel], text: str) -> None:
    kind.model_validate_json(text, strict=True)


plain()
streamed()
helpers()
asyncio.run(asynchronous())
others()
conversation()
tools()
errors()
golden(Path(sys.argv[1]))
print(json.dumps({"client": f"openai {openai.__version__}"}))
