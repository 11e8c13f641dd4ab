"""The catalogue, against real local servers and the real price data."""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.events import Usage
from ownware_gateway.models import Answer, ModelInfo, Request, UserTurn
from ownware_gateway.models.catalogue import (
    DEMO_ID,
    PROBE_KEPT_S,
    PROVIDERS,
    KnownModels,
    _list,
)
from ownware_gateway.models.openai import OpenAI
from ownware_gateway.models.responses import Responses
from ownware_gateway.settings import Settings
from tests.loopback import Loopback
from tests.provider import Provider, Reply

KEY = "sk-" + "k" * 24

#: Nothing listens there: port 1 is never given out.
NOWHERE = "127.0.0.1:1"

#: Every cloud provider, with the setting of its key.
CLOUD = [(provider.id, provider.key) for provider in PROVIDERS if not provider.probe]


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with Provider() as running:
        yield running


def settings(**fields: Any) -> Settings:
    return Settings(**{"ollama_host": NOWHERE, **fields})


async def ask(models: KnownModels, model_id: str) -> Answer:
    found = models.resolve(model_id)
    request = Request(found.name, [UserTurn("Hello")])
    *_, last = [part async for batch in found.model.stream(request) for part in batch]
    assert isinstance(last, Answer)
    await models.close()
    return last


def of(provider: str, models: list[ModelInfo]) -> list[ModelInfo]:
    return [model for model in models if model.provider == provider]


# -- list


async def test_without_any_key_only_the_built_in_model_can_be_used() -> None:
    models = await KnownModels(settings()).list()
    assert [model.id for model in models if model.has_credentials] == [DEMO_ID]
    assert models[-1].id == DEMO_ID


@pytest.mark.parametrize(("name", "key"), CLOUD)
async def test_a_key_makes_a_providers_models_usable_and_lists_them_first(
    name: str, key: str
) -> None:
    models = await KnownModels(settings(**{key: KEY})).list()
    usable = [model for model in models if model.has_credentials]
    assert {model.provider for model in usable} == {name, "demo"}
    assert models[: len(usable) - 1] == usable[:-1]
    assert models[-1].id == DEMO_ID


@pytest.mark.parametrize("name", [name for name, _ in CLOUD])
async def test_the_default_of_a_provider_is_listed_once_and_with_its_price(name: str) -> None:
    models = of(name, await KnownModels(settings()).list())
    (default,) = [model for model in models if model.default]
    assert models[0] == default
    assert default.id.startswith(f"{name}:")
    assert default.input_cost_per_m_tok
    assert default.output_cost_per_m_tok
    assert default.context_window
    assert default.context_window >= 100_000


async def test_a_window_is_known_of_a_provider_s_models_and_of_no_others() -> None:
    models = KnownModels(settings(ollama_host="http://127.0.0.1:1"))
    for _ in ("read from the price data", "known"):
        assert await models.window("openai:gpt-4o") == 128_000
    claude = await models.window("anthropic:claude-sonnet-4-5")
    assert claude is not None
    assert claude >= 200_000
    for name in ("openai:no-such-model", "ollama:llama3.2", DEMO_ID):
        assert await models.window(name) is None


@pytest.mark.parametrize(
    ("entry", "window"),
    [
        ({"max_model_len": 8_192}, 8_192),
        ({"meta": {"n_ctx": 4_096, "n_ctx_train": 131_072}}, 4_096),
        ({"meta": {"n_ctx_train": 131_072}}, None),
        ({"context_length": 32_768}, 32_768),
        ({"context_window": 16_384}, 16_384),
        ({"context_length": "large", "meta": "odd"}, None),
        ({"context_length": True}, None),
        ({}, None),
    ],
)
def test_a_window_is_what_a_server_has_set_up(entry: dict[str, Any], window: int | None) -> None:
    (served,) = _list({"data": [{"id": "m", **entry}]})
    assert served.window == window


