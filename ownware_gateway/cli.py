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
import resource
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Never

from pydantic import ValidationError

from ownware_gateway import __version__, datadir
from ownware_gateway.app import DEMO_ID, Gateway, gateway, may_name, trust
from ownware_gateway.client import Client, ClientError
from ownware_gateway.errors import BootError, GatewayError
from ownware_gateway.log.backup import backup, restore
from ownware_gateway.masking import Masker
from ownware_gateway.profile import Profile
from ownware_gateway.profile.folder import AGENT_FILES
from ownware_gateway.settings import DISCONNECTS, LOG_LEVELS, Settings, load, variable
from ownware_gateway.terminal import Terminal, note, printable, say

#: Whoever reads the address may send a request at once, which should not have to wait until the
#: profiles have been read; the rest of what `serve` prints follows after so long.
SAY_MORE_S: Final = 0.02

#: How many usable models `serve` names.
MODELS_SHOWN_MAX: Final = 4

#: How long a gateway that is just starting may take to say its address, and how often it is asked.
STARTING_S: Final = 5.0
STARTING_POLL_S: Final = 0.1

#: Files and connections that a gateway may have open, if the system lets it.
FILES_MAX: Final = 65_536

#: How long a run that was cancelled may take to end.
CANCEL_S: Final = 5.0

INTERRUPTED: Final = 128 + signal.SIGINT

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
        note(str(error))
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
    serve.add_argument("--mcp-config", metavar="FILE", help="another file of MCP servers")
    serve.add_argument("--services-config", metavar="FILE", help="another file of services")
    serve.add_argument("--log-level", choices=LOG_LEVELS, help="what the log on stderr says (info)")
    for flag, doc in (
        ("--require-auth", "ask for the token on loopback too"),
        ("--behind-proxy", "a reverse proxy is in front"),
    ):
        serve.add_argument(flag, action="store_true", default=None, help=doc)
    _add_trust(serve)
    serve.add_argument(
        "--served-name", action="append", metavar="NAME", help="a host name to answer to"
    )
    serve.add_argument("--api-key", metavar="KEY", help="the token, instead of one that is made")
    serve.add_argument(
        "--disconnect",
        choices=DISCONNECTS,
        help="what becomes of a run without a conversation that nobody reads (cancel)",
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
    _add_trust(ask)

    log = command("log", _follow_log, "Show what happens in a thread, as it happens.")
    log.add_argument("thread", help="which thread")
    log.add_argument("--since", type=int, help="only what comes after the event of this seq")
    log.add_argument("--agent", default="root", help="which agent's stream (root)")
    _add_folders(log, "data_dir")

    init = command("init", _init, "Write a starter profile.")
    init.add_argument("name", nargs="?", default="assistant", help="its name (assistant)")
    _add_folders(init, "profiles")

    models = command("models", _models, "List the models, the usable ones first.")
    models.add_argument("--all", action="store_true", help="also those that need a key")
    _add_folders(models, "data_dir")

    doctor = command("doctor", _doctor, "Look at a data directory and say what to do.")
    _add_folders(doctor, "data_dir", "profiles")
    _add_trust(doctor)

    copy = command("backup", _backup, "Copy the log to a file; a gateway may be running.")
    copy.add_argument("file", help="the new file")
    _add_folders(copy, "data_dir")

    back = command("restore", _restore, "Put a copy in the place of the log; no gateway may run.")
    back.add_argument("file", help="what backup wrote")
    _add_folders(back, "data_dir")

    _add_folders(command("token", _token, "Print the token of a data directory."), "data_dir")
    command("version", _version, "Print the version.")
    return parser


def _add_folders(parser: argparse.ArgumentParser, *names: str) -> None:
    docs = {item.name: item.metadata["doc"].rstrip(".") for item in fields(Settings)}
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        doc = docs[name][0].lower() + docs[name][1:]
        parser.add_argument(flag, metavar="FOLDER", help=doc)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-profile",
        action="append",
        metavar="FOLDER",
        help="run the Python tools of the profile in this folder of the profiles",
    )
    parser.add_argument(
        "--trust-profiles",
        action="store_true",
        default=None,
        help="run the Python tools of every profile",
    )


def _settings(arguments: argparse.Namespace, **fixed: Any) -> Settings:
    """Return the settings: what is fixed beats a flag, which beats a variable."""
    known = {item.name for item in fields(Settings)}
    flags = {name: value for name, value in vars(arguments).items() if name in known}
    return load(overrides=flags | fixed)


