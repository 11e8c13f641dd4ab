"""A rule of a profile: which calls it is about, and what it decides."""

import shlex
from typing import Annotated, Final, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ownware_gateway.profile.fields import Strict, absent, one_or_more

#: Most conditions of a rule, and most texts of a condition.
CONDITIONS_MAX: Final = 20
TEXTS_MAX: Final = 200
TEXT_CHARS_MAX: Final = 1000

Decision = Literal["allow", "ask", "deny"]

#: The tool that the rules of kind `shell` are about unless they name another.
SHELL: Final = "shell_execute"


def check_prefix(text: str) -> str:
    """Return a command's beginning. Raises ValueError when no command could begin so."""
    from ownware_gateway.shell_syntax import parse

    script = parse(text)
    own = [command for command in script.commands if not command.given]
    if not (script.plain and len(own) == 1 and own[0].plain and text.isprintable()) or (
        # Whatever the shell takes for more than words is none of these.
        shlex.split(text) != [word.text for word in own[0].words]
    ):
        raise ValueError(
            'the first words of one command, like "git status", without any of ; & | < > ( ) $ ` #'
            " and wild cards outside of quotes"
        )
    return text


def check_glob(text: str) -> str:
    """Return a pattern of paths. Raises ValueError when no path could fit it."""
    parts = text.removeprefix("/").split("/")
    if "" in parts or "." in parts or ".." in parts:
        raise ValueError(
            'a pattern of paths in the workspace, like "secrets/**", or of absolute ones, without'
            " empty parts, '.' and '..'"
        )
    return text


_Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=TEXT_CHARS_MAX)]],
    BeforeValidator(one_or_more),
    Field(min_length=1, max_length=TEXTS_MAX),
]


class Condition(Strict):
    """What an argument must be for a rule to fit: exactly one of these, one of its texts."""

    prefix: _Texts | None = Field(default=None, exclude_if=absent)
    glob: _Texts | None = Field(default=None, exclude_if=absent)
    pattern: _Texts | None = Field(default=None, exclude_if=absent)
    equals: str | bool | int | float | None = Field(default=None, exclude_if=absent)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [self.prefix, self.glob, self.pattern, self.equals]
        if sum(value is not None for value in given) != 1:
            raise ValueError("exactly one of prefix, glob, pattern and equals")
        for text in self.prefix or ():
            check_prefix(text)
        for text in self.glob or ():
            check_glob(text)
        return self


class Policy(Strict):
    """A rule: which tool, with which arguments, and what is decided.

    One of kind `shell` is short for two: commands that fit `denyPatterns` are denied, those that
    begin with `allowPrefixes` are allowed, and all others are left to the rules that follow.
    """

    kind: Literal["rule", "shell"] = "rule"
    tool: str = Field(default="", max_length=128, pattern=r"^[A-Za-z0-9_.*?-]*$")
    when: dict[str, Condition] = Field(default_factory=dict, max_length=CONDITIONS_MAX)
    decision: Decision | None = Field(default=None, exclude_if=absent)
    allow_prefixes: _Texts | None = Field(default=None, exclude_if=absent)
    deny_patterns: _Texts | None = Field(default=None, exclude_if=absent)

    @field_validator("allow_prefixes")
    @classmethod
    def _prefixes(cls, texts: list[str] | None) -> list[str] | None:
        return texts and [check_prefix(text) for text in texts]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        lists = self.allow_prefixes or self.deny_patterns
        if self.kind == "rule" and (lists or self.decision is None or not self.tool):
            raise ValueError(
                "a tool and a decision; allowPrefixes and denyPatterns are for the kind 'shell'"
            )
        if self.kind == "shell" and (not lists or self.decision is not None or self.when):
            raise ValueError(
                "allowPrefixes or denyPatterns, and neither when nor decision in the kind 'shell'"
            )
        return self

    @property
    def tools(self) -> str:
        """The pattern of the names of the tools that it is about."""
        return self.tool or SHELL

    @property
    def arguments(self) -> set[str]:
        """The arguments that it looks at."""
        return {"command"} if self.kind == "shell" else set(self.when)
