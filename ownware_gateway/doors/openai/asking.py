"""A request, understood: who asks whom for what, and what of it is kept to find it again."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from aiohttp import web

from ownware_gateway.auth import CALLER
from ownware_gateway.doors.openai.agents import Agent
from ownware_gateway.doors.openai.bodies import Conversation
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.prompts import is_helper
from ownware_gateway.doors.openai.tools import digest
from ownware_gateway.log import IdempotencyKey
from ownware_gateway.models import AssistantTurn, Options
from ownware_gateway.profile import Profile

#: Where a client says which conversation a request belongs to.
OPEN_WEBUI_HEADER: Final = "X-OpenWebUI-Chat-Id"
CONVERSATION_HEADERS: Final = ("X-Conversation-Id", OPEN_WEBUI_HEADER)
#: How Open WebUI names chats that are not to be kept: all those of a browser tab alike.
TEMPORARY: Final = ("temporary:", "local:")
NAME_CHARS_MAX: Final = 255

#: Names of tokens that are one person's: the operator's, whether the token is asked for or not.
_OPERATORS: Final = frozenset({"local", "token"})


class Ask(NamedTuple):
    """A request for a completion, understood.

    `caller` is whose it is, `name` what the client calls its conversation, `thread_id` the thread
    where that is. `again`: it may have come before, and is then not to be done twice.
    """

    agent: Agent
    said: Conversation
    options: Options
    fingerprint: str
    caller: str
    name: str | None = None
    thread_id: str | None = None
    key: IdempotencyKey | None = None
    again: bool = False
    route: str = "POST /v1/chat/completions"


def with_door(ask: Ask, *, helper: bool = False, **more: Any) -> Ask:
    """Return the request with what is to be found again when its answer is told once more."""
    door = {
        **more,
        "model": ask.agent.shown,
        "json": ask.options.response_format is not None,
        "has_tools": (bool(ask.options.client_tools) or _has_tools(ask.agent.profile))
        and not helper,
        "fingerprint": ask.fingerprint,
        "caller": ask.caller,
        "brought": sum(isinstance(turn, AssistantTurn) for turn in ask.said.answered),
    }
    if ask.options.client_tools and ask.name is None and ask.thread_id is None:
        # By which the request with the results is recognised where nothing else names the run.
        door["said"] = [len(ask.said.turns), digest(ask.said.turns)]
    return ask._replace(options=ask.options._replace(door=door))


def asks_for_itself(said: Conversation) -> bool:
    """Whether a chat UI asks this, a title say, and no person."""
    return not said.answered and is_helper(said.prompt.text)


def owner_of(request: web.Request) -> str:
    """Return whose a request is; the names of the operator's token are one."""
    caller: str = request[CALLER]
    return "operator" if caller in _OPERATORS else caller


def conversation_name(request: web.Request) -> str | None:
    """Return the name of the conversation that a request belongs to; raises GatewayError."""
    for header in CONVERSATION_HEADERS:
        if name := request.headers.get(header):
            if header == OPEN_WEBUI_HEADER and name.startswith(TEMPORARY):
                return None
            if len(name) > NAME_CHARS_MAX or not name.isprintable():
                raise refuse(
                    header, f"{header} must be 1 to {NAME_CHARS_MAX} printable characters."
                )
            return name
    return None


def fingerprint_of(request: web.Request, raw: Mapping[str, Any], name: str | None) -> str:
    """Return what is the same for a request and its retry, and for no other."""
    key = request.headers.get("Idempotency-Key")
    said = json.dumps([request[CALLER], request.path, name, key, raw], sort_keys=True)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def wanted_options(ask: Ask) -> Options:
    """Return what is asked of the run, with what the model is told beforehand."""
    return ask.options._replace(instructions=ask.said.instructions)


def _has_tools(profile: Profile) -> bool:
    """Whether an agent has any."""
    tools = profile.tools
    own = (tools.allow, tools.mcp, tools.services, profile.functions, profile.brings)
    return tools.preset != "none" or any(map(bool, own))