async def test_what_can_be_used_at_once_is_known_without_the_list(provider: Provider) -> None:
    provider.models = ["qwen3:8b", "llama3.2"]
    keys = {key: KEY for _, key in CLOUD}
    models = KnownModels(settings(**keys, ollama_host=provider.url))
    usable = await models.usable()
    *defaults, first, second, last = usable
    assert [name.partition(":")[0] for name in defaults] == [name for name, _ in CLOUD]
    assert (first, second, last) == ("ollama:qwen3:8b", "ollama:llama3.2", DEMO_ID)
    listed = {model.id for model in await models.list() if model.has_credentials}
    assert listed.issuperset(usable)


async def test_the_list_is_of_current_models_that_chat() -> None:
    models = await KnownModels(settings()).list()
    ids = [model.id for model in models]
    assert len(set(ids)) == len(ids)
    assert 50 < len(ids) < 250
    wrong = "embed|image|audio|tts|realtime|transcribe|moderation|search|whisper|davinci|gpt-3|:.*:"
    assert [name for name in ids if re.search(wrong, name)] == []
    assert {model.provider for model in models} == {name for name, _ in CLOUD} | {"demo"}


async def test_of_a_price_with_tiers_the_first_is_listed() -> None:
    models = of("openai", await KnownModels(settings()).list())
    (tiered,) = [model for model in models if model.id == "openai:gpt-5.5"]
    assert (tiered.input_cost_per_m_tok, tiered.output_cost_per_m_tok) == (5.0, 30.0)


async def test_what_ollama_has_pulled_is_listed(provider: Provider) -> None:
    provider.models = ["qwen3:8b", "nomic-embed-text", "llama3.2"]
    models = of("ollama", await KnownModels(settings(ollama_host=provider.url)).list())
    assert [model.id for model in models] == ["ollama:qwen3:8b", "ollama:llama3.2"]
    assert [model.default for model in models] == [True, False]
    assert all(model.has_credentials for model in models)
    assert models[0].input_cost_per_m_tok == 0.0


async def test_what_a_local_server_has_is_listed(provider: Provider) -> None:
    models = of("local", await KnownModels(settings(local_base_url=provider.base_url)).list())
    assert [model.id for model in models] == ["local:test-model"]


async def test_local_servers_are_listed_before_what_needs_a_key(provider: Provider) -> None:
    models = await KnownModels(settings(ollama_host=provider.url)).list()
    assert models[0].id == "ollama:test-model"


async def test_a_local_server_is_asked_with_its_key() -> None:
    keys: list[str | None] = []

    async def serve(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": "mine"}]})

    async with served(serve) as url:
        fields = settings(local_base_url=url, local_api_key=KEY)
        models = of("local", await KnownModels(fields).list())
    assert [model.id for model in models] == ["local:mine"]
    assert keys == [f"Bearer {KEY}"]


async def test_a_server_that_is_silent_is_not_waited_for_long() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with served(hang) as url:
        async with asyncio.timeout(5):
            found = await KnownModels(settings(ollama_host=url, local_base_url=url)).list()
    assert of("ollama", found) == []
    assert of("local", found) == []


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"data": 1}', b'{"data": [1, {}, {"id": 2}]}', b" " * 2_000_000],
)
async def test_a_server_that_talks_nonsense_has_no_models(body: bytes) -> None:
    async def serve(request: web.Request) -> web.Response:
        return web.Response(body=body)

    async with served(serve) as url:
        assert of("local", await KnownModels(settings(local_base_url=url)).list()) == []


async def test_probes_are_believed_for_a_while_and_then_made_again(provider: Provider) -> None:
    now = 100.0
    models = KnownModels(settings(ollama_host=provider.url), clock=lambda: now)
    assert len(of("ollama", await models.list())) == 1
    provider.models = ["a", "b"]
    now += PROBE_KEPT_S - 0.1
    assert len(of("ollama", await models.list())) == 1
    now += 0.2
    assert len(of("ollama", await models.list())) == 2


async def test_askers_at_the_same_time_share_one_probe() -> None:
    asked = 0

    async def serve(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"models": [{"name": "a"}]})

    async with served(serve) as url:
        models = KnownModels(settings(ollama_host=url))
        await asyncio.gather(*(models.list() for _ in range(5)))
    assert asked == 1


