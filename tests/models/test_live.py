"""The adapter against a real server with real weights; what they say is left to them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest

from ownware_gateway.models import (
    Answer,
    AssistantTurn,
    Message,
    ModelError,
    Request,
    Text,
    UserTurn,
)
from ownware_gateway.models.http import Pool
from ownware_gateway.models.openai import OpenAI

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]


@pytest.fixture
async def model(llama_server: str) -> AsyncIterator[OpenAI]:
    pool = Pool()
    yield OpenAI(
        pool,
        provider="local",
        base_url=f"{llama_server}/v1",
        key="",
        key_variable="",
        silence_s=60.0,
    )
    await pool.close()


def request(*messages: Message, max_tokens: int = 16) -> Request:
    return Request("gemma", messages, system="Be brief.", temperature=0, max_tokens=max_tokens)


async def ask(model: OpenAI, question: Request) -> tuple[Sequence[Text], Answer, int]:
    batches = [batch async for batch in model.stream(question)]
    *parts, answer = [part for batch in batches for part in batch]
    assert isinstance(answer, Answer)
    texts = [part for part in parts if isinstance(part, Text)]
    assert len(texts) == len(parts)
    return texts, answer, len(batches)


async def test_text_streams_in_pieces_and_the_answer_ends(model: OpenAI) -> None:
    texts, answer, batches = await ask(model, request(UserTurn("Count to ten.")))
    assert len(texts) > 3
    assert batches > 3
    assert answer.turn.text == "".join(text.text for text in texts)
    assert answer.turn.raw == {"role": "assistant", "content": answer.turn.text}
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.input_tokens > 5
    assert 3 < answer.usage.output_tokens <= 16


async def test_the_conversation_goes_on_with_the_servers_own_message(model: OpenAI) -> None:
    first = UserTurn("Count to ten.")
    _, answer, _ = await ask(model, request(first))
    _, again, _ = await ask(model, request(first, answer.turn, UserTurn("And on.")))
    assert again.usage.input_tokens > answer.usage.input_tokens
    told = AssistantTurn(answer.turn.text)
    _, same, _ = await ask(model, request(first, told, UserTurn("And on.")))
    assert same.usage.input_tokens == again.usage.input_tokens
    assert same.usage.cache_read_tokens > 0


async def test_leaving_early_frees_the_server_for_the_next_question(model: OpenAI) -> None:
    long = request(UserTurn("Tell me everything."), max_tokens=1500)
    async with aclosing(model.stream(long)) as stream:
        await anext(stream)
    # It has one slot: this would take half a minute if the first answer were still being written.
    async with asyncio.timeout(20):
        _, answer, _ = await ask(model, request(UserTurn("Hi."), max_tokens=4))
    assert answer.usage.output_tokens <= 4


async def test_a_question_too_long_is_refused_in_the_servers_own_words(model: OpenAI) -> None:
    with pytest.raises(ModelError) as raised:
        await ask(model, request(UserTurn("word " * 5000)))
    assert raised.value.message.startswith(
        "The prompt is too long for the model at local. It said: "
    )
    assert "context" in raised.value.message
    assert raised.value.retry is None
