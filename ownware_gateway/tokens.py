"""About how many tokens a prompt has, when no provider has counted them.

Providers count what they were sent, so the last answer's usage is exact, and only what came after
it is estimated. Tokenisers differ; the figures here lean to the high side.
"""

import json
from collections.abc import Sequence
from typing import Final

from ownware_gateway.events import Usage
from ownware_gateway.models import AssistantTurn, File, Message, Request, ToolSpec, ToolTurn

#: Of English prose about four letters are one token, of code and JSON about three.
CHARS_PER_TOKEN: Final = 3.5

#: Of other scripts a letter is two or three bytes of UTF-8, and half a token to a whole one.
BYTES_PER_TOKEN: Final = 3.0

#: What a provider adds around each message.
MESSAGE_TOKENS: Final = 6

#: The most that an image of usual size counts (https://docs.anthropic.com/en/docs/build-with-claude/vision).
IMAGE_TOKENS: Final = 1_600

#: A page of PDF is some 50 KB, and counts some 2,000 tokens.
PDF_BYTES_PER_TOKEN: Final = 25

#: A file that only its name is told of.
FILE_TOKENS: Final = 50


def text_tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    if text.isascii():
        return int(len(text) / CHARS_PER_TOKEN)
    return int(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def message_tokens(message: Message) -> int:
    """Return about how many tokens a message has, its files included."""
    tokens = MESSAGE_TOKENS + text_tokens(message.text)
    if isinstance(message, AssistantTurn):
        tokens += text_tokens(message.thinking)
        for call in message.tool_calls:
            tokens += MESSAGE_TOKENS + text_tokens(call.name) + text_tokens(call.arguments)
    else:
        files = message.images if isinstance(message, ToolTurn) else message.files
        tokens += sum(map(_file_tokens, files))
    return tokens


def _file_tokens(file: File) -> int:
    if file.mime_type.startswith("image/"):
        return IMAGE_TOKENS
    if file.mime_type == "application/pdf":
        return max(IMAGE_TOKENS, len(file.data) // PDF_BYTES_PER_TOKEN)
    try:
        return text_tokens(file.data.decode())
    except UnicodeDecodeError:
        return FILE_TOKENS


def tools_tokens(tools: Sequence[ToolSpec]) -> int:
    """Return about how many tokens the tools' descriptions and schemas have."""
    return sum(
        MESSAGE_TOKENS + text_tokens(tool.description) + text_tokens(json.dumps(tool.input_schema))
        for tool in tools
    )


def prompt_tokens(request: Request, last: tuple[AssistantTurn, Usage] | None = None) -> int:
    """Return about how many tokens a request's prompt has.

    `last` is an answer in it, to a prompt with which this one begins, and what the provider counted
    for it: then only what follows that answer is estimated.
    """
    tokens = 0
    for message in reversed(request.messages):
        if last is not None and message is last[0]:
            return last[1].input_tokens + last[1].output_tokens + tokens
        tokens += message_tokens(message)
    return tokens + text_tokens(request.system) + tools_tokens(request.tools)
