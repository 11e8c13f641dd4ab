"""Where the parts meet: the only place that knows which implementations are in use."""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler

from ownware_gateway import auth
from ownware_gateway.calls import Parts
from ownware_gateway.custom import Given as OwnGiven, Trust
from ownware_gateway.custom.source import OwnTools
from ownware_gateway.datadir import DataDir
from ownware_gateway.doors import native, openai
from ownware_gateway.engine import Engine, EngineLimits
from ownware_gateway.errors import BootError
from ownware_gateway.log import Log, Retention
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.masking import Masker
from ownware_gateway.mcp.config import FILE_NAME, ServerFiles
from ownware_gateway.mcp.keeper import Given
from ownware_gateway.mcp.supervisor import Supervisor
from ownware_gateway.models import Catalogue
from ownware_gateway.models.catalogue import DEMO_ID as DEMO_ID, KnownModels
from ownware_gateway.processes import Watchdog
from ownware_gateway.profile.folder import Profiles
from ownware_gateway.profile.names import Known
from ownware_gateway.services.config import FILE_NAME as SERVICES_FILE_NAME, ServiceFiles
from ownware_gateway.services.registry import Registry
from ownware_gateway.settings import Settings, child_environment, own_variable
from ownware_gateway.stream import Streamer
from ownware_gateway.tools import (
    Tool,
    ask,
    files,
    kept,
    search,
    shell,
    todo,
    web as web_tools,
)
from ownware_gateway.tools.knowledge import Knowledge
from ownware_gateway.tools.spawn import Spawning

#: How long the steps under way may take when the gateway leaves.
GRACE_S: Final = 5.0

#: How long handlers may take then; streams end by themselves, a stalled client is cut off.
HANDLERS_GRACE_S: Final = 2.0

#: How long the HTTP layer may take after that to cut off what is left.
HANDLERS_CUT_S: Final = 0.1

#: What speaks to the providers is imported so long after the start, unless a run is faster.
WARM_UP_S: Final = 1.0

#: How often the log is looked through for what need not be kept.
PRUNE_EVERY_S: Final = 3_600.0
DAY_MS: Final = 86_400_000

#: Connections that may wait to be accepted.
BACKLOG: Final = 1024

#: An idle connection is kept for the client's next request for so long. Its first line and headers
#: must have come by then.
KEEP_ALIVE_S: Final = 75.0

#: What is left of a body that nobody wants is taken for so long: the client is to read the answer.
LINGER_S: Final = 10.0

_log: Final = logging.getLogger(__name__)


class Gateway(NamedTuple):
    """A gateway that is up."""

    url: str
    access: auth.Access
    data_dir: Path
    workspace: Path
    token: str | None
    token_is_new: bool
    profiles: Profiles
    catalogue: Catalogue
    log: Log
    engine: Engine
    recovered: int


def steady_clock() -> Callable[[], int]:
    """Return a clock of milliseconds since 1970 that nobody can set.

    It takes the wall clock once and goes on from there by the time since boot, suspension
    included: a clock that is set, in whatever direction, neither lets a question expire early nor
    an answer come late.
    """
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    offset_ns = time.time_ns() - time.clock_gettime_ns(source)
    return lambda: (time.clock_gettime_ns(source) + offset_ns) // 1_000_000


def new_id(kind: str) -> str:
    """Return a name that nobody else has."""
    return f"{kind}_{secrets.token_hex(10)}"


def tools(settings: Settings | None = None) -> dict[str, Tool]:
    """Return every tool there is, by name. Raises BootError for a setting of theirs."""
    local = (*ask.TOOLS, *files.TOOLS, *kept.TOOLS, *search.TOOLS, *shell.TOOLS, *todo.TOOLS)
    return {tool.name: tool for tool in (*local, *web_tools.tools(settings or Settings()))}


def may_name(settings: Settings) -> Known:
    """Return what profiles may name. Raises BootError for a file of servers or services."""
    brought = {**Knowledge(Masker(), lambda: 0).known(), **Spawning().known()}
    known = {**tools(settings), **brought}
    servers = ServerFiles(settings.data_path / FILE_NAME, _file(settings.mcp_config))
    services = ServiceFiles(
        settings.data_path / SERVICES_FILE_NAME, _file(settings.services_config)
    )
    return _known(known, lambda: servers.known, lambda: services.known)


def trust(settings: Settings) -> Trust:
    """Return whose own tools the operator lets run."""
    return Trust(settings.trust_profiles, frozenset(settings.trust_profile))


