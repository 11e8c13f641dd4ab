"""Who can answer through the OpenAI door: profiles, models by themselves, and what embeds texts."""

import base64
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from aiohttp import web

from ownware_gateway.doors.openai import OpenAIParts
from ownware_gateway.doors.openai.bodies import EmbedBody, EmbeddingsBody, parse, read_json
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import PLAIN

#: Who answers where a request names nobody, the first that there is.
DEFAULTS: Final = ("default", "assistant")


class Agent(NamedTuple):
    """Who answers: a profile, another model than its own perhaps, and what both are called here."""

    profile: Profile
    model: str | None
    shown: str


class Agents:
    """The handlers that run nothing."""

    def __init__(self, parts: OpenAIParts) -> None:
        self._parts = parts
        self._profiles = parts.profiles

    def _agent(self, profile_id: str | None, model: str) -> Agent:
        """Return who answers to a model's name. Raises GatewayError."""
        by_name = profile_id is None and model and ":" not in model
        if by_name and (found := self._profiles.find(model)) is not None:
            return Agent(found, None, model)
        profiles = self._profiles.all()
        names = [profile.name for profile in profiles]
        if profile_id is not None:
            profile = self._profiles.get(profile_id)
            other = None if model in ("", profile.name) else model
            if other is None or ":" in other:
                return Agent(profile, other, other or profile.name)
        elif not model:
            defaults = [name for name in DEFAULTS if name in names] or names
            if len(names) == 1 or defaults is not names:
                return Agent(profiles[names.index(defaults[0])], None, defaults[0])
        elif ":" in model:
            return Agent(self._profiles.get(PLAIN), model, model)
        elif model == PLAIN:
            return Agent(self._profiles.get(model), None, model)
        known = ", ".join(names) or "none"
        raise refuse(
            "model",
            f"There is no model {model[:100]!r}. There are the profiles {known}, and models as "
            "provider:model; GET /v1/models lists them.",
            "unknown_model",
        )

    # -- models and vectors

    async def models(self, request: web.Request) -> web.Response:
        """List who can answer: the profiles, then the models by themselves."""
        if (profile_id := request.match_info.get("profile_id")) is not None:
            names = [self._profiles.get(profile_id).name]
        else:
            names = [profile.name for profile in self._profiles.all()]
        known = await self._parts.catalogue.list()
        usable = [(model.id, model.provider) for model in known if model.has_credentials]
        answering = [*((name, "ownware") for name in names), *usable]
        models = [self._model_shape(*named) for named in answering]
        return web.json_response({"object": "list", "data": models})

    async def model(self, request: web.Request) -> web.Response:
        """Show one of them."""
        model_id = request.match_info["model_id"]
        agent = self._agent(None, model_id)
        if agent.model is not None:
            self._parts.catalogue.resolve(agent.model)
        owner = agent.model.partition(":")[0] if agent.model else "ownware"
        return web.json_response(self._model_shape(model_id, owner))

    def _model_shape(self, model_id: str, owner: str) -> dict[str, Any]:
        created = self._parts.started_s
        return {"id": model_id, "object": "model", "created": created, "owned_by": owner}

    async def embeddings(self, request: web.Request) -> web.Response:
        """Return texts as vectors."""
        body = parse(await read_json(request), EmbeddingsBody)
        # OpenAI's own names are known without their provider.
        model = body.model if ":" in body.model or not body.model else f"openai:{body.model}"
        made = await self._parts.catalogue.embed(model, body.texts(), body.dimensions)
        pack = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(v) if pack else v}
            for index, v in enumerate(made.vectors)
        ]
        usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
        shown = body.model or made.model
        return web.json_response({"object": "list", "data": data, "model": shown, "usage": usage})

    async def embed(self, request: web.Request) -> web.Response:
        """Return one text as a vector."""
        body = parse(await read_json(request), EmbedBody)
        made = await self._parts.catalogue.embed("", [body.text])
        return web.json_response({"vector": made.vectors[0]})


def _packed(vector: Sequence[float]) -> str:
    """Return a vector in base64, of 32-bit numbers with their lowest byte first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
