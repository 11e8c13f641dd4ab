"""How each dialect says which tool must be called, and that only one may be at a time."""

from typing import Any, Final

import pytest

from ownware_gateway.models import ANY_TOOL, Model, Options, Request, ToolSpec, UserTurn
from ownware_gateway.models.anthropic import Anthropic, _body as anthropic_body
from ownware_gateway.models.demo import Demo
from ownware_gateway.models.http import Pool
from ownware_gateway.models.openai import OpenAI
from ownware_gateway.models.responses import Responses, _body as responses_body

TOOL: Final = ToolSpec("map", "Shows it.", {"type": "object", "properties": {}}, strict=True)
PARALLEL: Final = {"parallel_tool_calls": True}
ASKED: Final[dict[str, Any]] = {"key": "", "base_url": "x", "key_variable": "", "silence_s": 1.0}


def chat(provider: str = "openrouter") -> OpenAI:
    return OpenAI(Pool(), provider=provider, **ASKED)


def asked(*tools: ToolSpec, **options: Any) -> Request:
    return Options(**options).apply(Request("m", [UserTurn("hi")], tools=tools))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("options", "in_chat", "in_responses", "in_messages"),
    [
        ({}, {}, {}, {}),
        (
            {"tool_choice": ANY_TOOL},
            {"tool_choice": "required"},
            {"tool_choice": "required"},
            {"tool_choice": {"type": "any"}},
        ),
        (
            {"tool_choice": "map", "parallel_tool_calls": False},
            {"tool_choice": named("map"), "parallel_tool_calls": False},
            {"tool_choice": {"type": "function", "name": "map"}, "parallel_tool_calls": False},
            {"tool_choice": {"type": "tool", "name": "map", "disable_parallel_tool_use": True}},
        ),
        (
            {"parallel_tool_calls": False},
            {"parallel_tool_calls": False},
            {"parallel_tool_calls": False},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ),
        (PARALLEL, PARALLEL, PARALLEL, {}),
    ],
)  # fmt: skip
def test_every_dialect_says_it_in_its_own_words(
    options: dict[str, Any],
    in_chat: dict[str, Any],
    in_responses: dict[str, Any],
    in_messages: dict[str, Any],
) -> None:
    request = asked(TOOL, **options)
    bodies = (
        chat()._body(request),
        responses_body(request, summary=False),
        anthropic_body(request),
    )
    fields = ("tool_choice", "parallel_tool_calls")
    said = [{name: body[name] for name in fields if name in body} for body in bodies]
    assert said == [in_chat, in_responses, in_messages]
    strict = [body["tools"][0].get("function", body["tools"][0])["strict"] for body in bodies]
    assert strict == [True] * 3


def test_without_tools_there_is_nothing_to_choose() -> None:
    request = asked(tool_choice=ANY_TOOL, parallel_tool_calls=False)
    for body in (
        chat()._body(request),
        responses_body(request, summary=False),
        anthropic_body(request),
    ):
        assert not {"tool_choice", "parallel_tool_calls", "tools"} & {*body}


@pytest.mark.parametrize(
    ("model", "thinking", "unable"),
    [
        (chat(), None, []),
        (chat("ollama"), None, ["tool_choice", "parallel_tool_calls"]),
        (Responses(Pool(), provider="openai", **ASKED), None, []),
        (Anthropic(Pool(), provider="anthropic", **ASKED), None, []),
        (Anthropic(Pool(), provider="anthropic", **ASKED), "low", ["tool_choice"]),
        (Demo(), None, ["tool_choice"]),
    ],
)
def test_what_a_dialect_cannot_it_says(model: Model, thinking: Any, unable: list[str]) -> None:
    request = asked(TOOL, tool_choice="map", parallel_tool_calls=False, thinking=thinking)
    assert model.unable(request) == unable
