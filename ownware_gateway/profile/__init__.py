"""Profiles: who an agent is. A folder holds one per sub-folder: `agent.json` and `SOUL.md`.

Files are read again when they change, without a restart; a run keeps the version it started with.
A file that is wrong is named, with the field and what was expected, and takes no other down.
docs/profiles.md describes every field; a test holds it complete.
"""

import json
from collections.abc import Set
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from ownware_gateway.masking import MASK
from ownware_gateway.profile.fields import MODEL_NAME, PROFILE_NAME, DurationMs, Strict
from ownware_gateway.profile.rules import Policy
from ownware_gateway.profile.servers import VARIABLE, McpServer, ServerName
from ownware_gateway.profile.services import Service

#: Most rules of a profile.
POLICIES_MAX: Final = 200

#: What people and agents note for an agent, beside SOUL.md.
NOTES_FILE: Final = "AGENTS.md"

#: Stands between the name of an MCP server or a service and its tool's: `server__tool`.
SEPARATOR: Final = "__"

#: The tool that spawns an agent's sub-agents; there is one where its profile names some.
SPAWN: Final = "spawn_agent"

#: The tools that a profile brings itself, see `Profile.brings`.
BROUGHT: Final = frozenset({"forget", "load_skill", "remember", SPAWN})

#: Most sub-agents that a profile names.
SUBAGENTS_MAX: Final = 16

Preset = Literal["full", "coding", "readonly", "none"]
PermissionMode = Literal["auto", "ask", "deny", "allowlist"]


class Custom(Strict):
    """How the agent's own tools are run: the functions in `tools/*.py` beside its files.

    `${env:NAME}` in `env` stands for a variable of the gateway's own environment. `timeout` is for
    tools that don't say how long they may take.
    """

    enabled: bool = True
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        default_factory=dict, max_length=64
    )
    memory_mb: int = Field(default=2_048, ge=256, le=1_048_576)
    timeout: DurationMs = 120_000

    def shown(self) -> dict[str, Any]:
        """Return the settings as people may see them, without values that may be secret."""
        shown = {
            name: value if VARIABLE.fullmatch(value) else MASK for name, value in self.env.items()
        }
        return {**self.model_dump(mode="json"), "env": shown}


class Tools(Strict):
    """Which tools the agent has: a preset, and what is added to it or taken away by name.

    `server__*` in `allow` and `deny` stands for all tools of an MCP server, or of a service.
    """

    preset: Preset = "full"
    allow: list[str] = Field(default_factory=list)
    deny: list[str] = Field(default_factory=list)
    mcp: dict[ServerName, McpServer] = Field(default_factory=dict, max_length=64)
    services: dict[ServerName, Service] = Field(default_factory=dict, max_length=64)
    custom: Custom = Field(default_factory=Custom)

    def declares(self, server: str) -> bool:
        """Whether the profile itself has an MCP server or a service of this name."""
        return server in self.mcp or server in self.services

    def allows(self, name: str) -> bool:
        """Whether `allow` names a tool, by itself or with its server."""
        return _listed(name, self.allow)

    def denies(self, name: str) -> bool:
        """Whether `deny` names a tool, by itself or with its server."""
        return _listed(name, self.deny)


def _listed(name: str, names: list[str]) -> bool:
    server, separator, _ = name.partition(SEPARATOR)
    return name in names or (bool(separator) and f"{server}{SEPARATOR}*" in names)


class Security(Strict):
    """When a person is asked, and how long the run waits for an answer."""

    permission_mode: PermissionMode = "ask"
    hitl_timeout_ms: DurationMs = 1_800_000


class PerDay(Strict):
    """What all runs of the profile may take in a day of UTC: money, model calls, active time."""

    max_cost_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_turns: int | None = Field(default=None, gt=0)
    max_time: DurationMs | None = None

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(
            limit is not None for limit in (self.max_cost_usd, self.max_turns, self.max_time)
        )


