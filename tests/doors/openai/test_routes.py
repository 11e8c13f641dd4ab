"""The other routes of the OpenAI door, who may call them, and what is told of errors."""

import asyncio
import base64
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import pytest

from ownware_gateway.doors.openai import OpenAI, answers
from ownware_gateway.models.catalogue import DEMO_ID
from tests.doors.openai import CHAT, post, user
from tests.gateway import Gateways, get_json
from tests.provider import Provider, Reply

Http = aiohttp.ClientSession
MakeProfile = Callable[..., Path]

KEY: Final = "k" * 20
ROOT: Final = Path(__file__).parents[3]


async def get(http: Http, url: str, **headers: str) -> tuple[int, Any]:
    async with http.get(url, headers=headers) as response:
        return response.status, await response.json()


async def test_health_needs_no_token(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway(require_auth=True)
    assert await get(http, f"{up.url}/health") == (200, {"status": "ok"})


# -- models


async def test_models_are_the_profiles_then_the_models_that_can_be_used(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile
) -> None:
    make_profile("zoe")
    up = await start_gateway()
    status, found = await get(http, f"{up.url}/v1/models")
    assert (status, found["object"]) == (200, "list")
    names = [model["id"] for model in found["data"]]
    assert names[:2] == ["assistant", "zoe"]
    assert names[-1] == DEMO_ID
    assert not any(name.startswith("anthropic:") for name in names), "no key"
    assert all(
        set(model) == {"id", "object", "created", "owned_by"} and model["object"] == "model"
        for model in found["data"]
    )


@pytest.mark.parametrize("name", ["assistant", DEMO_ID, "openai:some/model:free"])
async def test_a_model_is_found_by_its_name_as_it_is_and_escaped(
    start_gateway: Gateways, http: Http, name: str
) -> None:
    up = await start_gateway()
    for spelled in {name, quote(name, safe="")}:
        status, found = await get(http, f"{up.url}/v1/models/{spelled}")
        assert (status, found["id"]) == (200, name)


@pytest.mark.parametrize("name", ["nobody", "anthropic:x", "nonsense:x", "demo:x"])
async def test_a_model_that_cannot_be_used_is_a_404(
    start_gateway: Gateways, http: Http, name: str
) -> None:
    up = await start_gateway()
    status, found = await get(http, f"{up.url}/v1/models/{name}")
    assert (status, found["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_models_of_a_profile_begin_with_it(
    start_gateway: Gateways, http: Http, make_profile: MakeProfile, method: str
) -> None:
    make_profile("zoe")
    up = await start_gateway()
    async with http.request(method, f"{up.url}/openai/zoe/v1/models") as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names[0] == "zoe"
    assert "assistant" not in names


# -- vectors and single prompts


@pytest.mark.parametrize("given", ["four", ["four", "letters"], [[1, 2], [3]]])
async def test_embeddings_come_from_the_providers_own_route(
    start_gateway: Gateways, http: Http, provider: Provider, given: Any
) -> None:
    up = await start_gateway()
    body = {"model": "openai:embed", "input": given, "dimensions": 2}
    status, _, answer = await post(http, up.url, "/v1/embeddings", body)
    assert status == 200, answer
    texts = [given] if isinstance(given, str) else given
    vectors = [item["embedding"] for item in answer["data"]]
    assert vectors == [[float(len(text)), 0.5] for text in texts]
    assert [item["index"] for item in answer["data"]] == list(range(len(texts)))
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    (asked,) = await provider.requested()
    assert asked.body["model"] == "embed"
    assert asked.body["dimensions"] == 2
    assert asked.headers["Authorization"].startswith("Bearer ")


async def test_embeddings_in_base64_are_32_bit_numbers(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    body = {"model": "embed", "input": "four", "encoding_format": "base64"}
    _, _, answer = await post(http, up.url, "/v1/embeddings", body)
    packed = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<2f", packed) == (4.0, 0.5)


async def test_a_model_of_ollama_embeds_too(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    up = await start_gateway(ollama_host=provider.url, embedding_model="ollama:nomic-embed")
    assert (await post(http, up.url, "/embed", {"text": "abc"}))[2] == {"vector": [3.0, 0.5]}
    assert provider.requests[0].body["model"] == "nomic-embed"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {"input": "x"}, 404),
        ("/v1/embeddings", {"input": [], "model": "openai:x"}, 400),
        ("/v1/embeddings", {"input": [""], "model": "openai:x"}, 400),
        ("/v1/embeddings", {"input": "x", "model": "anthropic:x"}, 404),
        ("/v1/embeddings", {"input": "x", "model": DEMO_ID}, 404),
        ("/v1/embeddings", {"input": "x", "model": "openai:x", "user": "me"}, 400),
        ("/embed", {"text": "x"}, 404),
        ("/embed", {}, 400),
        ("/execute", {}, 400),
        ("/execute", {"prompt": "x", "model_provider": "nonsense"}, 404),
    ],
)
async def test_what_cannot_be_done_is_refused(
    start_gateway: Gateways, http: Http, provider: Provider, path: str, body: Any, status: int
) -> None:
    up = await start_gateway(anthropic_api_key=KEY)
    got, _, answer = await post(http, up.url, path, body)
    assert (got, answer["error"]["type"]) == (status, "invalid_request_error")
    assert provider.requests == []


async def test_a_provider_that_refuses_to_embed_is_named(
    start_gateway: Gateways, http: Http, provider: Provider
) -> None:
    provider.reply(Reply(status=404, error="no such model"))
    up = await start_gateway()
    status, _, answer = await post(http, up.url, "/v1/embeddings", {"model": "x", "input": "y"})
    assert status == 502
    assert "openai" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("more", "model"),
    [
        ({}, "gpt-5.5"),
        ({"model_name": "openai:a"}, "a"),
        ({"model_name": "b", "model_provider": "openai"}, "b"),
    ],
)
async def test_a_prompt_is_executed_by_a_model_by_itself(
    start_gateway: Gateways, http: Http, provider: Provider, more: Any, model: str
) -> None:
    up = await start_gateway()
    body = {"prompt": "say this", **more}
    status, _, answer = await post(http, up.url, "/execute", body)
    assert status == 200, answer
    assert answer["response"] == "say this"
    assert (await get_json(http, up.url, f"/runs/{answer['id']}"))["status"] == "succeeded"
    (asked,) = await provider.requested()
    assert asked.body["model"] == model
    assert "tools" not in asked.body


