"""Which models there are, which of them can be used now, and what they cost.

Cloud providers are known from a table here and from the price data of `genai-prices`, which is
imported when a price or the whole list is first asked for, and not on the event loop's thread;
local servers are asked what they have.
"""

import asyncio
import dataclasses
import difflib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.events import Usage
from ownware_gateway.models import Dispatch, Embedded, Model, ModelInfo
from ownware_gateway.models.http import Endpoint, Pool
from ownware_gateway.settings import Settings, variable

if TYPE_CHECKING:
    from ownware_gateway.models.anthropic import Anthropic
    from ownware_gateway.models.openai import OpenAI
    from ownware_gateway.models.responses import Responses

#: How long a local server may take to say which models it has, and how long that is believed.
PROBE_TIMEOUT_S: Final = 1.0
PROBE_KEPT_S: Final = 5.0
PROBE_BYTES_MAX: Final = 1_048_576
SERVED_MAX: Final = 500

#: When to ask again for a list that could not be made.
PRICES_AGAIN_S: Final = 5.0

#: The most of a model string that an error repeats.
QUOTE_LENGTH_MAX: Final = 100

DEMO: Final = "demo"
DEMO_NAME: Final = "assistant"
DEMO_ID: Final = f"{DEMO}:{DEMO_NAME}"

OLLAMA_PORT: Final = 11434


def _address(setting: str, text: str) -> str:
    """Return a base URL as it is used; `setting` is where it comes from."""
    text = text if "://" in text else f"http://{text}"
    if urlsplit(text).scheme not in ("http", "https"):
        raise BootError(f"{variable(setting)} must be an http or https address.")
    return text.rstrip("/")


def _ollama_address(setting: str, text: str) -> str:
    """Return Ollama's address from what its own variable may hold.

    Scheme, host and port may each be missing, and an address to listen on may stand for one to
    connect to (https://github.com/ollama/ollama/blob/main/envconfig/config.go).
    """
    scheme, given, rest = text.rpartition("://")
    scheme = scheme if given else "http"
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port
    except ValueError:
        raise BootError(
            f"{variable(setting)} must be the address of Ollama, such as 127.0.0.1:{OLLAMA_PORT}."
        ) from None
    if port is None:
        port = OLLAMA_PORT if not given else 443 if scheme == "https" else 80
    host = parts.hostname or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- read, not bound
    host = f"[{host}]" if ":" in host else host
    return f"{_address(setting, f'{scheme}://{host}:{port}')}{parts.path.rstrip('/')}"


#: What is spoken: OpenAI's Chat Completions, its Responses, Anthropic's Messages.
Dialect = Literal["chat", "responses", "anthropic"]


class Provider(NamedTuple):
    """Where models come from.

    `url` and `key` are the settings that hold another address and a key; `needs` is the setting
    without which the provider cannot be used. `default` is the model to choose when nobody has
    chosen, `listed` the ids that the price data's many are cut down to: current ones that can chat
    and call tools. `dialect` is spoken at any address, `own_dialect`, if there is one, at the
    provider's own. `address` makes an address of what `url` holds, and `path` leads on to the
    dialect; `probe`, for a server that one runs oneself, leads to the list of its models.
    """

    id: str
    base_url: str
    url: str
    key: str = ""
    needs: str = ""
    dialect: Dialect = "chat"
    own_dialect: Dialect | None = None
    address: Callable[[str, str], str] = _address
    path: str = ""
    default: str = ""
    listed: str = ""
    probe: str = ""


