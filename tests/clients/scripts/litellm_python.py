"""LiteLLM as a library. Prints what it saw as JSON."""

import asyncio
import json
import os
from importlib.metadata import version
from typing import Any

import litellm

ASK = {
    "model": "openai/assistant",
    "api_base": os.environ["GATEWAY"] + "/v1",
    "api_key": "unused",
}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


answer = litellm.completion(messages=said("one two"), temperature=0.1, **ASK)
assert answer.choices[0].message.content == "one two", answer
assert answer.usage.total_tokens == 15
stream = litellm.completion(messages=said("one two three"), stream=True, **ASK)
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
assert text == "one two three", text


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
messages: list[Any] = said("CALL")
wants = litellm.completion(messages=messages, tools=TOOLS, **ASK).choices[0].message
messages.append(wants)
for call in wants.tool_calls:
    result = f"sunny in {json.loads(call.function.arguments)['city']}"
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
pieces = litellm.completion(messages=messages, tools=TOOLS, stream=True, **ASK)
text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
assert text == "sunny in Rome and sunny in Oslo", text

response = litellm.responses(input="one two", **ASK)
assert response.output[0].content[0].text == "one two", response


async def later() -> None:
    answer = await litellm.acompletion(messages=said("one two"), stream=True, **ASK)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in answer]
    assert "".join(pieces) == "one two"


asyncio.run(later())
try:
    litellm.completion(messages=said("x"), **ASK | {"model": "openai/nobody"})
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("a model that there is not was not told")
print(json.dumps({"client": f"litellm {version('litellm')}"}))
