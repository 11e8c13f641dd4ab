"""The tool that has another profile's agent do a task; it is there where a profile names some."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ownware_gateway.profile import SPAWN, Profile, Subagent
from ownware_gateway.tools import Context, Output, Tool, ToolFailed

#: The longest task; it stands in several events.
TASK_CHARS_MAX: Final = 32_768

_ABOUT: Final = (
    "Have another agent do a task, and get its final answer. It has tools of its own and knows"
    " nothing of this conversation, so the task must say all that it needs. Calls in one turn run"
    " at the same time. The agents:"
)


class Spawning:
    """Where `spawn_agent` comes from; see `ownware_gateway.tools.Source`."""

    async def connect(self, profile: Profile) -> None:
        """Do nothing: an agent needs nothing to be ready."""

    def tools(self, profile: Profile) -> Mapping[str, Tool]:
        """Return the tool, if the profile names agents."""
        return self.known(profile.subagents) if profile.subagents else {}

    def known(self, named: Mapping[str, Subagent] = MappingProxyType({})) -> dict[str, Tool]:
        """Return the tool by its name, as it is where a profile names these agents."""
        return {SPAWN: _tool(named)}

    def missing(self, profile: Profile) -> Mapping[str, str]:
        """Return nothing: it is always there."""
        return {}


def _tool(named: Mapping[str, Subagent]) -> Tool:
    agents = [
        f"- {name}: {' '.join(agent.description.split())}" if agent.description else f"- {name}"
        for name, agent in named.items()
    ]
    return Tool(
        name=SPAWN,
        description="\n".join([_ABOUT, *agents]),
        input_schema={
            "type": "object",
            "properties": {
                "agent": {"enum": list(named), "description": "Which agent."},
                "task": {
                    "type": "string",
                    "pattern": r"\S",
                    "maxLength": TASK_CHARS_MAX,
                    "description": "What to do and what to answer, with all that it must know.",
                },
            },
            "required": ["agent", "task"],
            "additionalProperties": False,
        },
        call=_never,
        # By itself it changes nothing: what the agent does is judged call by call.
        reads_only=True,
        reads="nothing",
    )


async def _never(context: Context, arguments: dict[str, Any]) -> Output:
    raise ToolFailed("An agent is spawned by its run, and by nothing else.")