#: Sorted as `GET /models` lists them.
PROVIDERS: Final = (
    Provider(
        "openai",
        "https://api.openai.com/v1",
        url="openai_base_url",
        key="openai_api_key",
        needs="openai_api_key",
        own_dialect="responses",
        default="gpt-5.5",
        listed=r"gpt-(?:4\.1|4o|[5-9])|o[3-9]",
    ),
    Provider(
        "anthropic",
        "https://api.anthropic.com",
        url="anthropic_base_url",
        key="anthropic_api_key",
        needs="anthropic_api_key",
        dialect="anthropic",
        default="claude-sonnet-5-5",
        listed=r"claude-[a-z]+-(?:4-[5-9]|[5-9])",
    ),
    Provider(
        "google",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        url="google_base_url",
        key="google_api_key",
        needs="google_api_key",
        default="gemini-3.8-flash",
        listed=r"gemini-(?:2\.5|[3-9])",
    ),
    Provider(
        "openrouter",
        "https://openrouter.ai/api/v1",
        url="openrouter_base_url",
        key="openrouter_api_key",
        needs="openrouter_api_key",
        default="anthropic/claude-sonnet-5.5",
        listed=r"anthropic/claude-[a-z]+-(?:4\.[5-9]|[5-9])|openai/(?:gpt-(?:4\.1|[5-9])|o[3-9])"
        r"|google/gemini-(?:2\.5|[3-9])|x-ai/grok-[4-9]|deepseek/deepseek-v[4-9]"
        r"|qwen/qwen3\.[6-9]|mistralai/(?:mistral-(?:large|medium)|devstral|codestral)"
        r"|moonshotai/kimi-k[2-9]|z-ai/glm-[5-9]|minimax/minimax-m[2-9]|meta/muse"
        r"|nvidia/nemotron-[3-9]",
    ),
    Provider(
        "ollama",
        "127.0.0.1",
        url="ollama_host",
        address=_ollama_address,
        path="/v1",
        probe="/api/tags",
    ),
    Provider(
        "local",
        "",
        url="local_base_url",
        key="local_api_key",
        needs="local_base_url",
        probe="/models",
    ),
)

#: Providers whose models run here.
FREE: Final = frozenset({DEMO, *(provider.id for provider in PROVIDERS if provider.probe)})

#: What no listed id has in it: other trades than chat, variants and dated copies of a model.
UNLISTED: Final = re.compile(
    r"audio|embed|guard|image|instruct|live|moderation|nano-banana|omni|realtime|robotics|search"
    r"|safety|transcribe|tts|vision|cyber|rosalind|deep-research|multi-agent|contributor|legal|mamba"
    r"|-her\b|preview-\d|:|\d{4}-\d\d|-\d{4}"
)


@dataclass(frozen=True, slots=True)
class _Served:
    """A model that a local server has; a `remote` one it only passes on to a cloud."""

    name: str
    remote: bool
    window: int | None = None


