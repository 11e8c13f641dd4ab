"""Tools that a client brings along and runs itself: what the model is told of them, and no more.

Nothing here judges a call: what the client does with it is the client's. See docs/openai.md.
"""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Final, NoReturn

from ownware_gateway.errors import GatewayError
from ownware_gateway.events import CalledTool, ClientCall
from ownware_gateway.log import Private
from ownware_gateway.models import AssistantTurn, Options
from ownware_gateway.permissions import allowed_tools, operation_hash
from ownware_gateway.profile import SEPARATOR, Profile
from ownware_gateway.tools import Context, Source, Tool
from ownware_gateway.transcript import Call, Turn

#: What goes before the name of a client's tool that would be another's.
PREFIX: Final = f"client{SEPARATOR}"
#: What every provider takes.
NAME_CHARS_MAX: Final = 64

#: What the hash of calls is about, in place of a tool's name.
_IDENTITY: Final = "client"


def tools_of(options: Options) -> dict[str, Tool]:
    """Return a client's tools, by name."""
    return {
        item["name"]: Tool(
            name=item["name"],
            description=item["description"],
            input_schema=dict(item["input_schema"]),
            call=_never,
            by_client=True,
            strict=item["strict"],
        )
        for item in options.client_tools
    }


async def _never(_context: Context, _arguments: dict[str, Any]) -> NoReturn:
    raise AssertionError("a client's tool is run by the client")


def told_apart(
    options: Options, profile: Profile, tools: Mapping[str, Tool], sources: Iterable[Source]
) -> Options:
    """Return the options with another name for each tool that has the name of the profile's.

    A server that has not been started yet has the names that begin with its own. Raises
    GatewayError `invalid_request` where the other name cannot be either.
    """
    offered = dict(tools)
    for source in sources:
        offered |= source.tools(profile)
    own = {*allowed_tools(profile, offered), *profile.functions}
    names: dict[str, str] = {}
    for item in options.client_tools:
        name = item["name"]
        if not _is_taken(name, own, profile) and not name.startswith(PREFIX):
            continue
        names[name] = other = PREFIX + name
        if _is_taken(other, own, profile) or len(other) > NAME_CHARS_MAX:
            raise GatewayError(
                "invalid_request",
                f"The tool {name!r} has the name of a tool of the profile {profile.name!r}, which "
                "the gateway runs; give it another name.",
                param="tools",
            )
    told = [
        {**item, "name": names.get(item["name"], item["name"])} for item in options.client_tools
    ]
    choice = options.tool_choice
    return options._replace(
        client_tools=told, tool_choice=names.get(choice, choice) if choice is not None else None
    )


def _is_taken(name: str, own: Set[str], profile: Profile) -> bool:
    server, separator, _ = name.partition(SEPARATOR)
    return name in own or (bool(separator) and profile.tools.declares(server))


def handed_over(
    secret: bytes, turn: Turn, calls: Sequence[Call], request_id: str, expires_at: int
) -> tuple[ClientCall, Private]:
    """Return the event that calls wait for the client, and their exact arguments beside it."""
    assert turn.answer is not None
    arguments = _arguments(turn.answer.turn, calls)
    event = ClientCall(
        request_id=request_id,
        calls=[CalledTool(tool_call_id=call.id, tool_name=call.name) for call in calls],
        operation_hash=operation_hash(secret, _IDENTITY, {"calls": arguments}),
        expires_at=expires_at,
        usage=turn.answer.usage,
        turn_index=turn.index,
    )
    return event, Private("calls", json.dumps(arguments).encode())


def _arguments(answer: AssistantTurn, calls: Sequence[Call]) -> list[str]:
    """Return what the model wrote for each call, to the letter."""
    wrote = {call.id: call.arguments for call in answer.tool_calls}
    return [wrote[call.id] for call in calls]
