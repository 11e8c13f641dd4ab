"""The whole gateway on a real model server that nobody here wrote, through both dialects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.doors.openai import ask, content, said, streamed
from tests.gateway import FAKE_KEY, Gateways, open_stream, read_frames, run_events, start_run, text

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]


@pytest.mark.parametrize("model", ["local:gemma", "anthropic:gemma"])
async def test_a_real_model_streams_remembers_and_can_be_read_again(
    start_gateway: Gateways,
    make_profile: Callable[..., Path],
    http: aiohttp.ClientSession,
    llama_server: str,
    model: str,
) -> None:
    make_profile("brief", model=model, temperature=0, maxTokens=24, tools={"preset": "none"})
    up = await start_gateway(
        local_base_url=f"{llama_server}/v1",
        anthropic_base_url=llama_server,
        anthropic_api_key=FAKE_KEY,
    )
    first = await start_run(http, up.url, "My name is Ada. Say hello to me.", profileId="brief")
    one = await run_events(http, up.url, first["runId"])
    deltas = [event for event in one if event["type"] == "text.delta"]
    assert len(deltas) > 3
    assert text(one) == next(e["text"] for e in one if e["type"] == "text.complete")
    assert one[-1]["status"] == "succeeded"
    usage = one[-1]["totalUsage"]
    assert usage["inputTokens"] > 5
    assert usage["outputTokens"] > 3

    thread = first["threadId"]
    follow_up = {"profileId": "brief", "threadId": thread}
    again = await start_run(http, up.url, "What is my name?", **follow_up)
    two = await run_events(http, up.url, again["runId"])
    # What it says is left to it; that the first turn stands before the second is not.
    whole = usage["inputTokens"] + usage["outputTokens"]
    assert two[-1]["totalUsage"]["inputTokens"] > whole * 0.9

    path = f"/threads/{thread}/agents/root/events?follow=false&since="
    async with open_stream(http, up.url, f"{path}0") as response:
        everything = [frame for frame in await read_frames(response) if frame.id]
    for since in (1, len(one) // 2, len(everything) - 2):
        async with open_stream(http, up.url, f"{path}{since}") as response:
            rest = [frame for frame in await read_frames(response) if frame.id]
        assert rest == everything[since:]


async def test_a_real_model_is_asked_as_openais_clients_ask(
    start_gateway: Gateways, http: aiohttp.ClientSession, llama_server: str
) -> None:
    up = await start_gateway(local_base_url=f"{llama_server}/v1")
    options: dict[str, Any] = {
        "model": "local:gemma",
        "temperature": 0,
        "seed": 1,
        "max_tokens": 24,
    }
    whole = await ask(http, up.url, "Say hello to Ada.", **options)
    assert whole["usage"]["completion_tokens"] > 3
    assert whole["choices"][0]["finish_reason"] in ("stop", "length")
    read = await streamed(http, up.url, "Say hello to Ada.", **options)
    assert said(read) == content(whole), "the same seed, the same words"
    assert len(read) > 5
    form = {"type": "json_object"}
    answer = await ask(http, up.url, "Write a JSON object.", **options, response_format=form)
    assert content(answer).lstrip().startswith("{")