class Execution(Strict):
    """What a run may take: active time, time by the clock, and money in US dollars."""

    timeout: DurationMs = 1_800_000
    max_wall_time: DurationMs | None = None
    max_cost_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    per_day: PerDay = Field(default_factory=PerDay)


class Compaction(Strict):
    """When a conversation is put into fewer words so that it fits the model's window.

    `threshold` is the share of the window from which on; the latest `keep_turns` stay as they are.
    `context_window` is the window in tokens, where the gateway does not know it.
    """

    enabled: bool = True
    threshold: float = Field(default=0.75, ge=0.2, le=0.95)
    keep_turns: int = Field(default=6, ge=1, le=1_000)
    context_window: int | None = Field(default=None, ge=1_000)


class Subagent(Strict):
    """An agent that another one may spawn: whose profile it is, and when to use it."""

    profile: str = Field(min_length=1, max_length=128, pattern=PROFILE_NAME)
    description: str = Field(default="", max_length=1000)


class Skills(Strict):
    """Whether the agent has the skills that lie in its folder."""

    enabled: bool = True


class Memory(Strict):
    """Whether AGENTS.md is part of the system prompt, and whether the agent may add to it.

    `workspace` takes the one in the workspace too, which anybody may have written.
    """

    enabled: bool = True
    append: bool = False
    workspace: bool = False


class Profile(Strict):
    """An agent as its files describe it."""

    name: str = Field(min_length=1, max_length=128, pattern=PROFILE_NAME)
    description: str = ""
    model: str = Field(default="openai:gpt-5.5", pattern=MODEL_NAME)
    small_fast_model: str | None = Field(default=None, pattern=MODEL_NAME)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, gt=0)
    max_turns: int = Field(default=100, gt=0, le=10_000)
    thinking: Literal["off", "low", "medium", "high"] | None = None
    tools: Tools = Field(default_factory=Tools)
    security: Security = Field(default_factory=Security)
    policies: list[Policy] = Field(default_factory=list, max_length=POLICIES_MAX)
    execution: Execution = Field(default_factory=Execution)
    compaction: Compaction = Field(default_factory=Compaction)
    subagents: dict[ServerName, Subagent] = Field(default_factory=dict, max_length=SUBAGENTS_MAX)
    skills: Skills = Field(default_factory=Skills)
    memory: Memory = Field(default_factory=Memory)
    system_prompt: str = ""
    #: The text of SOUL.md, and where the files are; neither stands in agent.json.
    soul: str = Field(default="", exclude=True)
    folder: str = Field(default="", exclude=True)
    #: What the folder adds to the system prompt, and the files of the skills that it names there.
    notes: str = Field(default="", exclude=True)
    listed: dict[str, str] = Field(default_factory=dict, exclude=True)
    #: The functions in tools/*.py that are tools, and what each takes.
    functions: dict[str, list[str]] = Field(default_factory=dict, exclude=True)

    @property
    def instructions(self) -> str:
        """The system prompt: SOUL.md, then `systemPrompt`, then what the folder adds."""
        parts = (self.soul, self.system_prompt, self.notes)
        return "\n\n".join(part.strip() for part in parts if part.strip())

    @property
    def brings(self) -> Set[str]:
        """The tools of `BROUGHT` that the agent has under any preset: what they need is there."""
        skills = {"load_skill"} if self.listed else set()
        may_write = self.memory.enabled and self.memory.append
        agents = {SPAWN} if self.subagents else set()
        return skills | ({"remember", "forget"} if may_write else set()) | agents

    def dump(self) -> str:
        """Return all of the profile as JSON, for a run to keep the version it started with."""
        kept = {
            "soul": self.soul,
            "folder": self.folder,
            "notes": self.notes,
            "listed": self.listed,
            "functions": self.functions,
        }
        return json.dumps(self.model_dump(mode="json") | kept)

    @staticmethod
    def restore(text: str) -> "Profile":
        """Return the profile that `dump` wrote."""
        return Profile.model_validate_json(text)
