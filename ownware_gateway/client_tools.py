"""Tools that a client brings along and runs itself: what the model is told of them, and no more.

Nothing here judges a call: what the client does with it is the client's. See docs/openai.md.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from ownware_gateway.errors import GatewayError
from ownware_gateway.events import CalledTool, ClientCall
from ownware_gateway.log import Private
from ownware_gateway.models import AssistantTurn, Options
from ownware_gateway.permissions import allowed_tools, operation_hash
from ownware_gateway.profile import SEPARATOR, Profile
from ownware_gateway.tools import Context, Source, Tool
from ownware_gateway.transcript import Call, Turn

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


def check_names(
    options: Options, profile: Profile, tools: Mapping[str, Tool], sources: Iterable[Source]
) -> None:
    """Raise GatewayError for a client's tool that has the name of one of the profile's.

    A server that has not been started yet has the names that begin with its own.
    """
    offered = dict(tools)
    for source in sources:
        offered |= source.tools(profile)
    own = {*allowed_tools(profile, offered), *profile.functions}
    for item in options.client_tools:
        name = item["name"]
        server, separator, _ = name.partition(SEPARATOR)
        if name in own or (separator and profile.tools.declares(server)):
            raise GatewayError(
                "invalid_request",
                f"The tool {name!r} has the name of a tool of the profile {profile.name!r}, which "
                "the gateway runs; give it another name.",
                param="tools",
            )


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
