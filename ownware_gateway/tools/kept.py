"""Reading on in an output of which the model was told a part."""

from collections.abc import Iterator
from typing import Any, Final

from ownware_gateway.tools import Context, Output, Tool, ToolFailed, clip
from ownware_gateway.tools.workspace import TEXT_BYTES_MAX, schema

#: Characters that a page has unless it is asked for another number, and the most.
PAGE_CHARS: Final = 20_000
PAGE_CHARS_MAX: Final = 60_000

#: Most lines that a search shows, and most characters of one.
FOUND_MAX: Final = 200
LINE_CHARS_MAX: Final = 240

WORDS_CHARS_MAX: Final = 1_000
ID_CHARS_MAX: Final = 256


async def read_output(context: Context, arguments: dict[str, Any]) -> Output:
    """Return a page of the whole output of an earlier call, or its lines that hold some words."""
    call_id = arguments["tool_call_id"]
    text = await context.kept(call_id)
    if text is None:
        raise ToolFailed(
            f"Nothing is kept of a call {call_id!r}: the note under an output that was cut names "
            "the tool_call_id to read on with; any other is whole as it stands."
        )
    if (words := arguments.get("contains")) is not None:
        return _search(text, words, arguments.get("offset", 0))
    return _page(text, arguments.get("offset", 0), arguments.get("limit", PAGE_CHARS))


def _page(text: str, first: int, chars: int) -> Output:
    if first and first >= len(text):
        raise ToolFailed(f"The output has {len(text)} characters; offset {first} is past its end.")
    raw = text[first : first + chars].encode("utf-8", "replace")
    part = raw[:TEXT_BYTES_MAX].decode("utf-8", "ignore")
    last = first + len(part)
    if last == len(text):
        return clip(part)
    between = "" if part.endswith("\n") else "\n"
    note = f"[{first} to {last} of {len(text)} characters are shown; go on with offset {last}]"
    return Output(part + between + note, bytes_raw=len(raw))


def _search(text: str, words: str, first: int) -> Output:
    lines: list[str] = []
    for begin, line in _matching(text, words, first):
        if len(lines) == FOUND_MAX:
            lines.append(f"[the first {FOUND_MAX} lines are shown; go on with offset {begin}]")
            break
        lines.append(f"{begin}: {line}")
    return clip("\n".join(lines) or "No line holds that.")


def _matching(text: str, words: str, first: int) -> Iterator[tuple[int, str]]:
    """Yield what holds the words, in whatever case: where it is, and the line or a part of it."""
    lower, wanted = text.lower(), words.lower()
    if len(lower) != len(text):
        # Some letters are two in lower case, which would move every offset behind them.
        lower, wanted = text, words
    at = lower.find(wanted, first)
    while at >= 0:
        begin = max(text.rfind("\n", 0, at) + 1, at - LINE_CHARS_MAX // 2, first)
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        shown = text[begin : min(end, begin + LINE_CHARS_MAX)]
        yield begin, shown if begin + LINE_CHARS_MAX >= end else shown + "…"
        # On a line without an end the next place is as far as what was shown.
        at = lower.find(wanted, max(at + len(wanted), min(end, begin + LINE_CHARS_MAX)))


TOOLS: Final[tuple[Tool, ...]] = (
    Tool(
        name="read_output",
        description=(
            "Read on in the output of an earlier call of this conversation that was cut: the note"
            " under it names the tool_call_id. With contains, only the lines that hold a text are"
            " shown, each with the offset to read around it."
        ),
        input_schema=schema(
            ["tool_call_id"],
            tool_call_id={
                "type": "string",
                "minLength": 1,
                "maxLength": ID_CHARS_MAX,
                "description": "The call, as the note names it.",
            },
            offset={
                "type": "integer",
                "minimum": 0,
                "default": 0,
                "description": "How many characters to leave out.",
            },
            limit={
                "type": "integer",
                "minimum": 1,
                "maximum": PAGE_CHARS_MAX,
                "default": PAGE_CHARS,
                "description": "Most characters to read.",
            },
            contains={
                "type": "string",
                "minLength": 1,
                "maxLength": WORDS_CHARS_MAX,
                "description": "A text to look for, as it stands, in whatever case.",
            },
        ),
        call=read_output,
        reads_only=True,
        safe_to_repeat=True,
        reads="nothing",
    ),
)
