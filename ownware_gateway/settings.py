"""Every setting of the gateway, and the only code that reads the environment.

A setting is a field of `Settings`: its variable is `OWNWARE_` and the field's name in capitals
unless it says otherwise. docs/configuration.md lists them all; a test holds it complete.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import platformdirs

from ownware_gateway.errors import BootError

TRUE: Final = frozenset({"1", "true", "yes", "on"})
FALSE: Final = frozenset({"", "0", "false", "no", "off"})
DISCONNECTS: Final = ("cancel", "keep")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


def _setting(default: Any, doc: str, *, env: str | None = None, secret: bool = False) -> Any:
    # A secret stays out of repr, and with it out of logs and tracebacks.
    return field(default=default, repr=not secret, metadata={"doc": doc, "env": env})


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person can choose; read once at the start, never changed."""

    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(3011, "Port to listen on; 0 takes a free one.")
    profiles: str = _setting("profiles", "Folder of agent profiles.")
    data_dir: str = _setting(
        "", "Where everything is kept; empty: the platform's user data folder."
    )
    workspace: str = _setting(
        "", "The folder that agents' tools work in; empty: in the data folder."
    )
    log_level: str = _setting(
        "info", "What the server's own log says: " + ", ".join(LOG_LEVELS) + "."
    )
    require_auth: bool = _setting(False, "Ask for the token on loopback too.")
    behind_proxy: bool = _setting(False, "A reverse proxy is in front; the token is always on.")
    served_name: tuple[str, ...] = _setting((), "Host names that the gateway answers to.")
    cors_origin: tuple[str, ...] = _setting((), "Web origins that may call the gateway.")
    rate_limit_run: int = _setting(60, "Runs a caller may start in a minute, on an exposed bind.")
    rate_limit_general: int = _setting(600, "Other requests of a caller in a minute, likewise.")
    require_request_id: bool = _setting(False, "Refuse a /resume that names no requestId.")
    runs_active_max: int = _setting(1000, "Runs that may be under way at once; more answer 503.")
    retention_deltas_days: int = _setting(
        0, "Days after which a finished run's deltas are removed; 0 keeps them."
    )
    retention_days: int = _setting(
        0, "Days after which all of a finished run is removed; 0 keeps it."
    )
    retention_max_mb: int = _setting(
        0, "Size of the log in MiB above which the oldest finished runs are removed; 0: no limit."
    )
    model_silence_s: float = _setting(
        60.0, "How long a model may send nothing before it is given up."
    )
    embedding_model: str = _setting("", "The model of embeddings where a request names none.")
    api_key: str = _setting("", "The token, instead of one that is made.", secret=True)
    disconnect: str = _setting(
        "cancel", "What becomes of a run without a conversation that nobody reads: cancel or keep."
    )
    helper_prompts: bool = _setting(
        True, "Answer chat UIs' helper prompts with the profile's small model."
    )
    openai_base_url: str = _setting(
        "", "Another address for openai: models.", env="OPENAI_BASE_URL"
    )
    anthropic_base_url: str = _setting(
        "", "Another address for anthropic: models.", env="ANTHROPIC_BASE_URL"
    )
    openrouter_base_url: str = _setting("", "Another address for openrouter: models.")
    google_base_url: str = _setting("", "Another address for google: models.")
    local_base_url: str = _setting("", "Address of an OpenAI-compatible server for local: models.")
    ollama_host: str = _setting("", "Where Ollama listens.", env="OLLAMA_HOST")
    openai_api_key: str = _setting("", "Key for openai: models.", env="OPENAI_API_KEY", secret=True)
    anthropic_api_key: str = _setting(
        "", "Key for anthropic: models.", env="ANTHROPIC_API_KEY", secret=True
    )
    google_api_key: str = _setting("", "Key for google: models.", env="GOOGLE_API_KEY", secret=True)
    openrouter_api_key: str = _setting(
        "", "Key for openrouter: models.", env="OPENROUTER_API_KEY", secret=True
    )
    local_api_key: str = _setting(
        "", "Key for local: models, where the server wants one.", secret=True
    )
    mcp_config: str = _setting(
        "", "Another file of MCP servers, beside mcp.json in the data folder."
    )
    mcp_add: bool = _setting(
        False, "Let callers add MCP servers, which are programs of their choice."
    )
    services_config: str = _setting(
        "", "Another file of services, beside services.json in the data folder."
    )
    trust_profiles: bool = _setting(
        False, "Trust every profile: run the Python tools in their folders."
    )
    trust_profile: tuple[str, ...] = _setting(
        (), "Folders of profiles that are trusted: their Python tools are run."
    )
    tool_env: tuple[str, ...] = _setting(
        (), "Names of variables that tools' child processes get too."
    )
    fetch_private: tuple[str, ...] = _setting(
        (), "Private networks, and hosts with a port, that web_fetch may reach."
    )
    search_provider: str = _setting("", "Who web_search asks: searxng, brave or tavily.")
    search_base_url: str = _setting(
        "", "Where the search provider is: of searxng always, of others another address."
    )
    search_api_key: str = _setting("", "Key for the search provider.", secret=True)

    @property
    def secrets(self) -> frozenset[str]:
        """The values that must never be seen."""
        return frozenset(
            value
            for item in fields(self)
            if item.name.endswith("api_key") and (value := getattr(self, item.name))
        )

    @property
    def data_path(self) -> Path:
        """The data directory, as an absolute path; BootError for a home that nobody has."""
        try:
            path = Path(self.data_dir or platformdirs.user_data_dir("ownware"))
        except RuntimeError:
            raise BootError(
                "This user has no home folder for the data directory: set OWNWARE_DATA_DIR."
            ) from None
        try:
            return path.expanduser().absolute()
        except RuntimeError:
            raise BootError(f"The data directory {path} begins with an unknown home.") from None


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    (item,) = (item for item in fields(Settings) if item.name == name)
    return item.metadata["env"] or f"OWNWARE_{name.upper()}"