class KnownModels:
    """The catalogue of all providers; see `models.Catalogue`. `clock` returns seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._pool = Pool()
        #: Those that were asked for, by their providers' ids.
        self._models: dict[str, Model] = {}
        for provider in PROVIDERS:
            if not self._missing(provider):
                self._address(provider)  # One that is none must not be found out in a run.
        self._listed: Sequence[ModelInfo] | None = None
        self._probing = asyncio.Lock()
        self._probed: tuple[float, Mapping[str, Sequence[_Served]]] | None = None
        self._priced = False

    async def usable(self) -> Sequence[str]:
        """Return ids of models that can be used now, the built-in one last.

        Of a cloud provider that is the default alone: it takes no price data to know that.
        """
        keyed = [p for p in PROVIDERS if p.default and not self._missing(p)]
        served = await self._served()
        return [
            *(f"{provider.id}:{provider.default}" for provider in keyed),
            *(f"{server}:{model.name}" for server, models in served.items() for model in models),
            DEMO_ID,
        ]

    async def list(self) -> list[ModelInfo]:
        """Return the models: those that can be used now first, the built-in one last.

        A local server that does not answer is left out: what it has is not known then. Raises
        GatewayError `overloaded` when the price data cannot be read.
        """
        if self._listed is None:
            try:
                self._listed = await asyncio.to_thread(self._cloud_models)
            except (OSError, ImportError) as error:
                raise GatewayError(
                    "overloaded",
                    "The price data cannot be read now, for want of a file handle perhaps; "
                    "try again.",
                    retry_after_s=PRICES_AGAIN_S,
                ) from error
        served = [
            ModelInfo(
                id=f"{provider}:{model.name}",
                name=model.name,
                provider=provider,
                has_credentials=True,
                default=position == 0,
                context_window=model.window,
                input_cost_per_m_tok=None if model.remote else 0.0,
                output_cost_per_m_tok=None if model.remote else 0.0,
            )
            for provider, models in (await self._served()).items()
            for position, model in enumerate(models)
        ]
        demo = ModelInfo(
            id=DEMO_ID,
            name="Built-in offline model",
            provider=DEMO,
            has_credentials=True,
            default=True,
            input_cost_per_m_tok=0.0,
            output_cost_per_m_tok=0.0,
        )
        return [
            *(model for model in self._listed if model.has_credentials),
            *served,
            *(model for model in self._listed if not model.has_credentials),
            demo,
        ]

    def resolve(self, model_id: str) -> Dispatch:
        """Return the model with this `provider:model` string.

        A provider's model need not be one that `list` knows: new ones appear all the time.
        Raises GatewayError `unknown_model`; see `models.Catalogue`.
        """
        provider, name = _split(model_id)
        if provider is not None and (missing := self._missing(provider)):
            raise GatewayError(
                "unknown_model",
                f"{variable(missing)} is not set, and {provider.id}: models need it. Set it and "
                f"start the gateway again, or choose another model, such as {DEMO_ID}.",
            )
        return Dispatch(model_id, name, self._model(provider))

    async def stand_in(self, model_id: str) -> Dispatch:
        """Return what answers when the model's own provider lacks its key or address.

        Ollama's first model, else another local server's, else the built-in one. A model that
        can be used needs no stand-in and is returned itself.
        """
        provider, _ = _split(model_id)
        missing = self._missing(provider) if provider else ""
        if not missing:
            return self.resolve(model_id)
        found = [
            f"{server}:{model.name}"
            for server, models in (await self._served()).items()
            for model in models
            if not model.remote
        ]
        instead, what = DEMO_ID, "the built-in offline model"
        if found:
            instead, what = found[0], f"the local model {found[0]}"
        reason = f"{variable(missing)} is not set, so {what} answers instead of {model_id}."
        return dataclasses.replace(self.resolve(instead), fallback_reason=reason)

    async def embed(
        self, model_id: str, texts: Sequence[Any], dimensions: int | None = None
    ) -> Embedded:
        """Return the texts as vectors; see `models.Catalogue`."""
        from ownware_gateway.models.embeddings import embed

        model_id = model_id or self._settings.embedding_model
        if not model_id:
            raise GatewayError(
                "unknown_model",
                f"The request names no embedding model, and {variable('embedding_model')} is not "
                "set.",
            )
        self.resolve(model_id)
        provider, name = _split(model_id)
        if provider is None or provider.dialect != "chat":
            raise GatewayError("unknown_model", f"{_quoted(model_id)} makes no embeddings.")
        key = self._key(provider)
        endpoint = Endpoint(
            provider=provider.id,
            url=f"{self._address(provider)}{provider.path}/embeddings",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            silence_s=self._settings.model_silence_s,
            key_variable=variable(provider.key) if provider.key else "",
        )
        made = await embed(self._pool, endpoint, name, texts, dimensions)
        return made._replace(model=model_id)

    async def price(self, model_id: str, usage: Usage) -> Usage:
        """Return the usage with `model` and `cost_usd` filled in; an unknown price stays None.

        Models on one's own machine have no price per token: they cost 0.
        """
        provider_id, _, name = model_id.partition(":")
        if provider_id in FREE:
            # Ollama passes models with such names on to its cloud, which has other prices.
            cost = None if name.endswith("cloud") else 0.0
        else:
            cost = await self._price_usd(provider_id, name, usage)
        return usage.model_copy(update={"model": model_id, "cost_usd": cost})

    async def window(self, model_id: str) -> int | None:
        """Return how many tokens prompt and answer may have together; None when it is unknown.

        Of a server of one's own, what it says of the model now; of any other, what the price data
        says.
        """
        provider_id, _, name = model_id.partition(":")
        if provider_id == DEMO:
            return None
        if provider_id in FREE:
            served = (await self._served()).get(provider_id, ())
            return next((model.window for model in served if model.name == name), None)
        try:
            if self._priced:
                return _window(provider_id, name)
            window = await asyncio.to_thread(_window, provider_id, name)
        except (OSError, ImportError):
            return None  # As with prices: there may be no file handle left now.
        self._priced = True
        return window

    async def close(self) -> None:
        """Close every connection to a provider."""
        await self._pool.close()

    def _missing(self, provider: Provider) -> str:
        """Return the setting that the provider needs and does not have, if any."""
        needs = provider.needs
        return needs if needs and not getattr(self._settings, needs) else ""

    def _address(self, provider: Provider) -> str:
        given = getattr(self._settings, provider.url)
        return provider.address(provider.url, given or provider.base_url)

    def _key(self, provider: Provider) -> str:
        return getattr(self._settings, provider.key) if provider.key else ""

    def _model(self, provider: Provider | None) -> Model:
        """Return the adapter of a provider, the built-in model for None, made at its first use."""
        name = provider.id if provider is not None else DEMO
        if name not in self._models:
            try:
                self._models[name] = self._adapter(provider) if provider is not None else _demo()
            except (OSError, ImportError) as error:
                raise GatewayError(
                    "overloaded",
                    f"What speaks to {name} cannot be read now, for want of a file handle perhaps; "
                    "try again.",
                    retry_after_s=PRICES_AGAIN_S,
                ) from error
        return self._models[name]

    def load(self) -> None:
        """Import what speaks to the providers that can be used, before it is needed."""
        for provider in (None, *PROVIDERS):
            if provider is None or not self._missing(provider):
                # Whoever needs it tries again, and is told what is wrong.
                with suppress(GatewayError):
                    self._model(provider)

    def _adapter(self, provider: Provider) -> Model:
        from ownware_gateway.models.images import Seeing

        address = self._address(provider)
        own = provider.own_dialect if _is_own(address, provider) else None
        adapter = _speaks(own or provider.dialect)(
            self._pool,
            provider=provider.id,
            base_url=address + provider.path,
            key=self._key(provider),
            key_variable=variable(provider.key) if provider.key else "",
            silence_s=self._settings.model_silence_s,
        )
        return Seeing(adapter)

    async def _price_usd(self, provider_id: str, name: str, usage: Usage) -> float | None:
        try:
            if self._priced:
                return _price_usd(provider_id, name, usage)
            # The price data is read at the first use, which takes a while.
            cost = await asyncio.to_thread(_price_usd, provider_id, name, usage)
        except (OSError, ImportError):
            # There may be no file handle left for that now. An answer is worth more than its
            # price, and the next one asks again.
            return None
        self._priced = True
        return cost

    def _cloud_models(self) -> Sequence[ModelInfo]:
        known = {provider.id: provider for provider in _price_data()}
        return [
            _info(provider, source, model, has_credentials=not self._missing(provider))
            for provider in PROVIDERS
            if provider.listed and (source := known.get(provider.id))
            for model in _listed(source.models, provider)
        ]

    async def _served(self) -> Mapping[str, Sequence[_Served]]:
        """Return what the local servers have, asking them all at once."""
        async with self._probing:
            if self._probed is None or self._clock() - self._probed[0] >= PROBE_KEPT_S:
                probed = [p for p in PROVIDERS if p.probe and not self._missing(p)]
                found = await asyncio.gather(*map(self._probe, probed))
                served = {p.id: names for p, names in zip(probed, found, strict=True)}
                self._probed = (self._clock(), served)
            return self._probed[1]

    async def _probe(self, provider: Provider) -> Sequence[_Served]:
        key = self._key(provider)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                aiohttp.ClientSession(headers=headers) as session,
                session.get(self._address(provider) + provider.probe, allow_redirects=False) as got,
            ):
                return _list(json.loads(await _read(got))) if got.status == 200 else ()
        except (aiohttp.ClientError, OSError, ValueError):
            # It is not there, too slow, or something else than a model server.
            return ()


def _is_own(address: str, provider: Provider) -> bool:
    """Return whether the address is the provider's own, a regional one (`eu.`…) included."""
    host, own = (urlsplit(url).hostname or "" for url in (address, provider.base_url))
    return f".{host}".endswith(f".{own}")


