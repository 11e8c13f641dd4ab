"""Images that tools give back, in each provider's dialect, and models that cannot see them."""

import base64
import json
from collections.abc import Sequence
from typing import Any, Final

import pytest

from ownware_gateway.models import (
    AssistantTurn,
    File,
    Message,
    Model,
    ModelError,
    Request,
    ToolCall,
    ToolTurn,
    UserTurn,
)
from ownware_gateway.models.anthropic import Anthropic
from ownware_gateway.models.http import Pool
from ownware_gateway.models.images import NOT_SEEN, Seeing
from ownware_gateway.models.openai import OpenAI
from ownware_gateway.models.responses import Responses
from tests.pictures import png
from tests.provider import Provider, Reply

PNG: Final = png()
DATA: Final = base64.b64encode(PNG).decode()
URI: Final = f"data:image/png;base64,{DATA}"
IMAGE: Final = File("image-0.png", "image/png", PNG)

CONVERSATION: Final[Sequence[Message]] = (
    UserTurn("look"),
    AssistantTurn("", tool_calls=[ToolCall("c1", "shot", "{}"), ToolCall("c2", "list", "{}")]),
    ToolTurn("c1", "shot", "[image]", images=[IMAGE, IMAGE]),
    ToolTurn("c2", "list", "a.txt"),
)


@pytest.fixture
async def pool() -> Any:
    made = Pool()
    yield made
    await made.close()


def adapter(kind: Any, pool: Pool, provider: Provider) -> Model:
    address = provider.url if kind is Anthropic else provider.base_url
    model: Model = kind(
        pool, provider="p", base_url=address, key="k", key_variable="K", silence_s=10.0
    )
    return model


async def asked(
    model: Model, provider: Provider, *more: Message, name: str = "m"
) -> dict[str, Any]:
    """Ask with the conversation and return the body of the last request."""
    request = Request(name, [*CONVERSATION, *more])
    async for _ in model.stream(request):
        pass
    return provider.requests[-1].body


async def test_anthropic_has_them_inside_the_result(pool: Pool, provider: Provider) -> None:
    provider.default = Reply(text=["nice"])
    body = await asked(adapter(Anthropic, pool, provider), provider)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
    assert body["messages"][2]["content"] == [
        {
            "type": "tool_result",
            "tool_use_id": "c1",
            "content": [{"type": "text", "text": "[image]"}, image, image],
        },
        {
            "type": "tool_result",
            "tool_use_id": "c2",
            "content": "a.txt",
            "cache_control": {"type": "ephemeral"},
        },
    ]


async def test_responses_has_them_inside_the_output(pool: Pool, provider: Provider) -> None:
    provider.default = Reply(text=["nice"])
    body = await asked(adapter(Responses, pool, provider), provider)
    image = {"type": "input_image", "image_url": URI}
    assert body["input"][3:] == [
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "[image]"}, image, image],
        },
        {"type": "function_call_output", "call_id": "c2", "output": "a.txt"},
    ]


@pytest.mark.parametrize("more", [(), (AssistantTurn("nice"), UserTurn("and now?"))])
async def test_chat_completions_has_them_after_all_results_of_the_turn(
    pool: Pool, provider: Provider, more: Sequence[Message]
) -> None:
    provider.default = Reply(text=["nice"])
    body = await asked(adapter(OpenAI, pool, provider), provider, *more)
    image = {"type": "image_url", "image_url": {"url": URI}}
    assert body["messages"][2:5] == [
        {"role": "tool", "tool_call_id": "c1", "content": "[image]"},
        {"role": "tool", "tool_call_id": "c2", "content": "a.txt"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "[The images of shot, call c1:]"},
                image,
                image,
            ],
        },
    ]
    assert [message["role"] for message in body["messages"][5:]] == ["assistant", "user"][
        : len(more)
    ]


@pytest.mark.parametrize("kind", [Anthropic, OpenAI, Responses])
async def test_a_model_that_refuses_images_is_asked_without(
    kind: Any, pool: Pool, provider: Provider
) -> None:
    refusal = Reply(status=400, error="This model does not support image input.")
    provider.reply(refusal, Reply(text=["nice"]))
    body = await asked(Seeing(adapter(kind, pool, provider)), provider)
    assert len(provider.requests) == 2
    first, second = (json.dumps(request.body) for request in provider.requests)
    assert DATA in first
    assert DATA not in second
    assert json.dumps(NOT_SEEN)[1:-1] in json.dumps(body)


async def test_another_refusal_is_one(pool: Pool, provider: Provider) -> None:
    provider.reply(Reply(status=400, error="The prompt is too long."))
    with pytest.raises(ModelError, match="too long"):
        await asked(Seeing(adapter(OpenAI, pool, provider)), provider)
    provider.reply(Reply(status=429, error="Too many images for now."))
    with pytest.raises(ModelError, match="for now"):
        await asked(Seeing(adapter(OpenAI, pool, provider)), provider)
    assert len(provider.requests) == 2


@pytest.mark.parametrize("name", ["gpt-3.5-turbo", "deepseek/deepseek-r1", "gpt-4"])
async def test_a_model_that_is_known_to_be_blind_is_shown_none(
    name: str, pool: Pool, provider: Provider
) -> None:
    provider.default = Reply(text=["nice"])
    body = await asked(Seeing(adapter(OpenAI, pool, provider)), provider, name=name)
    assert DATA not in json.dumps(body)
    assert body["messages"][2]["content"] == "[image]" + NOT_SEEN
    assert len(provider.requests) == 1


async def test_a_conversation_without_images_is_passed_on_as_it_is(
    pool: Pool, provider: Provider
) -> None:
    provider.default = Reply(text=["nice"])
    model = adapter(OpenAI, pool, provider)
    seeing = Seeing(model).stream(Request("gpt-4", [UserTurn("hi")]))
    assert type(seeing) is type(model.stream(Request("gpt-4", [UserTurn("hi")])))
    assert [part async for batch in seeing for part in batch]
