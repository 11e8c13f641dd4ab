"""What servers offer, as agents can be given it: names that providers take, bearable sizes.

Pure, and without the SDK: a tool comes in as the JSON of `tools/list`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ownware_gateway.mcp import OfferedTool
from ownware_gateway.tools.names import NAME_CHARS_MAX, tool_name

#: Tools of one server; more are left out, and the status says so.
TOOLS_MAX: Final = 128
SCHEMA_BYTES_MAX: Final = 32_768
DESCRIPTION_CHARS_MAX: Final = 4_096

#: Most sentences about tools that were left out.
LEFT_OUT_MAX: Final = 20


def offers(server: str, listed: Sequence[Mapping[str, Any]]) -> tuple[list[OfferedTool], list[str]]:
    """Return a server's tools as agents can be given them, and what was left out, in sentences."""
    taken: dict[str, OfferedTool] = {}
    left_out: list[str] = []
    for item in listed:
        wire_name = str(item.get("name", ""))
        if (problem := _problem(item, len(taken))) is not None:
            left_out.append(f"The tool {wire_name[:NAME_CHARS_MAX]!r} is left out: {problem}.")
            continue
        tool = _offer(server, item)
        if tool.name in taken:
            # Two names that differ only in what providers don't take.
            tool = tool._replace(name=tool_name(server, wire_name, distinct=True))
        taken.setdefault(tool.name, tool)
    more = len(left_out) - LEFT_OUT_MAX
    if more > 0:
        left_out = [*left_out[:LEFT_OUT_MAX], f"And {more} more."]
    return list(taken.values()), left_out


def _problem(item: Mapping[str, Any], count: int) -> str | None:
    if count >= TOOLS_MAX:
        return f"only the first {TOOLS_MAX} are taken"
    schema = item.get("inputSchema")
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return "its input is no object"
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (ValueError, RecursionError):
        return "its schema is no JSON, or nested too deep"
    if size > SCHEMA_BYTES_MAX:
        return f"its schema has {size} bytes, {SCHEMA_BYTES_MAX} are allowed"
    return None


def _offer(server: str, item: Mapping[str, Any]) -> OfferedTool:
    wire_name = str(item["name"])
    hints = item.get("annotations") or {}
    schema = {key: value for key, value in item["inputSchema"].items() if key != "$schema"}
    description = str(item.get("description") or item.get("title") or wire_name)
    return OfferedTool(
        name=tool_name(server, wire_name),
        wire_name=wire_name,
        description=description[:DESCRIPTION_CHARS_MAX],
        # Providers want both, where MCP leaves it free.
        input_schema={"type": "object", "properties": {}} | schema,
        reads_only=hints.get("readOnlyHint"),
        destructive=hints.get("destructiveHint"),
        idempotent=hints.get("idempotentHint"),
    )