@contextlib.asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Run a gateway for as long as the context lasts. Raises BootError when it cannot start."""
    began_s = time.monotonic()
    clock_ms = steady_clock()
    async with contextlib.AsyncExitStack() as stack:
        data_dir = stack.enter_context(DataDir.open(settings.data_path))
        needs_token = (
            settings.require_auth or settings.behind_proxy or not auth.is_loopback(settings.host)
        )
        token, token_is_new = settings.api_key, False
        if needs_token and not token:
            token, token_is_new = data_dir.token()
        access = auth.decide(settings, token)
        workspace = _workspace(settings, data_dir)
        listener = _listen(settings)
        stack.callback(listener.close)
        masker = Masker({*settings.secrets, token})
        watchdog = Watchdog()
        # The last of those who have processes: what is still there then is killed.
        stack.push_async_callback(asyncio.to_thread, watchdog.close)
        given = _given(settings, workspace, masker, clock_ms, watchdog)
        servers = _servers(settings, data_dir, given)
        stack.push_async_callback(servers.close)
        services = _services(settings, data_dir, masker, servers)
        stack.push_async_callback(services.close)
        own = _own_tools(settings, workspace, masker, watchdog)
        known = tools(settings)
        knowledge, spawning = Knowledge(masker, clock_ms), Spawning()
        brought = {**knowledge.known(), **spawning.known()}
        names = _known({**known, **brought}, servers.names, services.names)
        profiles = Profiles(Path(settings.profiles), names, workspace)
        catalogue = KnownModels(settings)
        stack.push_async_callback(catalogue.close)
        log = await SqliteLog.open(data_dir.database, clock_ms)
        stack.push_async_callback(log.close)
        parts = Parts(
            log=log,
            catalogue=catalogue,
            # A profile may name a tool that is not set up here; no agent has it.
            tools={
                name: tool
                for name, tool in known.items()
                if name != "web_search" or settings.search_provider
            },
            sources=(servers, services, own, knowledge, spawning),
            masker=masker,
            workspace=workspace,
            data_dir=data_dir.path,
            environment=child_environment(settings),
            watchdog=watchdog,
            clock_ms=clock_ms,
            new_id=new_id,
        )
        limits = EngineLimits(settings.runs_active_max, stand_in=not access.exposed)
        engine = Engine(parts, profiles, limits)
        leaving = asyncio.Event()
        streamer = Streamer(log, leaving.is_set)
        door = native.Native(
            native.NativeParts(
                engine=engine,
                log=log,
                streamer=streamer,
                catalogue=catalogue,
                profiles=profiles,
                servers=servers,
                services=services,
                missing=own.missing,
                uptime_s=lambda: time.monotonic() - began_s,
                new_id=new_id,
                require_request_id=settings.require_request_id,
                servers_may_be_added=settings.mcp_add,
            )
        )
        openai_door = openai.OpenAI(
            openai.OpenAIParts(
                engine=engine,
                log=log,
                streamer=streamer,
                catalogue=catalogue,
                profiles=profiles,
                cancels=settings.disconnect == "cancel",
                helper_prompts=settings.helper_prompts,
                fetch_private=settings.fetch_private,
                started_s=clock_ms() // 1000,
                new_id=new_id,
            )
        )
        recovered = await engine.recover()
        pruning = asyncio.get_running_loop().create_task(_prune(log, engine, settings))
        stack.callback(pruning.cancel)

        async def leave() -> None:
            # First of all the listener, so that no client that comes back meets a gateway that is
            # leaving. Requests on their way are answered, most of them with that word.
            await site.stop()
            engine.refuse()
            leaving.set()
            log.wake()
            await requests.answered(HANDLERS_GRACE_S)

        requests = Requests()
        app = web.Application(client_max_size=native.BODY_BYTES_MAX, middlewares=[requests.answer])
        auth.protect(app, access, lambda: clock_ms() / 1000)
        app.add_routes([*door.routes(), *openai_door.routes()])
        app.on_response_prepare.append(_name_server)
        runner = web.AppRunner(
            app,
            access_log_class=AccessLog,
            shutdown_timeout=HANDLERS_CUT_S,
            keepalive_timeout=KEEP_ALIVE_S,
            lingering_time=LINGER_S,
        )
        stack.push_async_callback(engine.stop, GRACE_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.SockSite(runner, listener, backlog=BACKLOG)
        await site.start()
        stack.push_async_callback(leave)
        url = _url(settings.host, listener)
        data_dir.announce(url)
        # Soon, and not now: the first requests come before it.
        loop = asyncio.get_running_loop()
        warming = loop.call_later(WARM_UP_S, loop.run_in_executor, None, catalogue.load)
        stack.callback(warming.cancel)
        yield Gateway(
            url=url,
            access=access,
            data_dir=data_dir.path,
            workspace=workspace,
            token=token or None,
            token_is_new=token_is_new,
            profiles=profiles,
            catalogue=catalogue,
            log=log,
            engine=engine,
            recovered=recovered,
        )


def _given(
    settings: Settings,
    workspace: Path,
    masker: Masker,
    clock_ms: Callable[[], int],
    watchdog: Watchdog,
) -> Given:
    """Return what MCP servers get."""
    return Given(
        # What is set for tools goes to no server that was not given it.
        environment=child_environment(dataclasses.replace(settings, tool_env=())),
        folder=workspace,
        lookup=own_variable,
        masker=masker,
        clock_ms=clock_ms,
        watchdog=watchdog,
        tasks=set(),
    )


def _servers(settings: Settings, data_dir: DataDir, given: Given) -> Supervisor:
    """Return what keeps the MCP servers; raises BootError when a file of them is wrong."""
    files = ServerFiles(data_dir.path / FILE_NAME, _file(settings.mcp_config))
    return Supervisor(files, given)


def _services(
    settings: Settings, data_dir: DataDir, masker: Masker, servers: Supervisor
) -> Registry:
    """Return what keeps the services; raises BootError when a file of them is wrong."""
    files = ServiceFiles(data_dir.path / SERVICES_FILE_NAME, _file(settings.services_config))
    return Registry(files, own_variable, masker, servers.names)


def _own_tools(settings: Settings, workspace: Path, masker: Masker, watchdog: Watchdog) -> OwnTools:
    """Return what runs the Python functions of profiles."""
    environment = child_environment(dataclasses.replace(settings, tool_env=()))
    given = OwnGiven(environment, workspace, own_variable, masker, watchdog)
    return OwnTools(trust(settings), given)


def _file(named: str) -> Path | None:
    return Path(named).expanduser() if named else None


def _known(
    tools: Mapping[str, Tool],
    servers: Callable[[], Collection[str]],
    services: Callable[[], Collection[str]],
) -> Known:
    """Return what a profile may name."""
    arguments = {name: tool.input_schema.get("properties", {}) for name, tool in tools.items()}
    return Known(arguments, servers, services)


async def _name_server(_request: web.Request, response: web.StreamResponse) -> None:
    """Say who answers, and not with which versions."""
    response.headers["Server"] = "ownware"


class Requests:
    """The requests that have no answer yet."""

    def __init__(self) -> None:
        self._left = 0
        self._none = asyncio.Event()
        self._none.set()

    @web.middleware
    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count a request for as long as it takes, and answer it whatever goes wrong."""
        self._left += 1
        self._none.clear()
        try:
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it
            if openai.answers(request.path):
                return openai.answer_to(request, error)
            return native.answer_to(request, error)
        finally:
            self._left -= 1
            if not self._left:
                self._none.set()

    async def answered(self, timeout_s: float) -> None:
        """Wait until there is none, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()


async def _prune(log: Log, engine: Engine, settings: Settings) -> None:
    """Remove from the log what the settings let go, now and every so often."""
    policy = Retention(
        deltas_ms=settings.retention_deltas_days * DAY_MS or None,
        events_ms=settings.retention_days * DAY_MS or None,
        bytes_max=settings.retention_max_mb * 1_048_576 or None,
    )
    while policy != Retention():
        # In portions, each a transaction, so that nobody waits long for the log.
        if await log.prune(policy):
            engine.forget_conversations()
        else:
            await asyncio.sleep(PRUNE_EVERY_S)


class AccessLog(AbstractAccessLogger):
    """One line for each request, at level debug, the token masked."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Write the line; `time` is how long the answer took, in seconds."""
        path = auth.redact(request.path_qs)
        took_ms = time * 1000
        self.logger.debug(
            "%s %s %s %d %.1f ms", request.remote, request.method, path, response.status, took_ms
        )

    @property
    def enabled(self) -> bool:
        """Whether anybody reads it."""
        return self.logger.isEnabledFor(logging.DEBUG)


