"""LangChain's chat model and embeddings. Prints what it saw as JSON."""

import json
import os
from importlib.metadata import version
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL = os.environ["GATEWAY"] + "/v1"


class Point(BaseModel):
    x: int
    y: int


chat = ChatOpenAI(base_url=URL, api_key="unused", model="assistant", temperature=0.2)
answer = chat.invoke([SystemMessage("Be brief."), HumanMessage("one two")])
assert answer.content == "one two", answer
assert answer.usage_metadata["total_tokens"] == 15
assert "".join(str(chunk.content) for chunk in chat.stream("one two three")) == "one two three"
history = [HumanMessage("a"), AIMessage("b"), HumanMessage("c d")]
assert chat.invoke(history).content == "c d"
assert [item.content for item in chat.batch(["x y", "z"])] == ["x y", "z"]
point = chat.with_structured_output(Point, method="json_schema").invoke('{"x":1,"y":2}')
assert point == Point(x=1, y=2), point


@tool  # type: ignore[untyped-decorator]
def weather(city: str) -> str:
    """How the weather is."""
    return f"sunny in {city}"


def loops(bound: Runnable[Any, Any]) -> None:
    for ask in (bound.invoke, lambda said: sum(bound.stream(said), start=AIMessageChunk(""))):
        said = [HumanMessage("CALL")]
        wants = ask(said)
        assert [call["args"] for call in wants.tool_calls] == [{"city": "Rome"}, {"city": "Oslo"}]
        said += [wants, *(weather.invoke(call) for call in wants.tool_calls)]
        assert ask(said).text == "sunny in Rome and sunny in Oslo"


loops(chat.bind_tools([weather]))
responses = ChatOpenAI(base_url=URL, api_key="unused", model="assistant", use_responses_api=True)
assert responses.invoke("one two").text == "one two"
assert "".join(chunk.text for chunk in responses.stream("one two")) == "one two"
loops(responses.bind_tools([weather]))
vectors = OpenAIEmbeddings(
    base_url=URL, api_key="unused", model="openai:embed", check_embedding_ctx_length=False
)
assert vectors.embed_query("four") == [4.0, 0.5]
print(json.dumps({"client": f"langchain-openai {version('langchain-openai')}"}))