# -- resolve


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("gpt-5.5", "provider:model"),
        (":gpt-5.5", "provider:model"),
        ("openai:", "provider:model"),
        ("openai: ", "provider:model"),
        ("", "provider:model"),
        ("opena:gpt-5.5", "did you mean openai:?"),
        ("OpenAI:gpt-5.5", "did you mean openai:?"),
        ("zzz:gpt-5.5", "known are: openai, anthropic"),
        ("demo:assitant", DEMO_ID),
        ("openai:gpt-5.5", "OPENAI_API_KEY is not set"),
        ("anthropic:claude-sonnet-5-5", "ANTHROPIC_API_KEY is not set"),
        ("local:mine", "OWNWARE_LOCAL_BASE_URL is not set"),
    ],
)
async def test_a_model_that_cannot_be_used_is_refused_with_what_to_do(
    model_id: str, said: str
) -> None:
    with pytest.raises(GatewayError) as caught:
        KnownModels(settings()).resolve(model_id)
    assert caught.value.code == "unknown_model"
    assert said in caught.value.message


async def test_a_long_model_string_is_not_repeated_whole() -> None:
    with pytest.raises(GatewayError) as caught:
        KnownModels(settings()).resolve("x" * 10_000)
    assert len(caught.value.message) < 400


async def test_the_built_in_model_needs_nothing() -> None:
    answer = await ask(KnownModels(settings()), DEMO_ID)
    assert "built-in offline model" in answer.turn.text


@pytest.mark.parametrize(("name", "key"), CLOUD)
async def test_a_cloud_provider_is_asked_at_its_own_address_with_its_key(
    provider: Provider, name: str, key: str
) -> None:
    provider.reply(Reply(text=["Good day"]))
    fields = {key: KEY, f"{name}_base_url": provider.base_url}
    answer = await ask(KnownModels(settings(**fields)), f"{name}:brand/new-model")
    assert answer.turn.text == "Good day"
    (asked,) = provider.requests
    assert asked.body["model"] == "brand/new-model"
    assert KEY in (asked.headers.get("x-api-key"), asked.headers.get("Authorization", "")[7:])


@pytest.mark.parametrize(
    ("address", "dialect"),
    [
        ("", Responses),
        ("https://api.openai.com/v1", Responses),
        ("https://eu.api.openai.com/v1/", Responses),
        ("https://mine.openai.azure.com/openai/v1", OpenAI),
        ("https://notapi.openai.com/v1", OpenAI),
        ("https://api.openai.com.example.org/v1", OpenAI),
        ("http://127.0.0.1:8000/v1", OpenAI),
    ],
)
async def test_openai_is_asked_in_responses_at_its_own_address_only(
    address: str, dialect: type
) -> None:
    models = KnownModels(settings(openai_api_key=KEY, openai_base_url=address))
    seeing: Any = models.resolve("openai:gpt-5.5").model
    found = seeing.model
    assert type(found) is dialect
    assert getattr(found, "base_url", None) == (address or "https://api.openai.com/v1").rstrip("/")


async def test_models_that_speak_only_responses_are_listed() -> None:
    ids = {model.id for model in await KnownModels(settings()).list()}
    assert {"openai:gpt-5.5-pro", "openai:gpt-5.3-codex", "openai:o3-pro"} <= ids


async def test_ollama_is_asked_in_openais_dialect(provider: Provider) -> None:
    answer = await ask(KnownModels(settings(ollama_host=provider.url)), "ollama:qwen3:8b")
    assert answer.turn.text == "Hello"
    (asked,) = provider.requests
    assert (asked.path, asked.body["model"]) == ("/v1/chat/completions", "qwen3:8b")


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "0.0.0.0:{}", ":{}", "http://localhost:{}/"])
async def test_ollama_is_found_however_its_variable_is_written(
    provider: Provider, host: str
) -> None:
    given = host.format(provider.url.rpartition(":")[2])
    answer = await ask(KnownModels(settings(ollama_host=given)), "ollama:any")
    assert answer.turn.text == "Hello"


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("", "http://127.0.0.1:11434/v1"),
        ("box", "http://box:11434/v1"),
        ("box:80", "http://box:80/v1"),
        ("http://box", "http://box:80/v1"),
        ("https://box/ollama/", "https://box:443/ollama/v1"),
        ("[::]:5", "http://[::1]:5/v1"),
    ],
)
async def test_ollamas_ports_are_its_own(given: str, address: str) -> None:
    seeing: Any = KnownModels(Settings(ollama_host=given)).resolve("ollama:any").model
    assert seeing.model.base_url == address