def load(
    environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings: an override (a flag) beats a variable, which beats the default.

    An override of None counts as not given. Raises BootError for a value that does not fit.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for item in fields(Settings):
        text = environ.get(variable(item.name))
        # Set to nothing is not set: an empty host, say, would be every address there is.
        if text is not None and text.strip():
            values[item.name] = _parse(variable(item.name), item.default, text.strip())
    values |= {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (overrides or {}).items()
        if value is not None
    }
    settings = Settings(**values)
    _check(settings)
    return settings


def child_environment(
    settings: Settings, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return what a tool's child process may see of the gateway's environment.

    Only names that are needed to find programs, a home and a language pass, and those that the
    operator listed: a secret of the gateway must not reach a shell that a model writes for.
    """
    environ = os.environ if environ is None else environ
    passed = {"PATH", "HOME", "LANG", "LC_ALL", "TERM", "TZ", "TMPDIR", "USER", *settings.tool_env}
    return {name: value for name, value in environ.items() if name in passed}


def own_variable(name: str) -> str | None:
    """Return a variable of the gateway's own environment, which a configuration names."""
    return os.environ.get(name)


def _parse(name: str, default: Any, text: str) -> Any:
    if isinstance(default, bool):
        if text.lower() not in TRUE | FALSE:
            raise BootError(f"{name} is {text!r}; it must be 1 or 0.")
        return text.lower() in TRUE
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            raise BootError(f"{name} is {text!r}; it must be a number.") from None
    return text


def _check(settings: Settings) -> None:
    if not 0 <= settings.port <= 65535:
        raise BootError(f"The port is {settings.port}; it must be from 0 to 65535.")
    if settings.disconnect not in DISCONNECTS:
        raise BootError(f"{variable('disconnect')} must be one of: {', '.join(DISCONNECTS)}.")
    if settings.log_level not in LOG_LEVELS:
        levels = ", ".join(LOG_LEVELS)
        raise BootError(f"The log level is {settings.log_level!r}; it must be one of: {levels}.")
    for name in ("retention_deltas_days", "retention_days", "retention_max_mb"):
        if getattr(settings, name) < 0:
            raise BootError(
                f"{variable(name)} is {getattr(settings, name)}; it must not be below 0."
            )
    for name in ("rate_limit_run", "rate_limit_general", "runs_active_max", "model_silence_s"):
        if not 0 < getattr(settings, name) < math.inf:
            raise BootError(f"{variable(name)} is {getattr(settings, name)}; it must be above 0.")
