"""What comes in for a response: its fields, and its items as the messages of a conversation."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field

from ownware_gateway.doors.openai.bodies import (
    EFFORTS,
    MESSAGES_MAX,
    NEUTRAL,
    TEXT_CHARS_MAX,
    Body,
    Conversation,
    Fetch,
    RunBody,
    conversation,
    parse,
    response_format_of,
    verbosity_of,
    without_neutral,
)
from ownware_gateway.doors.openai.errors import refuse
from ownware_gateway.doors.openai.items import SERVER
from ownware_gateway.doors.openai.tools import nested
from ownware_gateway.errors import GatewayError
from ownware_gateway.models import Options, UserTurn, Verbosity

NAME_CHARS_MAX: Final = 255

#: Responses that one request may name items of; each is read again.
REFERRED_MAX: Final = 256

#: Items that are only named, as JSON: as much as a body that has them all may be.
REFERRED_CHARS_MAX: Final = 32 * 1_048_576

#: Input items that one page of `input_items` may have.
PAGE_MAX: Final = 100

#: As for completions; of the fields that only responses have, what changes nothing here.
_NEUTRAL: Final[Mapping[str, Sequence[Any]]] = {
    **{
        name: NEUTRAL[name]
        for name in (
            *("service_tier", "top_logprobs", "prompt_cache_key", "prompt_cache_retention"),
        )
    },
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("auto", "disabled"),
}

#: What may be asked for besides: what is there anyway, and what only items have that are never
#: made here. Reasoning is not handed out sealed: it is kept with the run, and the model has it back
#: with the results of its calls.
Included = Literal[
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]

#: Said to be what it is by those who bring a conversation along, and of no use here.
_LEFT_OUT: Final = frozenset(
    {"reasoning", "mcp_approval_request", "mcp_approval_response", "mcp_list_tools"}
)

#: How a client says that it knows of the gateway's own tools, which are there anyway.
_OWN: Final = {"type": "mcp", "server_label": SERVER}

#: What only a model, or the gateway for it, has said: a person's answer before it is history.
_MADE_HERE: Final = frozenset({"reasoning", "mcp_call", "function_call"})

_PLACE: Final = re.compile(r"messages\.(\d+)")


class Reasoning(Body):
    """How a model is to reason; all that it tells of its thoughts is told, so no less is asked."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "detailed"] | None = None


class Text(Body):
    """How the answer's text is to be."""

    format: dict[str, Any] | None = None
    verbosity: Verbosity | None = None


class Named(Body):
    """A conversation as an object."""

    id: str = Field(min_length=1, max_length=NAME_CHARS_MAX)