def _split(model_id: str) -> tuple[Provider | None, str]:
    """Return the provider, None for the built-in model, and its name for the model."""
    provider_id, colon, name = model_id.partition(":")
    if not colon or not provider_id or not name.strip():
        raise GatewayError(
            "unknown_model",
            f"{_quoted(model_id)} is not a model. Models are written provider:model, such as "
            f"openai:{PROVIDERS[0].default} or {DEMO_ID}.",
        )
    if provider_id == DEMO:
        if name != DEMO_NAME:
            raise GatewayError("unknown_model", f"The only model of {DEMO}: is {DEMO_ID}.")
        return None, name
    for provider in PROVIDERS:
        if provider.id == provider_id:
            return provider, name
    names = [*(provider.id for provider in PROVIDERS), DEMO]
    near = difflib.get_close_matches(provider_id.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}:?" if near else f"known are: {', '.join(names)}."
    raise GatewayError("unknown_model", f"There is no provider {_quoted(provider_id)}; {hint}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTE_LENGTH_MAX else text[:QUOTE_LENGTH_MAX] + "…")


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > PROBE_BYTES_MAX:
            return b""
    return body


def _list(body: Any) -> Sequence[_Served]:
    """Return what a server lists: OpenAI's `data` of `id`s, or Ollama's `models` of `name`s."""
    entries = (body.get("data") or body.get("models")) if isinstance(body, dict) else None
    found = [
        _Served(name, bool(entry.get("remote_host")), _served_window(entry))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(name := entry.get("id") or entry.get("name"), str)
        and "embed" not in name
    ]
    return found[:SERVED_MAX]


def _served_window(entry: Mapping[str, Any]) -> int | None:
    """Return the window that a local server says it has set up for a model.

    vLLM has `max_model_len`, llama.cpp `meta.n_ctx`, others `context_length` or `context_window`.
    What a model was trained for (`n_ctx_train`) is not what the server lets it have.
    """
    meta = entry.get("meta")
    found = [entry.get(name) for name in ("max_model_len", "context_length", "context_window")]
    found.append(meta.get("n_ctx") if isinstance(meta, dict) else None)
    return next((value for value in found if type(value) is int and value > 0), None)


def _window(provider_id: str, name: str) -> int | None:
    from genai_prices import data_snapshot

    try:
        _, model = data_snapshot.get_snapshot().find_provider_model(name, None, provider_id, None)
    except LookupError:
        return None
    window: int | None = model.context_window
    return window


def _price_data() -> Sequence[Any]:
    """Return the price data's providers; the first call takes a while and imports them."""
    from genai_prices import data_snapshot

    return data_snapshot.get_snapshot().providers


def _listed(models: Iterable[Any], provider: Provider) -> Iterator[Any]:
    """Yield the models worth listing, the default first."""
    pattern = re.compile(provider.listed)
    kept = [
        model
        for model in models
        if not model.deprecated and pattern.match(model.id) and not UNLISTED.search(model.id)
    ]
    yield from sorted(kept, key=lambda model: model.id != provider.default)


def _info(provider: Provider, source: Any, model: Any, *, has_credentials: bool) -> ModelInfo:
    """Return an entry of the list; of a price with tiers, the first one is shown."""
    from genai_prices import Usage as Priced

    prices = model.calc_price(Priced(), source).model_price
    return ModelInfo(
        id=f"{provider.id}:{model.id}",
        name=model.name or model.id,
        provider=provider.id,
        has_credentials=has_credentials,
        default=model.id == provider.default,
        context_window=model.context_window,
        input_cost_per_m_tok=_base(prices.input_mtok),
        output_cost_per_m_tok=_base(prices.output_mtok),
    )


def _base(price: Any) -> float | None:
    return None if price is None else float(getattr(price, "base", price))


def _price_usd(provider_id: str, name: str, usage: Usage) -> float | None:
    from genai_prices import Usage as Priced, calc_price

    try:
        priced = Priced(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_creation_tokens,
        )
        return float(calc_price(priced, name, provider_id=provider_id).total_price)
    except (LookupError, ValueError):
        # The model is not in the data, or the provider's figures contradict each other.
        return None


def _speaks(dialect: Dialect) -> "type[OpenAI] | type[Responses] | type[Anthropic]":
    """Return the adapter for a dialect, imported at its first use."""
    match dialect:
        case "chat":
            from ownware_gateway.models.openai import OpenAI

            return OpenAI
        case "responses":
            from ownware_gateway.models.responses import Responses

            return Responses
        case "anthropic":
            from ownware_gateway.models.anthropic import Anthropic

            return Anthropic


def _demo() -> Model:
    from ownware_gateway.models.demo import Demo

    return Demo()
