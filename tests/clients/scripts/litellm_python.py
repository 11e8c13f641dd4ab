"""LiteLLM as a library. Prints what it saw as JSON."""

import asyncio
import json
import os
from importlib.metadata import version

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