@pytest.mark.parametrize(
    ("field", "given", "name"),
    [
        ("ollama_host", "box:many", "OLLAMA_HOST"),
        ("ollama_host", "ftp://box", "OLLAMA_HOST"),
        ("local_base_url", "ftp://box", "OWNWARE_LOCAL_BASE_URL"),
    ],
)
async def test_an_address_that_is_none_stops_the_start(field: str, given: str, name: str) -> None:
    with pytest.raises(BootError, match=name):
        KnownModels(settings(**{field: given}))


async def test_no_key_shows_in_what_is_known() -> None:
    models = KnownModels(settings(openai_api_key=KEY, anthropic_api_key=KEY))
    shown = [models, models.resolve("openai:gpt-5.5"), models.resolve("anthropic:x").model]
    assert all(KEY not in repr(thing) for thing in shown)


# -- stand_in


async def test_without_a_local_server_the_built_in_model_stands_in() -> None:
    found = await KnownModels(settings()).stand_in("openai:gpt-5.5")
    assert (found.id, found.name) == (DEMO_ID, "assistant")
    assert found.fallback_reason == (
        "OPENAI_API_KEY is not set, so the built-in offline model answers instead of "
        "openai:gpt-5.5."
    )


async def test_a_running_local_model_stands_in_before_the_built_in_one(provider: Provider) -> None:
    found = await KnownModels(settings(local_base_url=provider.base_url)).stand_in("google:any")
    assert found.id == "local:test-model"
    assert found.fallback_reason is not None
    assert "GOOGLE_API_KEY is not set" in found.fallback_reason
    assert "the local model local:test-model" in found.fallback_reason


async def test_ollama_stands_in_before_another_local_server(provider: Provider) -> None:
    models = KnownModels(settings(ollama_host=provider.url, local_base_url=provider.base_url))
    assert (await models.stand_in("openai:gpt-5.5")).id == "ollama:test-model"


async def test_a_model_that_ollama_has_in_its_cloud_never_stands_in() -> None:
    async def serve(request: web.Request) -> web.Response:
        cloud = {"name": "big:cloud", "remote_host": "https://ollama.com"}
        return web.json_response({"models": [cloud, {"name": "small"}]})

    async with served(serve) as url:
        models = KnownModels(settings(ollama_host=url))
        assert (await models.stand_in("openai:gpt-5.5")).id == "ollama:small"
        assert [model.id for model in await models.list()][:1] == ["ollama:big:cloud"]


async def test_a_cloud_provider_never_stands_in() -> None:
    found = await KnownModels(settings(anthropic_api_key=KEY)).stand_in("openai:gpt-5.5")
    assert found.id == DEMO_ID


async def test_a_local_model_without_an_address_has_a_stand_in() -> None:
    found = await KnownModels(settings()).stand_in("local:mine")
    assert found.fallback_reason is not None
    assert found.fallback_reason.startswith("OWNWARE_LOCAL_BASE_URL is not set")


async def test_a_model_that_can_be_used_needs_no_stand_in() -> None:
    found = await KnownModels(settings(openai_api_key=KEY)).stand_in("openai:gpt-5.5")
    assert (found.id, found.fallback_reason) == ("openai:gpt-5.5", None)


@pytest.mark.parametrize("model_id", ["gpt-5.5", "opena:gpt-5.5"])
async def test_nothing_stands_in_for_a_wrong_model_string(model_id: str) -> None:
    with pytest.raises(GatewayError) as caught:
        await KnownModels(settings()).stand_in(model_id)
    assert caught.value.code == "unknown_model"


