"""Tools that a client brings along: what it says of them, and the calls that it answers.

A call has another name here than in the log: one that leads to the run that waits for its result,
so that nothing has to be kept to find it again. The shapes are
https://platform.openai.com/docs/guides/function-calling.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ownware_gateway.client_tools import PREFIX
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.prompts import words_of
from ownware_gateway.events import CalledTool, ToolResult
from ownware_gateway.models import ANY_TOOL, AssistantTurn, Message, ToolTurn, UserTurn

#: OpenAI's own limits.
TOOLS_MAX: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

#: Names, descriptions and schemas together: they are in every prompt.
TOOLS_CHARS_MAX: Final = 262_144

_FUNCTION: Final = frozenset({"name", "description", "parameters", "strict"})
_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}

_CALL_ID: Final = re.compile(r"call_([0-9a-z]+)_([0-9]{1,9})_([0-9]{1,9})", re.ASCII)
_RUN_ID_PREFIX: Final = "run_"


class Place(NamedTuple):
    """Where a call was made: in which turn of which run, and which of those that went out."""

    run_id: str
    turn_index: int
    number: int


def call_id(place: Place) -> str:
    """Return what a client knows a call by."""
    return f"call_{place.run_id.removeprefix(_RUN_ID_PREFIX)}_{place.turn_index}_{place.number}"


def place_of(name: str) -> Place | None:
    """Return the place of a call; None for one that was not made here."""
    found = _CALL_ID.fullmatch(name)
    if found is None:
        return None
    return Place(f"{_RUN_ID_PREFIX}{found[1]}", int(found[2]), int(found[3]))


def calls_of(
    asked: Mapping[str, Any], arguments: Sequence[str], run_id: str
) -> list[dict[str, Any]]:
    """Return the calls of a `client.call` event as a message has them."""
    return [
        {
            "id": call_id(Place(run_id, asked["turnIndex"], number)),
            "type": "function",
            "function": {
                "name": called["toolName"].removeprefix(PREFIX),
                # A model that wants to say nothing may write nothing; that is no JSON.
                "arguments": wrote or "{}",
            },
        }
        for number, (called, wrote) in enumerate(zip(asked["calls"], arguments, strict=True))
    ]


# -- what a client says of its tools


def read_tools(given: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return tools as `Options.client_tools` has them; raises GatewayError."""
    if len(given) > TOOLS_MAX:
        raise refuse("tools", f"The field 'tools' has {len(given)} tools; {TOOLS_MAX} are allowed.")
    tools = tuple(_tool(item, f"tools.{index}") for index, item in enumerate(given))
    names = [tool["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise refuse("tools", f"The field 'tools' has more than one tool named {name!r}.")
    if len(json.dumps(tools, ensure_ascii=False)) > TOOLS_CHARS_MAX:
        raise refuse(
            "tools", f"The field 'tools' may have at most {TOOLS_CHARS_MAX} characters of JSON."
        )
    return tools


def nested(item: Any) -> Any:
    """Return a tool, or a choice of one, of a response as completions have it."""
    if not isinstance(item, dict) or item.get("type") != "function":
        return item
    return {"type": "function", "function": {k: v for k, v in item.items() if k != "type"}}


def _tool(item: Mapping[str, Any], path: str) -> dict[str, Any]:
    function = item.get("function")
    if item.get("type") != "function" or not isinstance(function, dict):
        raise refuse("tools", f"The field '{path}' must be of type function; no other is known.")
    said = {name: value for name, value in function.items() if value is not None}
    if unknown := sorted({*said} - _FUNCTION):
        raise refuse("tools", f"The field '{path}.function.{unknown[0]}' is not known.")
    name, schema = said.get("name"), said.get("parameters", _NO_PARAMETERS)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise refuse(
            "tools", f"The field '{path}.function.name' must be 1 to 64 letters, digits, _ and -."
        )
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise refuse(
            "tools", f"The field '{path}.function.parameters' must be JSON Schema of an object."
        )
    description, strict = said.get("description", ""), said.get("strict", False)
    if not isinstance(description, str) or not isinstance(strict, bool):
        raise refuse(
            "tools",
            f"The field '{path}.function' wants a text as its description, and strict to be true "
            "or false.",
        )
    return {
        "name": name,
        "description": description,
        "input_schema": {"type": "object", "properties": {}, **schema},
        "strict": strict,
    }


def read_choice(given: Any, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the tool that a model must call, as a `Request` has it; raises GatewayError.

    `none` is not read here: then the model is not told of the tools.
    """
    if given in ("auto", "none", None):
        return None
    if given == "required" and tools:
        return ANY_TOOL
    if given == "required":
        raise refuse("tool_choice", "The field 'tool_choice' wants a call, and there are no tools.")
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if given != {"type": "function", "function": {"name": name}}:
        raise refuse(
            "tool_choice",
            "The field 'tool_choice' must be auto, none, required, or a function with its name.",
        )
    if name not in [tool["name"] for tool in tools]:
        raise refuse("tool_choice", f"The field 'tool_choice' names no tool of 'tools': {name!r}.")
    return str(name)


# -- what a client answers


def check_results(asked: AssistantTurn, results: Sequence[ToolTurn]) -> None:
    """Raise GatewayError unless every call of a message has one result."""
    given: set[str] = set()
    for result in results:
        if result.tool_call_id in given:
            raise refuse(
                "messages", f"There is more than one result for the call {result.tool_call_id!r}."
            )
        given.add(result.tool_call_id)
    if missing := [call.id for call in asked.tool_calls if call.id not in given]:
        names = ", ".join(map(repr, missing))
        raise refuse("messages", f"There are no results for these tool calls: {names}.")


def results_for(
    calls: Sequence[CalledTool], results: Sequence[ToolTurn]
) -> Sequence[ToolResult] | None:
    """Return the results of the calls that wait, by the log's names; None if others are meant."""
    numbers = {place.number: turn for turn in results if (place := place_of(turn.tool_call_id))}
    if sorted(numbers) != list(range(len(calls))) or len(numbers) != len(results):
        return None
    return [
        ToolResult(tool_call_id=called.tool_call_id, result=numbers[number].text)
        for number, called in enumerate(calls)
    ]


def digest(messages: Sequence[Message]) -> str:
    """Return what tells what was said from anything else, files included."""
    hashed = hashlib.sha256()
    for turn in messages:
        said: list[Any] = [type(turn).__name__, turn.text]
        match turn:
            case UserTurn():
                # What was found for a message stands before the last one alone, and comes anew.
                said[1] = words_of(turn.text)
                said += [
                    [file.filename, file.mime_type, hashlib.sha256(file.data).hexdigest()]
                    for file in turn.files
                ]
                said += [file.detail for file in turn.files if file.detail is not None]
            case AssistantTurn():
                said += [list(_said(turn))]
            case ToolTurn():
                said += [turn.tool_call_id]
        hashed.update(json.dumps(said).encode())
    return hashed.hexdigest()


def _said(turn: AssistantTurn) -> list[list[str]]:
    return [[call.id, call.name, call.arguments] for call in turn.tool_calls]