class ResponseBody(RunBody):
    """`POST /v1/responses`, without what is neutral."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MESSAGES_MAX)]
    instructions: str | None = Field(default=None, max_length=TEXT_CHARS_MAX)
    previous_response_id: str | None = Field(default=None, min_length=1, max_length=256)
    conversation: str | Named | None = None
    store: bool = True
    background: bool = False
    include: list[Included] = Field(default_factory=list)
    max_output_tokens: int | None = Field(default=None, gt=0, le=2**31)
    reasoning: Reasoning | None = None
    text: Text | None = None

    @property
    def name(self) -> str | None:
        """What the client calls its conversation, if it has one."""
        return self.conversation.id if isinstance(self.conversation, Named) else self.conversation

    def options(self) -> Options:
        """Return what is asked of the run; raises GatewayError where a part of it is none."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        with _named_flat():
            tools = [nested(item) for item in self.tools if item != _OWN]
            asked = self.asked(tools, nested(self.tool_choice))
        return asked._replace(
            max_tokens=self.max_output_tokens,
            response_format=_format(self.text),
            thinking=EFFORTS[effort] if effort is not None else None,
            verbosity=verbosity_of(self.text.verbosity if self.text is not None else None),
        )

    def echo(self, raw: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        """Return what a response repeats of its request, without what nobody has asked for."""
        effort = self.reasoning.effort if self.reasoning is not None else None
        told = {
            "background": self.background or None,
            "conversation": {"id": name} if name is not None else None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": effort, "summary": None} if effort is not None else None,
            "safety_identifier": self.safety_identifier,
            "store": None if self.store else False,
            "temperature": self.temperature,
            "text": _told_text(self.text),
            "tools": [_told_tool(item) for item in self.tools if item != _OWN] or None,
            "top_p": self.top_p,
            "user": self.user,
        }
        hints = ("parallel_tool_calls", "prompt_cache_key", "tool_choice", "truncation")
        told |= {name: raw.get(name) for name in hints}
        return {name: value for name, value in told.items() if value is not None}


class Approval(NamedTuple):
    """A person's answer to an `mcp_approval_request`."""

    request_id: str
    approve: bool
    reason: str


def parse_response(raw: Mapping[str, Any]) -> ResponseBody:
    """Return a request for a response; raises GatewayError for what cannot be honoured."""
    body = parse(without_neutral(raw, _NEUTRAL), ResponseBody)
    if body.name is not None and not (
        1 <= len(body.name) <= NAME_CHARS_MAX and body.name.isprintable()
    ):
        raise refuse(
            "conversation",
            f"The field 'conversation' must be 1 to {NAME_CHARS_MAX} printable characters.",
        )
    if body.previous_response_id is not None and body.conversation is not None:
        raise refuse(
            "conversation",
            "A response goes on with 'previous_response_id' or with 'conversation', not with both.",
        )
    if body.store:
        return body
    for name in ("background", "previous_response_id", "conversation"):
        if getattr(body, name):
            raise refuse(
                "store",
                f"The field 'store' cannot be false with {name!r}, which needs what is stored.",
            )
    return body


def _format(text: Text | None) -> dict[str, Any] | None:
    """Return the format as completions have it; raises GatewayError."""
    given = text.format if text is not None else None
    if given is not None and given.get("type") == "json_schema":
        schema = {name: value for name, value in given.items() if name != "type"}
        # Clients that know no description say so with a null.
        schema = {name: value for name, value in schema.items() if value is not None}
        given = {"type": "json_schema", "json_schema": schema}
    try:
        return response_format_of(given)
    except GatewayError:
        raise refuse(
            "text",
            "The field 'text.format' must be of the type text, json_object, or json_schema with "
            "'name', 'schema' and perhaps 'strict' and 'description'.",
        ) from None


def _told_text(text: Text | None) -> dict[str, Any] | None:
    if text is None or (text.format is None and text.verbosity is None):
        return None
    form = text.format or {"type": "text"}
    if form.get("type") == "json_schema":
        form = {"strict": False, "description": None, **form}
    verbosity = {} if text.verbosity is None else {"verbosity": text.verbosity}
    return {"format": form, **verbosity}


def _told_tool(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": False, **item}


@contextlib.contextmanager
def _named_flat() -> Iterator[None]:
    """Have what is wrong with a tool named as a response has it."""
    try:
        yield
    except GatewayError as error:
        error.message = error.message.replace(".function", "")
        raise


def referred(item: Mapping[str, Any]) -> str | None:
    """Return the id of the item that one only names; None for one that is what it says."""
    kind, said = item.get("type"), {name for name in item if item[name] is not None}
    if kind != "item_reference" and said != {"id"}:
        return None
    return str(item.get("id"))


def bare_results(body: ResponseBody) -> list[str]:
    """Return the calls of which the input has the result and not the call."""
    items = [] if isinstance(body.input, str) else body.input
    called = [item.get("call_id") for item in items if item.get("type") == "function_call"]
    results = [item for item in items if item.get("type") == "function_call_output"]
    names = [item.get("call_id") for item in results]
    return [name for name in names if isinstance(name, str) and name not in called]


async def read_input(
    body: ResponseBody, fetch: Fetch, called: Sequence[Mapping[str, Any]] = ()
) -> Conversation | Approval:
    """Return what was said, files fetched, or the answer to a question. Raises GatewayError.

    `called` are items that come before the input: calls that it has only the results of.
    """
    given = body.input
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if (approval := _approval(items)) is not None:
        return approval
    messages: list[dict[str, Any]] = []
    places: list[int] = []
    for index, item in enumerate([*called, *items], -len(called)):
        made = _messages(item, f"input.{index}")
        if item.get("type") == "function_call" and _is_answer(messages):
            # What a model said and the calls that it wanted then are one answer.
            messages[-1].setdefault("tool_calls", []).extend(made[0]["tool_calls"])
            continue
        if _is_said_with_calls(made, messages):
            messages[-1]["content"] = made[0]["content"]  # Some clients put it behind the calls.
            continue
        messages += made
        places += [index] * len(made)
    if not messages:
        raise refuse("input", "The last item of 'input' must be the user's, and say something.")
    try:
        said = await conversation(messages, fetch)
    except GatewayError as error:
        if error.details.get("param") != "messages":
            raise
        raise refuse("input", _of_input(error.message, places)) from None
    given_first = [body.instructions] if body.instructions else []
    instructions = "\n\n".join([*given_first, *([said.instructions] if said.instructions else [])])
    return said._replace(instructions=instructions)


def _is_answer(messages: Sequence[Mapping[str, Any]]) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _is_said_with_calls(
    made: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether an item is what a model said with the calls before it, which have no result yet."""
    if not made or not _is_answer(made) or not _is_answer(before):
        return False
    return bool(before[-1].get("tool_calls")) and before[-1]["content"] is None


def _of_input(message: str, places: Sequence[int]) -> str:
    """Return a sentence about messages as one about the items that they were."""
    message = _PLACE.sub(lambda found: f"input.{places[int(found[1])]}", message)
    for theirs, ours in (
        (".image_url.url", ".image_url"),
        (".image_url.detail", ".detail"),
        (".file.file_data", ".file_data"),
        (".tool_call_id", ".call_id"),
        ("The last message", "The last item of 'input'"),
        ("The messages", "The items of 'input'"),
        ("of type text, image_url, input_audio or file", "of type input_text, input_image, …"),
    ):
        message = message.replace(theirs, ours)
    return message


def _approval(items: Sequence[Mapping[str, Any]]) -> Approval | None:
    """Return the answer that the items are, if one of them is. Raises GatewayError.

    What the model has said something after was answered before.
    """
    made = [at for at, item in enumerate(items, 1) if _is_made_here(item)]
    since = items[max(made, default=0) :]
    answers = [item for item in since if item.get("type") == "mcp_approval_response"]
    if not answers:
        return None
    item = answers[0]
    request_id, approve = item.get("approval_request_id"), item.get("approve")
    reason = item.get("reason") or ""
    if not isinstance(request_id, str) or not isinstance(approve, bool) or type(reason) is not str:
        raise refuse(
            "input",
            "An mcp_approval_response has the text 'approval_request_id' and 'approve', which is "
            "true or false.",
        )
    if len(answers) > 1 or items[-1] is not item:
        raise refuse(
            "input",
            "An mcp_approval_response must come last, and be the only one: one question is open "
            "at a time, and what else there is to say comes with the next response.",
        )
    return Approval(request_id, approve, reason[:1000])


def _is_made_here(item: Mapping[str, Any]) -> bool:
    return str(item.get("type")) in _MADE_HERE or item.get("role") == "assistant"


def _messages(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return an item as messages of a completion. Raises GatewayError."""
    kind = str(item.get("type", "message"))
    if kind == "message":
        return _message(item, where)
    if kind in _LEFT_OUT:
        return []
    if kind in ("function_call", "mcp_call"):
        call_id = item.get("call_id" if kind == "function_call" else "id")
        function = {name: item.get(name) for name in ("name", "arguments")}
        call = {"id": call_id, "type": "function", "function": function}
        asked = {"role": "assistant", "content": None, "tool_calls": [call]}
        if kind == "function_call":
            return [asked]
        result = item.get("output") or _failure(item)
        return [asked, {"role": "tool", "tool_call_id": call_id, "content": result}]
    if kind == "function_call_output":
        output = _parts(item.get("output"), f"{where}.output")
        for index, part in enumerate(output if isinstance(output, list) else ()):
            if part["type"] != "text":
                raise refuse(
                    "input",
                    f"The field '{where}.output.{index}' must be of type input_text: what a tool "
                    "of the client returns is told to the model as text.",
                )
        return [{"role": "tool", "tool_call_id": item.get("call_id"), "content": output}]
    raise refuse(
        "input",
        f"The field '{where}.type' is nothing that this gateway makes or takes: {kind[:100]!r}.",
    )


def _failure(item: Mapping[str, Any]) -> str:
    error = item.get("error")
    content = error.get("content") if isinstance(error, dict) else None
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _message(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    content = _parts(item.get("content"), f"{where}.content")
    if item.get("role") == "assistant" and not content:
        return []  # It was cut off and asked for again.
    return [{"role": item.get("role"), "content": content}]


def _parts(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part, f"{where}.{index}") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    """Return a part of an item as one of a message; raises GatewayError."""
    if not isinstance(part, dict):
        raise refuse("input", f"The field '{where}' must be an object.")
    for name in ("file_id", "file_url"):
        if part.get(name) is not None:
            raise refuse("input", f"The field '{where}.{name}' names a file that is not here.")
    match str(part.get("type")):
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.get("text")}
        case "refusal":
            return {"type": "refusal", "refusal": part.get("refusal")}
        case "input_image":
            image = {"url": part.get("image_url"), "detail": part.get("detail")}
            return {"type": "image_url", "image_url": image}
        case "input_file":
            file = {name: part.get(name) for name in ("filename", "file_data")}
            return {"type": "file", "file": file}
        case "input_audio":
            return {"type": "input_audio", "input_audio": part.get("input_audio")}
        case _:
            raise refuse(
                "input",
                f"The field '{where}.type' must be input_text, input_image, input_file, "
                "input_audio, output_text or refusal.",
            )


def only_new(said: Conversation) -> Conversation:
    """Return what is said in a conversation that the gateway has; raises GatewayError.

    Results of the last calls may come before it.
    """
    if said.history and [*said.history] != [said.last_calls, *said.results]:
        raise refuse(
            "input",
            "Where a response goes on with a conversation, 'input' is what the user says now; the "
            "gateway has the rest.",
        )
    prompt: UserTurn = said.prompt
    return said._replace(tail=[prompt])