def _workspace(settings: Settings, data_dir: DataDir) -> Path:
    """Return the folder that tools work in; the gateway's own files must not lie in it."""
    folder = data_dir.workspace
    if settings.workspace:
        folder = Path(settings.workspace).expanduser().absolute()
        if data_dir.path.resolve().is_relative_to(folder.resolve()):
            raise BootError(
                f"The workspace {folder} contains the data directory {data_dir.path}: agents could "
                "read the token and every conversation. Choose another with --workspace."
            )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BootError(
            f"The workspace {folder} cannot be used: {error.strerror}. "
            "Choose another with --workspace."
        ) from error
    return folder


def _listen(settings: Settings) -> socket.socket:
    """Return a socket bound to the address of the settings; raises BootError when it is taken."""
    host, port = settings.host.removeprefix("[").removesuffix("]"), settings.port
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # `localhost` is both 127.0.0.1 and ::1 on most machines; people type the first.
        family, kind, protocol, _, address = min(found, key=lambda item: item[0])
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BootError(f"The address {host!r} cannot be used: {error.strerror}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise BootError(
            f"Port {port} on {host or 'all addresses'} cannot be used: {error.strerror}. "
            "Choose another with --port; --port 0 takes a free one."
        ) from error
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """Return an address that works from this machine."""
    name, port = listener.getsockname()[:2]
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - only compared
    name = everywhere.get(name, host if auth.is_loopback(host) and name != "::1" else name)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