def _help(parser: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    parser.print_help()
    return 0


def _version(_: argparse.Namespace) -> int:
    say(f"ownware {__version__}")
    return 0


def _token(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    path = settings.data_path
    token = settings.api_key or datadir.read_token(path)
    if token is None:
        note(
            f"There is no token in {path}. A gateway makes one when it first needs one: "
            "ownware serve --require-auth."
        )
        return 1
    say(token)
    return 0


# -- serve


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _allow_files()
    with _log_to_stderr(settings.log_level, settings.secrets) as hide:
        return asyncio.run(_serve_until_signal(settings, hide))


def _allow_files() -> None:
    """Raise the limit on open files, as far as it goes without asking: each client takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
        where = f"everywhere, here at {up.url}" if up.access.exposed else up.url
        say(f"Ownware Gateway {__version__} listens on {where}")
        saying = asyncio.get_running_loop().create_task(_say_more(up, settings))
        await stop.wait()
        saying.cancel()
        await asyncio.wait({saying})
        _log.info("stopping; what is unfinished goes on at the next start")
    return 0


async def _say_more(up: Gateway, settings: Settings) -> None:
    await asyncio.sleep(SAY_MORE_S)
    _say_what_is_there(up, settings)
    await _say_models(up)


def _say_what_is_there(up: Gateway, settings: Settings) -> None:
    folder = Path(settings.profiles).absolute()
    names = [profile.name for profile in up.profiles.all()]
    _say_field("Profiles", f"{', '.join(names) or 'none'} (in {folder})")
    for item in up.profiles.broken():
        _say_field("", f"not usable: {item.message}")
    for item in up.profiles.warnings():
        _say_field("", item.message)
    _say_field("Data", str(up.data_dir))
    _say_field("Workspace", str(up.workspace))
    if up.recovered:
        _say_field("Runs", f"{up.recovered} unfinished, picked up again")
    token = f"{_program()} token --data-dir {shlex.quote(str(up.data_dir))}"
    if settings.api_key:
        _say_field("Token", f"the one of --api-key or {variable('api_key')}")
    elif up.token and up.token_is_new:
        _say_field("Token", f"{up.token}  (made now; printed later by: {token})")
    elif up.token:
        _say_field("Token", f"printed by: {token}")
    if up.access.warning:
        _say_field("Warning", up.access.warning)
    if not names:
        where = shlex.quote(str(folder))
        say(f"There is no profile to run yet. Make one: {_program()} init --profiles {where}")
        return
    shown = f"${variable('api_key')}" if settings.api_key else f"$({token})"
    header = f' -H "Authorization: Bearer {shown}"' if up.token else ""
    body = json.dumps({"profileId": names[0], "prompt": "Hello"} | _usable_model(up, names[0]))
    address = shlex.quote(f"{up.url}/api/v1/run")
    say(f"Try it:\n  curl {address}{header} -H 'Content-Type: application/json' \\")
    say(f"    -d '{body}'")


def _usable_model(up: Gateway, profile: str) -> dict[str, str]:
    """Return what a start must say for an answer to come, where nothing may stand in."""
    try:
        up.catalogue.resolve(up.profiles.get(profile).model)
    except GatewayError:
        return {"model": DEMO_ID} if up.access.exposed else {}
    return {}


async def _say_models(up: Gateway) -> None:
    usable = await up.catalogue.usable()
    shown = ", ".join(usable[:MODELS_SHOWN_MAX])
    more = len(usable) - MODELS_SHOWN_MAX
    _say_field("Models", f"{shown} and {more} more" if more > 0 else shown)
    if len(usable) == 1:
        _say_field("", f"To use a real one set a key, such as {variable('openai_api_key')}.")
    else:
        _say_field("", "All of them, with prices: GET /api/v1/models")


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
            note(f"{started['model']} answers: {fallback['reason']}")
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
        note(f"Thread: {started['threadId']} (go on with --thread)")
        return code


@contextlib.asynccontextmanager
async def _some_gateway(settings: Settings) -> AsyncIterator[Client]:
    """Connect to the gateway that uses the data directory; if none does, be one for a while."""
    url = await _running(settings.data_path)
    if url is not None:
        token = settings.api_key or datadir.read_token(settings.data_path)
        async with Client(url, token) as client:
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
    say(f"Wrote {folder}/agent.json and {folder}/SOUL.md.")
    say(f"Next:\n  {_program()} run {name} 'Hello'{where}\n  {_program()} serve{where}")
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
        say("  ".join(cells).rstrip())
    if others and not arguments.all:
        note(f"{len(others)} more are known but cannot be used yet; --all shows what they need.")
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


# -- the log


def _follow_log(arguments: argparse.Namespace) -> int:
    return asyncio.run(_print_log(arguments))


async def _print_log(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    path = settings.data_path
    url = await _running(path)
    if url is None:
        raise BootError(f"No gateway is using {path}. Start one: {_program()} serve")
    async with Client(url, settings.api_key or datadir.read_token(path)) as client:
        events = client.events(arguments.thread, arguments.since, agent_id=arguments.agent)
        async with contextlib.aclosing(events):
            async for event in events:
                say(printable(json.dumps(event, ensure_ascii=False)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ownware_gateway.doctor import examine

    settings = _settings(arguments)
    failed = False
    known = functools.partial(may_name, settings)
    for finding in examine(settings.data_path, Path(settings.profiles), trust(settings), known):
        failed |= finding.level == "fail"
        say(f"{finding.level:<5} {finding.text}")
    return int(failed)


def _backup(arguments: argparse.Namespace) -> int:
    target = Path(arguments.file).absolute()
    size = backup(_settings(arguments).data_path / datadir.DATABASE, target)
    say(f"Wrote {target}: {size // 1024} KiB.")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    with datadir.DataDir.open(_settings(arguments).data_path) as opened:
        replaced = restore(opened.database, Path(arguments.file).absolute())
    say(f"The log is what {arguments.file} held. Cursors of before are told so.")
    if replaced is not None:
        say(f"What it held until now is kept in {replaced}; delete it when you need it no more.")
    return 0


# -- words


def _program() -> str:
    """Return how this program is called on this machine."""
    return "ownware" if shutil.which("ownware") else f"{sys.executable} -m ownware_gateway"


def _say_field(name: str, value: str) -> None:
    say(f"{name:<10} {value}")