# -- who may call


async def test_a_key_of_ones_own_is_asked_for_on_loopback_too(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway(api_key=KEY)
    body = {"messages": [user("hi")]}
    status, headers, answer = await post(http, up.url, CHAT, body)
    assert status == 401
    assert headers["WWW-Authenticate"] == "Bearer"
    assert answer["error"]["type"] == "authentication_error"
    assert answer["error"]["code"] == "invalid_api_key"
    status, _, _ = await post(http, up.url, CHAT, body, {"Authorization": f"Bearer {KEY}"})
    assert status == 200
    async with http.get(f"{up.url}/api/v1/threads") as response:
        assert response.status == 401
        assert (await response.json())["error"] == "unauthorized", "the other door's envelope"
    assert not (up.data_dir / "gateway-token").exists()


async def test_preflights_of_a_listed_origin_pass_with_a_key_on_and_answers_show_their_headers(
    start_gateway: Gateways, http: Http
) -> None:
    page = "https://chat.example.com"
    up = await start_gateway(api_key=KEY, cors_origin=(page,))
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-evil"
    preflight = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    async with http.options(f"{up.url}{CHAT}", headers=preflight) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == page
        allowed = response.headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert set(asked.split(",")) - set(allowed) == {"x-evil"}
        assert "x-conversation-id" in allowed
    headers = {"Origin": page, "Authorization": f"Bearer {KEY}", "X-Conversation-Id": "c"}
    status, shown, _ = await post(http, up.url, CHAT, {"messages": [user("hi")]}, headers)
    assert status == 200
    exposed = shown["Access-Control-Expose-Headers"]
    assert shown["X-Run-Id"]
    assert "X-Run-Id" in exposed
    assert "X-Conversation-Id" in exposed


async def test_a_foreign_page_is_told_so_in_this_doors_envelope(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    status, _, answer = await post(
        http, up.url, CHAT, {"messages": [user("hi")]}, {"Origin": "https://evil.example"}
    )
    assert (status, answer["error"]["code"]) == (403, "forbidden_origin")
    assert answer["error"]["type"] == "permission_error"


async def test_completions_count_as_runs_for_the_rate_limit(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway(behind_proxy=True, api_key=KEY, rate_limit_run=1)
    headers = {"Authorization": f"Bearer {KEY}"}
    answered = [
        (await post(http, up.url, CHAT, {"messages": [user("hi")]}, headers)) for _ in range(2)
    ]
    assert [status for status, _, _ in answered] == [200, 429]
    _, sent, answer = answered[1]
    assert answer["error"]["type"] == "rate_limit_error"
    assert int(sent["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)],
)
async def test_what_is_not_there_is_told_in_this_doors_envelope(
    start_gateway: Gateways, http: Http, method: str, path: str, status: int
) -> None:
    up = await start_gateway()
    async with http.request(method, f"{up.url}{path}") as response:
        assert response.status == status
        assert (await response.json())["error"]["type"] == "invalid_request_error"
        assert ("Allow" in response.headers) == (status == 405)


async def test_a_secret_in_a_wrong_request_is_not_repeated(
    start_gateway: Gateways, http: Http
) -> None:
    up = await start_gateway()
    key = "sk-" + "a1B2" * 12
    _, _, answer = await post(http, up.url, CHAT, {"messages": [user("x")], "model": key})
    assert key not in answer["error"]["message"]


# -- the door itself


def test_every_route_stands_in_the_page_of_the_door_and_answers_in_its_envelope() -> None:
    routes = OpenAI.__new__(OpenAI).routes()
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    described = set(re.findall(r"^\| `(GET|POST|DELETE) (/\S+?)` \|", page, re.MULTILINE))
    paths = {(route.method, re.sub(r":\.\+", "", route.path)) for route in routes}
    assert described == paths
    assert all(answers(path) for _, path in paths if path != "/health")


def test_the_door_loads_what_handles_requests_with_the_first_of_them() -> None:
    code = (
        "import sys, ownware_gateway.app; print([m for m in sys.modules if 'doors.openai.' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['ownware_gateway.doors.openai.errors']"


async def test_the_first_requests_may_come_at_once(start_gateway: Gateways, http: Http) -> None:
    up = await start_gateway()
    answered = await asyncio.gather(*(get(http, f"{up.url}/v1/models/assistant") for _ in range(8)))
    assert {status for status, _ in answered} == {200}
