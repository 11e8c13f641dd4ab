"""The official Python client, its Responses API: what its users do, and what its types say."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, TypeAdapter

URL = os.environ["GATEWAY"] + "/v1"
client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Point(BaseModel):
    x: int
    y: int


def plain() -> None:
    answer = client.responses.create(model="assistant", input="one two", instructions="Be brief.")
    assert (answer.output_text, answer.status) == ("one two", "completed"), answer
    assert answer.usage is not None and answer.usage.total_tokens == 15
    assert client.responses.retrieve(answer.id).output_text == "one two"
    more = client.responses.create(model="assistant", input="three", previous_response_id=answer.id)
    assert (more.output_text, more.previous_response_id) == ("three", answer.id)
    given = client.responses.input_items.list(more.id)
    assert [item.type for item in given] == ["message"]
    raw = client.responses.input_items.with_raw_response.list(more.id)
    strictly(ResponseItemList, raw.text)
    alone = client.responses.create(model="assistant", input="four")
    client.responses.delete(alone.id)
    try:
        client.responses.retrieve(alone.id)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a deleted response is there")


def streamed() -> None:
    events = list(client.responses.create(model="assistant", input="one two", stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert ("".join(deltas), len(deltas)) == ("one two", 2)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    name = events[0].response.id
    for number in (0, 3, len(events) - 2):
        rest = client.responses.retrieve(name, stream=True, starting_after=number)
        assert [event.sequence_number for event in rest] == list(range(number + 1, len(events)))
    with client.responses.with_streaming_response.create(
        model="assistant", input="one two", stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    for line in lines:
        EVENT.validate_json(line.removeprefix("data: "), strict=True)
    assert len(lines) == len(events)


def helpers() -> None:
    with client.responses.stream(model="assistant", input="one two") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.completed"} <= kinds, kinds
    assert final.output_text == "one two"
    with client.responses.stream(response_id=final.id, starting_after=4) as stream:
        assert stream.get_final_response().output_text == "one two"
    parsed = client.responses.parse(model="assistant", input='{"x":1,"y":2}', text_format=Point)
    assert parsed.output_parsed == Point(x=1, y=2)


def later() -> None:
    answer = client.responses.create(model="assistant", input="one two", background=True)
    assert answer.status in ("queued", "in_progress")
    with client.responses.retrieve(answer.id, stream=True) as stream:
        *_, last = stream
    assert last.type == "response.completed" and last.response.output_text == "one two"
    assert client.responses.cancel(answer.id).status == "completed"


async def asynchronous() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="unused") as other:
        stream = await other.responses.create(model="assistant", input="one two", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.completed"


class Weather(BaseModel):
    """How the weather is."""

    city: str


def tools() -> None:
    offered: Any = [
        {"type": "function", "name": "weather", "parameters": Weather.model_json_schema()}
    ]
    # The loop that every guide has: what was said, what the model wanted, what came of it.
    said: list[Any] = [{"role": "user", "content": "CALL"}]
    answer = client.responses.create(model="assistant", input=said, tools=offered)
    run_id = answer.model_dump()["run_id"]
    said += answer.output
    said += made(answer)
    answer = client.responses.create(model="assistant", input=said, tools=offered)
    assert answer.output_text == "sunny in Rome and sunny in Oslo", answer
    assert answer.model_dump()["run_id"] == run_id
    # The short one, as it comes.
    with client.responses.stream(model="assistant", input="CALL", tools=offered) as stream:
        events = list(stream)
        answer = stream.get_final_response()
    done = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
    assert done == [item.arguments for item in answer.output if item.type == "function_call"]
    strictly(Response, client.responses.with_raw_response.retrieve(answer.id).text)
    with client.responses.stream(
        model="assistant", input=made(answer), previous_response_id=answer.id, tools=offered
    ) as stream:
        answer = stream.get_final_response()
    assert answer.output_text == "sunny in Rome and sunny in Oslo", answer
    given = client.responses.input_items.list(answer.id, order="asc")
    assert [item.type for item in given] == ["function_call_output"] * 2
    raw = client.responses.input_items.with_raw_response.list(answer.id)
    strictly(ResponseItemList, raw.text)
    parsed = client.responses.parse(
        model="assistant",
        input="CALL",
        tools=[openai.pydantic_function_tool(Weather, name="weather")],
    )
    calls = [item for item in parsed.output if item.type == "function_call"]
    assert [call.parsed_arguments for call in calls] == [Weather(city="Rome"), Weather(city="Oslo")]


def made(answer: Response) -> list[Any]:
    calls = [item for item in answer.output if item.type == "function_call"]
    assert len(calls) == 2, answer
    return [
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": f"sunny in {json.loads(call.arguments)['city']}",
        }
        for call in calls
    ]


def errors() -> None:
    for kind, body in ((openai.NotFoundError, {"model": "nobody"}), (openai.BadRequestError, {})):
        tools: Any = [] if body else [{"type": "web_search"}]
        try:
            client.responses.create(input="x", tools=tools, **body)
        except kind as error:
            assert error.param == ("model" if body else "tools"), error
        else:
            raise AssertionError(kind)
    *_, last = client.responses.create(model="assistant", input="FAIL", stream=True)
    assert last.type == "response.failed" and last.response.error is not None
    assert "no such thing" in last.response.error.message


def golden(folder: Path) -> None:
    """What is pinned, as the client's own types have it."""
    for line in (folder / "responses.sse").read_text("utf-8").split("\n"):
        if line.startswith("data: {"):
            event = EVENT.validate_json(line.removeprefix("data: "), strict=True)
            assert event.type == json.loads(line.removeprefix("data: "))["type"]
            assert type(event).__name__ != "BaseModel"


def strictly(kind: type[BaseModel], text: str) -> None:
    kind.model_validate_json(text, strict=True)


plain()
streamed()
helpers()
later()
tools()
asyncio.run(asynchronous())
errors()
golden(Path(sys.argv[1]))
strictly(Response, client.responses.with_raw_response.create(input="x", model="assistant").text)
print(json.dumps({"client": f"openai {openai.__version__}"}))