# -- price


async def test_a_known_models_price_counts_what_the_cache_held() -> None:
    usage = Usage(
        input_tokens=1_000_000,
        output_tokens=1_000_000,
        cache_read_tokens=500_000,
        cache_creation_tokens=100_000,
    )
    found = await KnownModels(settings()).price("anthropic:claude-sonnet-5-5", usage)
    assert found.model == "anthropic:claude-sonnet-5-5"
    assert found.input_tokens == 1_000_000
    # $2 a million in, $10 out, $0.10 read from the cache, $2.50 written to it.
    assert found.cost_usd == pytest.approx(0.4 * 2 + 10 + 0.5 * 0.1 + 0.1 * 2.5)


@pytest.mark.parametrize("model_id", ["openai:brand-new", "elsewhere:gpt-5.5", "ollama:big:cloud"])
async def test_an_unknown_price_is_none(model_id: str) -> None:
    usage = Usage(input_tokens=10, output_tokens=10)
    found = await KnownModels(settings()).price(model_id, usage)
    assert (found.model, found.cost_usd) == (model_id, None)


async def test_figures_that_contradict_each_other_have_no_price() -> None:
    usage = Usage(input_tokens=1, cache_read_tokens=10)
    found = await KnownModels(settings()).price("openai:gpt-5.5", usage)
    assert found.cost_usd is None


@pytest.mark.parametrize("model_id", [DEMO_ID, "ollama:qwen3:8b", "local:mine"])
async def test_what_runs_here_costs_nothing(model_id: str) -> None:
    found = await KnownModels(settings()).price(model_id, Usage(input_tokens=10, output_tokens=10))
    assert found.cost_usd == 0.0


# -- the price data is big


def run_python(code: str) -> None:
    """Run it in a fresh interpreter, where nothing is imported yet."""
    head = """
import asyncio, resource, sys, threading
from ownware_gateway.models.catalogue import KnownModels
from ownware_gateway.settings import Settings
from ownware_gateway.events import Usage
models = KnownModels(Settings(openai_api_key="k", ollama_host="127.0.0.1:1"))
used = Usage(input_tokens=1_000_000)
"""
    subprocess.run([sys.executable, "-c", head + code], check=True, timeout=20)


def test_the_price_data_is_not_imported_until_a_price_is_needed() -> None:
    run_python("""
async def main():
    models.resolve("openai:gpt-5.5")
    assert await models.usable() == ["openai:gpt-5.5", "demo:assistant"]
    await models.price("demo:assistant", used)
    await models.price("ollama:any", used)
    assert "genai_prices" not in sys.modules
    assert (await models.price("openai:gpt-5.5", used)).cost_usd
    assert "genai_prices" in sys.modules

asyncio.run(main())
""")


def test_the_price_data_is_not_imported_on_the_event_loops_thread() -> None:
    run_python("""
class Watch:
    threads = set()

    def find_spec(self, name, *_):
        if name.startswith("genai_prices"):
            self.threads.add(threading.current_thread())

sys.meta_path.insert(0, Watch())
asyncio.run(models.price("openai:gpt-5.5", used))
assert Watch.threads and threading.main_thread() not in Watch.threads
""")


def test_without_a_file_handle_a_price_is_not_known_and_with_one_it_is() -> None:
    run_python("""
async def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    unpriced = await models.price("openai:gpt-5.5", used)
    assert (unpriced.model, unpriced.cost_usd) == ("openai:gpt-5.5", None)
    try:
        await models.list()
    except Exception as error:
        assert error.code == "overloaded", error
    else:
        raise AssertionError("a list without prices")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await models.price("openai:gpt-5.5", used)).cost_usd
    assert len(await models.list()) > 50

asyncio.run(main())
""")


@asynccontextmanager
async def served(handler: Any) -> AsyncIterator[str]:
    """Answer every path on loopback with one handler; what is entered is its address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with Loopback(app) as server:
        yield server.url
