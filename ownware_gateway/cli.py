"""The command line: start a gateway, talk to an agent, make a profile, see what there is.

Exit codes: 0, 1 for anything that went wrong (one sentence on stderr says what), 130 after Ctrl-C.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Never

from pydantic import ValidationError

from ownware_gateway import __version__, datadir
from ownware_gateway.app import Gateway, gateway
from ownware_gateway.client import Client, ClientError
from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.masking import Masker
from ownware_gateway.profile import AGENT_FILES, Profile
from ownware_gateway.settings import LOG_LEVELS, Settings, load, variable

#: How many usable models `serve` names.
MODELS_SHOWN_MAX: Final = 4

#: How long a gateway that is just starting may take to say its address, and how often it is asked.
STARTING_S: Final = 5.0
STARTING_POLL_S: Final = 0.1

#: How long a run that was cancelled may take to end.
CANCEL_S: Final = 5.0

#: How often a person may give an answer that is none before the question counts as denied.
ANSWERS_MAX: Final = 5
ANSWER_BYTES_MAX: Final = 4_096
ANSWERS: Final = {"y": "approve", "n": "deny", "a": "always"}

#: The most characters of a tool call's input that its line shows; a question shows all of it.
CALL_CHARS_MAX: Final = 160

INTERRUPTED: Final = 128 + signal.SIGINT

#: What could control a terminal or make a text look like another: control characters except line
#: feed and tab, and those that change the direction of writing.
_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

#: How a run ended, if not well.
ENDS: Final = {"failed": "failed", "cancelled": "was cancelled", "timed_out": "timed out"}

_log: Final = logging.getLogger(__name__)

SOUL: Final = """\
You are a helpful assistant. Answer briefly and plainly. When a task needs files or commands, use
your tools, and say what you did.
"""


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.command(arguments)
    except SystemExit as leave:  # how argparse ends after --help and wrong arguments
        return int(leave.code or 0)
    except (BootError, GatewayError, ClientError) as error:
        _note(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on. What is left in the buffer must not fail once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


class _Parser(argparse.ArgumentParser):
    """As argparse's, except for the exit code of a wrong argument."""

    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: {message}. See {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ownware",
        description="A gateway that runs agents, and the tools to talk to them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ownware {__version__}")
    parser.set_defaults(command=functools.partial(_help, parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, call: Callable[..., Any], says: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        added.set_defaults(command=call)
        return added

    serve = command("serve", _serve, "Start a gateway.")
    serve.add_argument("--host", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (3011); 0 takes a free one")
    _add_folders(serve, "profiles", "data_dir", "workspace")
    serve.add_argument("--log-level", choices=LOG_LEVELS, help="what the log on stderr says (info)")
    for flag, doc in (
        ("--require-auth", "ask for the token on loopback too"),
        ("--behind-proxy", "a reverse proxy is in front"),
    ):
        serve.add_argument(flag, action="store_true", default=None, help=doc)
    serve.add_argument(
        "--served-name", action="append", metavar="NAME", help="a host name to answer to"
    )
    serve.add_argument(
        "--cors-origin", action="append", metavar="ORIGIN", help="a web origin that may call"
    )

    ask = command("run", _run, "Run an agent here and show what it says and does.")
    ask.add_argument("profile", help="which agent")
    ask.add_argument("prompt", help="what it is to do")
    ask.add_argument("--model", help="another model, as provider:model")
    ask.add_argument("--thread", help="go on with this conversation")
    ask.add_argument("--yes", action="store_true", help="approve every tool without asking")
    _add_folders(ask, "profiles", "data_dir", "workspace")

    init = command("init", _init, "Write a starter profile.")
    init.add_argument("name", nargs="?", default="assistant", help="its name (assistant)")
    _add_folders(init, "profiles")

    models = command("models", _models, "List the models, the usable ones first.")
    models.add_argument("--all", action="store_true", help="also those that need a key")
    _add_folders(models, "data_dir")

    _add_folders(command("token", _token, "Print the token of a data directory."), "data_dir")
    command("version", _version, "Print the version.")
    return parser


def _add_folders(parser: argparse.ArgumentParser, *names: str) -> None:
    docs = {item.name: item.metadata["doc"].rstrip(".") for item in fields(Settings)}
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        doc = docs[name][0].lower() + docs[name][1:]
        parser.add_argument(flag, metavar="FOLDER", help=doc)


def _settings(arguments: argparse.Namespace, **fixed: Any) -> Settings:
    """Return the settings: what is fixed beats a flag, which beats a variable."""
    known = {item.name for item in fields(Settings)}
    flags = {name: value for name, value in vars(arguments).items() if name in known}
    return load(overrides=flags | fixed)


def _help(parser: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _version(_: argparse.Namespace) -> int:
    _say(f"ownware {__version__}")
    return 0


def _token(arguments: argparse.Namespace) -> int:
    path = _settings(arguments).data_path
    token = datadir.read_token(path)
    if token is None:
        _note(
            f"There is no token in {path}. A gateway makes one when it first needs one: "
            "ownware serve --require-auth."
        )
        return 1
    _say(token)
    return 0


# -- serve


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    with _log_to_stderr(settings.log_level, settings.secrets) as hide:
        return asyncio.run(_serve_until_signal(settings, hide))


async def _serve_until_signal(settings: Settings, hide: Callable[[str], None]) -> int:
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            # Durable is what is committed; nothing that matters is lost.
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    async with gateway(settings) as up:
        hide(up.token or "")
        _say_start(up, settings)
        # Asking every server that may have models takes longer than the first answer may.
        saying = asyncio.get_running_loop().create_task(_say_models(up))
        await stop.wait()
        saying.cancel()
        await asyncio.wait({saying})
        _log.info("stopping; what is unfinished goes on at the next start")
    return 0


def _say_start(up: Gateway, settings: Settings) -> None:
    folder = Path(settings.profiles).absolute()
    names = [profile.name for profile in up.profiles.all()]
    _say(f"Ownware Gateway {__version__} listens on {up.url}")
    _say_field("Profiles", f"{', '.join(names) or 'none'} (in {folder})")
    for item in up.profiles.broken():
        _say_field("", f"not usable: {item.message}")
    _say_field("Data", str(up.data_dir))
    _say_field("Workspace", str(up.workspace))
    if up.recovered:
        _say_field("Runs", f"{up.recovered} unfinished, picked up again")
    token = f"{_program()} token --data-dir {shlex.quote(str(up.data_dir))}"
    if up.token and up.token_is_new:
        _say_field("Token", f"{up.token}  (made now; printed later by: {token})")
    elif up.token:
        _say_field("Token", f"printed by: {token}")
    if up.access.warning:
        _say_field("Warning", up.access.warning)
    if not names:
        where = shlex.quote(str(folder))
        _say(f"There is no profile to run yet. Make one: {_program()} init --profiles {where}")
        return
    header = f' -H "Authorization: Bearer $({token})"' if up.token else ""
    body = json.dumps({"profileId": names[0], "prompt": "Hello"})
    address = shlex.quote(f"{up.url}/api/v1/run")
    _say(f"Try it:\n  curl {address}{header} -H 'Content-Type: application/json' \\")
    _say(f"    -d '{body}'")


async def _say_models(up: Gateway) -> None:
    usable = [model for model in await up.catalogue.list() if model.has_credentials]
    shown = ", ".join(model.id for model in usable[:MODELS_SHOWN_MAX])
    more = len(usable) - MODELS_SHOWN_MAX
    _say_field("Models", f"{shown} and {more} more" if more > 0 else shown)
    if len(usable) == 1:
        _say_field("", f"To use a real one set a key, such as {variable('openai_api_key')}.")


@contextlib.contextmanager
def _log_to_stderr(level: str, secrets: frozenset[str]) -> Iterator[Callable[[str], None]]:
    """Write the server's log to stderr for a while; yield a function that hides one more secret."""
    formatter = _Masked("%(asctime)s %(levelname)s %(name)s: %(message)s", secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    # Not the root's level: at debug other libraries log all they handle, people's words included.
    loggers = [logging.getLogger(name) for name in ("ownware_gateway", "aiohttp")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level.upper())
    logging.getLogger().addHandler(handler)
    try:
        yield formatter.hide
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


class _Masked(logging.Formatter):
    """A log's lines, tracebacks included, without secrets."""

    def __init__(self, form: str, secrets: frozenset[str]) -> None:
        super().__init__(form)
        self._secrets = secrets
        self._masker = Masker(secrets)

    def hide(self, secret: str) -> None:
        self._masker = Masker({*self._secrets, secret})

    def format(self, record: logging.LogRecord) -> str:
        return self._masker.text(super().format(record))


# -- run


def _run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments, host="127.0.0.1", port=0, behind_proxy=False)
    with _log_to_stderr("warning", settings.secrets):
        return asyncio.run(_run_once(arguments, settings))


async def _run_once(arguments: argparse.Namespace, settings: Settings) -> int:
    async with _some_gateway(settings) as client:
        started = await client.start(
            arguments.profile, arguments.prompt, model=arguments.model, thread_id=arguments.thread
        )
        if fallback := started.get("fallback"):
            _note(f"{started['model']} answers: {fallback['reason']}")
        terminal = Terminal(client, started, yes=arguments.yes)
        code = INTERRUPTED
        try:
            code = await terminal.follow()
        except asyncio.CancelledError:
            # Ctrl-C. The run must not go on where nobody sees it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_S):
                    await client.cancel(started["runId"])
                    await terminal.follow()
        _note(f"Thread: {started['threadId']} (go on with --thread)")
        return code


@contextlib.asynccontextmanager
async def _some_gateway(settings: Settings) -> AsyncIterator[Client]:
    """Connect to the gateway that uses the data directory; if none does, be one for a while."""
    url = await _running(settings.data_path)
    if url is not None:
        async with Client(url, datadir.read_token(settings.data_path)) as client:
            yield client
        return
    async with gateway(settings) as up, Client(up.url, up.token) as client:
        yield client


async def _running(path: Path) -> str | None:
    """Return the address of the gateway that uses a data directory, or None."""
    for _ in range(round(STARTING_S / STARTING_POLL_S)):
        found = datadir.running(path)
        if found is None or found[1]:
            return found and found[1]
        await asyncio.sleep(STARTING_POLL_S)
    raise BootError(f"A gateway is using {path} but does not say its address; try again.")


class Terminal:
    """A run on the terminal: what the agent says on stdout, all about it on stderr."""

    def __init__(self, client: Client, started: dict[str, Any], *, yes: bool) -> None:
        self._client = client
        self._run = started
        self._yes = yes
        self._since: int = started["startSeq"]
        self._line_is_open = False

    async def follow(self) -> int:
        """Show the run from where it was left, to its end; return the exit code."""
        thread_id, run_id = self._run["threadId"], self._run["runId"]
        code = 1
        events = self._client.events(thread_id, self._since, run_id=run_id)
        async with contextlib.aclosing(events):
            async for event in events:
                self._since = event.get("seq", self._since)
                if event["type"] == "permission.request":
                    await self._decide(event)
                elif event["type"] == "session.end":
                    code = 0 if event["status"] == "succeeded" else 1
                self._show(event)
        return code

    def _show(self, event: dict[str, Any]) -> None:
        match event:
            case {"type": "text.delta", "text": text, "notice": True}:
                self._about(text.strip())
            case {"type": "text.delta", "text": text}:
                self._text(text)
            case {"type": "tool.call.execute", "toolName": name, "input": given}:
                shown = json.dumps(given, ensure_ascii=False)
                more = "…" if len(shown) > CALL_CHARS_MAX else ""
                self._about(f"> {name} {shown[:CALL_CHARS_MAX]}{more}")
            case {"type": "tool.call.end", "toolName": name, "isError": True, "result": result}:
                self._about(f"> {name} failed: {result}")
            case {"type": "recovery", "detail": detail}:
                self._about(f"Trying again: {detail}")
            case {"type": "error", "message": message}:
                self._about(f"Error: {message}")
            case {"type": "session.end", "status": status, "code": code}:
                self._about(f"The run {ENDS[status]} ({code})." if status in ENDS else "")
            case _:
                pass

    def _text(self, text: str) -> None:
        """Show what the agent says; to a terminal without the codes that could control it."""
        print(_printable(text) if sys.stdout.isatty() else text, end="", flush=True)
        self._line_is_open = not text.endswith("\n") if text else self._line_is_open

    def _about(self, said: str) -> None:
        if self._line_is_open:
            self._text("\n")
        if said:
            _note(_printable(said))

    async def _decide(self, asked: dict[str, Any]) -> None:
        """Have a question answered, by whoever is there."""
        shown = json.dumps(asked["input"], indent=2, ensure_ascii=False)
        self._about(f"{asked['toolName']} asks for permission: {asked['reason']}\n{shown}")
        if self._yes:
            action = "approve"
            self._about("Approved: --yes.")
        elif sys.stdin.isatty() and sys.stderr.isatty():
            action = await _ask()
        else:
            action = "deny"
            self._about("Denied: there is no terminal to ask on. --yes approves everything.")
        try:
            await self._client.resume(self._run["threadId"], action, asked["requestId"])
        except GatewayError as error:
            # Somebody else was faster, or it took too long: the run goes on with that answer.
            self._about(error.message)


async def _ask() -> str:
    """Return a person's answer to a question that stands on the terminal."""
    # What was typed before the question cannot be meant as its answer.
    termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
    for _ in range(ANSWERS_MAX):
        print("Allow? [y]es / [n]o / [a]lways: ", end="", file=sys.stderr, flush=True)
        line = await _read_line(sys.stdin.fileno())
        if not line:
            break
        if action := ANSWERS.get(line.strip().lower()[:1]):
            return action
    _note("Denied: no answer.")
    return "deny"


async def _read_line(terminal: int) -> str:
    """Return the next line, or nothing at its end; a thread that reads could not be cancelled."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(terminal, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(terminal)
    return os.read(terminal, ANSWER_BYTES_MAX).decode("utf-8", "replace")


# -- init, models


def _init(arguments: argparse.Namespace) -> int:
    name, settings = arguments.name, _settings(arguments)
    try:
        profile = Profile.model_validate({"name": name})
    except ValidationError:
        raise BootError(
            f"A profile cannot be named {name!r}: letters, digits and . _ - only, "
            "the first one a letter or a digit."
        ) from None
    agent = {
        "name": name,
        "description": "A helpful assistant that can read and change files in its workspace.",
        "model": profile.model,
        "tools": {"preset": "coding"},
        "security": {"permissionMode": "ask"},
    }
    folder = Path(settings.profiles) / name
    for file in (*AGENT_FILES, "SOUL.md"):
        if (folder / file).exists():
            raise BootError(f"{folder / file} exists already; nothing was written.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in (("SOUL.md", SOUL), ("agent.json", json.dumps(agent, indent=2) + "\n")):
            with (folder / file).open("x", encoding="utf-8") as opened:
                opened.write(text)
    except OSError as error:
        raise BootError(f"{folder} cannot be written: {error.strerror}.") from error
    where = f" --profiles {shlex.quote(arguments.profiles)}" if arguments.profiles else ""
    _say(f"Wrote {folder}/agent.json and {folder}/SOUL.md.")
    _say(f"Next:\n  {_program()} run {name} 'Hello'{where}\n  {_program()} serve{where}")
    return 0


def _models(arguments: argparse.Namespace) -> int:
    return asyncio.run(_list_models(arguments))


async def _list_models(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments, host="127.0.0.1", port=0, behind_proxy=False)
    with tempfile.TemporaryDirectory() as folder:
        if await _running(settings.data_path) is None:
            # Only to look: nobody's unfinished runs are picked up for it.
            settings = _settings(
                arguments, host="127.0.0.1", port=0, behind_proxy=False, data_dir=folder
            )
        async with _some_gateway(settings) as client:
            found = await client.models()
    usable = [model for model in found if model["hasCredentials"]]
    others = [model for model in found if not model["hasCredentials"]]
    rows = [("MODEL", "USABLE", "CONTEXT", "IN $/M", "OUT $/M")]
    rows += [_row(model) for model in (usable + others if arguments.all else usable)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        _say("  ".join(cells).rstrip())
    if others and not arguments.all:
        _note(f"{len(others)} more are known but cannot be used yet; --all shows what they need.")
    return 0


def _row(model: dict[str, Any]) -> tuple[str, str, str, str, str]:
    state = "yes" if model["hasCredentials"] else f"needs {_needs(model['provider'])}"
    costs = (model["inputCostPerMTok"], model["outputCostPerMTok"])
    cost_in, cost_out = ("-" if cost is None else f"{cost:g}" for cost in costs)
    return model["id"], state, str(model["contextWindow"] or "-"), cost_in, cost_out


def _needs(provider: str) -> str:
    """Return what must be there before a provider's models can be used."""
    key = f"{provider}_api_key"
    return variable(key) if key in {item.name for item in fields(Settings)} else "its server"


# -- words


def _program() -> str:
    """Return how this program is called on this machine."""
    return "ownware" if shutil.which("ownware") else f"{sys.executable} -m ownware_gateway"


def _printable(text: str) -> str:
    """Return the text with what could control a terminal made visible."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _say_field(name: str, value: str) -> None:
    _say(f"{name:<10} {value}")


def _say(text: str) -> None:
    print(text, flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
