"""A connection to one MCP server: the only code that knows the SDK, imported on first use.

The protocol is the SDK's. The process and its pipes are ours: the SDK's own way to start a server
gives it more of the environment than is configured, keeps lines of any length, and logs each line
that is no message.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final, Self

import anyio
import httpx2
import mcp_types as types
from mcp.client.session import ClientSession
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import listen
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage

from ownware_gateway import __version__
from ownware_gateway.mcp.child import ENDS_BYTES, MESSAGE_BYTES_MAX, Child, TooLong
from ownware_gateway.mcp.config import Launch
from ownware_gateway.mcp.keeper import Attention, Lost, Means
from ownware_gateway.mcp.results import output
from ownware_gateway.tools import Output, ToolFailed

#: Pages of one list of tools, and how many tools are enough: far more than are taken.
LIST_PAGES_MAX: Final = 50
LISTED_MAX: Final = 1_000

#: How long a server may take for whatever is no call, and to say that it is there.
REQUEST_S: Final = 30.0
PING_S: Final = 10.0

#: What a server may write unasked within a window before it is given up: whatever is no answer.
UNASKED_WINDOW_S: Final = 10.0
UNASKED_LINES_MAX: Final = 5_000
UNASKED_BYTES_MAX: Final = 64 * 1_048_576

#: How long a connection to a server may take, and how long one that is open may say nothing: calls
#: have limits of their own, and in between a server has nothing to say for as long as it likes.
CONNECT_S: Final = 30.0
SILENCE_S: Final = 365 * 86_400.0

#: How long a server may take to hear that the session is over.
GOODBYE_S: Final = 2.0

#: Lines of progress of one call that are passed on.
PROGRESS_LINES_MAX: Final = 100

#: How long a request may take to be sent, beside the time that its answer may take.
SEND_S: Final = 2.5

#: The end that names what a message answers: the first field of most servers, the last of some.
_ID_FIRST: Final = re.compile(
    rb'\s*\{\s*"jsonrpc"\s*:\s*"2\.0"\s*,\s*"id"\s*:\s*([0-9]{1,18})\s*,\s*"(?:result|error)"'
)
_ID_LAST: Final = re.compile(rb'"id"\s*:\s*([0-9]{1,18})\s*\}\s*$')

#: What the SDK says when the server has forgotten the session, see its `streamable_http`.
_FORGOTTEN: Final = "Session terminated"

for _name in ("mcp", "client"):
    # It logs, with a traceback, whatever a server does wrong. What matters is in the status.
    logging.getLogger(_name).setLevel(logging.CRITICAL)

_Streams = tuple[Any, Any]


class Session:
    """An open connection."""

    def __init__(self, inner: "_Inner", attention: Attention) -> None:
        self._inner = inner
        self.attention = attention

    @property
    def version(self) -> str | None:
        """The version of the protocol that is spoken."""
        return self._inner.protocol_version

    async def list_tools(self) -> list[dict[str, Any]]:
        """Return the server's tools as `tools/list` gives them. Raises Lost."""
        tools: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(LIST_PAGES_MAX):
            params = types.PaginatedRequestParams(cursor=cursor) if cursor else None
            try:
                page = await self._inner.list_tools(params=params)
            except MCPError as error:
                if error.code == types.METHOD_NOT_FOUND and not tools:
                    return []
                raise Lost(f"did not list its tools: {error.message}") from error
            except ValueError as error:
                raise Lost("gave a list of tools that is none") from error
            dump = [tool.model_dump(mode="json", by_alias=True) for tool in page.tools]
            tools += dump
            cursor = page.next_cursor
            if cursor is None or len(tools) > LISTED_MAX:
                return tools
        raise Lost(f"has more than {LIST_PAGES_MAX} pages of tools")

    async def ping(self) -> None:
        """Return when the server has said that it is there. Raises Lost when it does not."""
        send = self._inner.send_request
        try:
            if self._inner.discover_result is None:
                await send(types.PingRequest(), types.EmptyResult, PING_S)
            else:
                # There is no ping any more from 2026-07-28 on.
                await send(types.ListToolsRequest(), types.ListToolsResult, PING_S)
        except MCPError as error:
            if error.code in (types.REQUEST_TIMEOUT, types.CONNECTION_CLOSED):
                raise Lost("does not answer") from error
        except ValueError:
            # An answer all the same.
            pass

    async def call(
        self,
        name: str,
        arguments: dict[str, Any],
        timeout_s: float,
        progress: Callable[[str], None],
    ) -> Output:
        """Call a tool. Raises ToolFailed in words that follow the server's name."""
        told = _Progress(progress)
        try:
            # The SDK's own limit begins when the request is sent, which may never be.
            async with asyncio.timeout(timeout_s + SEND_S):
                result = await self._inner.call_tool(
                    name, arguments, timeout_s, told, allow_input_required=True
                )
        except asyncio.CancelledError as error:
            # The SDK's scopes can leave one that is its own context: whoever follows that, as an
            # ExitStack does, would never come to its end.
            error.__context__ = None
            raise
        except MCPError as error:
            raise ToolFailed(self._said(error, timeout_s)) from error
        except TimeoutError:
            raise ToolFailed(self._late(timeout_s)) from None
        except ValueError as error:
            raise ToolFailed("gave an answer that is not one of the protocol.") from error
        if isinstance(result, types.InputRequiredResult):
            raise ToolFailed(
                "asks for something in between (a person's input, a model's answer, folders), "
                "which this gateway does not give."
            )
        given = result.model_dump(mode="json", by_alias=True)
        return output(given)

    def _said(self, error: MCPError, timeout_s: float) -> str:
        if error.code == types.REQUEST_TIMEOUT:
            return self._late(timeout_s)
        if error.code == types.CONNECTION_CLOSED:
            why = self.attention.lost or "closed the connection"
            return (
                f"went away during the call: it {why}. The call may have had its effect, in whole "
                "or in part. The server is being started again."
            )
        if error.message == _FORGOTTEN:
            self.attention.lose("has forgotten the session")
            return "was started anew and did nothing; it is being connected again."
        if error.code == types.HEADER_MISMATCH:
            # What was known of the tool is not true any more.
            self.attention.list_changed = True
            self.attention.news.set()
        return f"answered with an error: {error.message.rstrip('.')}."

    def _late(self, timeout_s: float) -> str:
        self.attention.doubt()
        return (
            f"did not answer within {timeout_s:g} s. The call was given up; it may have had its "
            "effect, in whole or in part."
        )


class _Progress:
    """Passes a server's progress on as lines, and not without end."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told = 0

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:
        self._told += 1
        if self._told > PROGRESS_LINES_MAX:
            return
        far = f"{progress:g}" if total is None else f"{progress:g} of {total:g}"
        self._tell(f"{message} ({far})" if message else far)


class _Inner(ClientSession):
    """The SDK's session without its check of results.

    That would run a schema of the server's, with patterns that may take for ever, over what the
    server itself has made.
    """

    async def validate_tool_result(self, name: str, result: types.CallToolResult) -> None:
        """Take the result as it is."""


async def serve(
    launch: Launch,
    means: Means,
    attention: Attention,
    use: Callable[[Session], Awaitable[None]],
) -> None:
    """Connect to a server, or start it, and keep the connection for as long as `use` takes.

    `attention` ends it from any task: the SDK's contexts must be left by the task that has
    entered them, and by no cancellation but their own. Raises Lost when the server cannot be
    reached or speaks something else, and ExceptionGroup when a connection of the SDK breaks.
    """
    with anyio.CancelScope() as scope:
        attention.on_leave(scope.cancel)
        async with _streams(launch, means, attention) as (read, write):
            await _speak(_Noticing(read, attention), write, attention, use)


async def _speak(
    read: Any, write: Any, attention: Attention, use: Callable[[Session], Awaitable[None]]
) -> None:
    async def on_message(message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            attention.list_changed = True
            attention.news.set()

    async with (
        _Inner(
            read,
            write,
            read_timeout_seconds=REQUEST_S,
            message_handler=on_message,
            client_info=types.Implementation(name="ownware-gateway", version=__version__),
        ) as inner,
        anyio.create_task_group() as group,
    ):
        try:
            await _negotiate(inner, attention)
        except MCPError as error:
            status = f" (HTTP {attention.refused_with})" if attention.refused_with else ""
            why = f"could not begin: {error.message.rstrip('.')}{status}"
            raise Lost(attention.lost or why) from error
        except (RuntimeError, ValueError) as error:
            raise Lost("speaks no version of the protocol that is known here") from error
        if inner.discover_result is not None:
            group.start_soon(_listen, inner)
        await use(Session(inner, attention))
        group.cancel_scope.cancel()


async def _negotiate(inner: ClientSession, attention: Attention) -> None:
    """Find out what the server speaks: what is new if it does, else what was before."""
    try:
        await inner.discover()
    except (MCPError, RuntimeError, ValueError):
        if attention.lost is not None:
            raise
        try:
            await inner.initialize()
        except MCPError as error:
            if error.code != types.UNSUPPORTED_PROTOCOL_VERSION:
                raise
            # It was slow, and took the first question after all.
            await inner.discover()


async def _listen(inner: ClientSession) -> None:
    """Have the server say when its list of tools changes, where that must be asked for.

    What it says reaches the session's handler of messages.
    """
    with contextlib.suppress(MCPError, RuntimeError, TimeoutError):
        async with listen(inner, tools_list_changed=True) as changes:
            async for _ in changes:
                pass


class _Noticing:
    """A stream of what the server says that notices its end."""

    def __init__(self, inner: Any, attention: Attention) -> None:
        self._inner = inner
        self._attention = attention

    @property
    def last_context(self) -> Any:
        """What the SDK keeps beside a message."""
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        """Return the next message."""
        try:
            message: SessionMessage | Exception = await self._inner.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            self._attention.lose("closed the connection")
            raise
        return message

    async def aclose(self) -> None:
        """Let go of it."""
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


def _streams(
    launch: Launch, means: Means, attention: Attention
) -> contextlib.AbstractAsyncContextManager[_Streams]:
    match launch.settings.transport:
        case "stdio":
            return _local(launch, means, attention)
        case "http":
            return _over_http(launch, attention)
        case "sse":
            return sse_client(
                launch.url,
                headers=dict(launch.headers),
                timeout=CONNECT_S,
                sse_read_timeout=SILENCE_S,
                httpx_client_factory=partial(_client, attention),
            )


@contextlib.asynccontextmanager
async def _over_http(launch: Launch, attention: Attention) -> AsyncIterator[_Streams]:
    timeout = httpx2.Timeout(CONNECT_S, read=SILENCE_S)
    async with (
        _client(attention, dict(launch.headers), timeout) as client,
        streamable_http_client(
            launch.url, http_client=client, max_sse_event_size=MESSAGE_BYTES_MAX
        ) as streams,
    ):
        yield streams


def _client(
    attention: Attention,
    headers: dict[str, str] | None = None,
    timeout: httpx2.Timeout | None = None,
    auth: httpx2.Auth | None = None,
) -> httpx2.AsyncClient:
    """Return an HTTP client with a limit on answers, which asks no environment for proxies."""
    return httpx2.AsyncClient(
        headers={**(headers or {}), "Accept-Encoding": "identity"},
        timeout=timeout,
        auth=auth,
        transport=_Measured(attention),
        trust_env=False,
    )


class _Measured(httpx2.AsyncHTTPTransport):
    """The HTTP transport, with a limit on answers that are not streams of events.

    A compressed answer is refused: it may be of any size when it is not.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(trust_env=False)
        self._attention = attention

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and return its answer, measured while it is read."""
        if request.method == "DELETE":
            # The end of a session, for which nobody waits long.
            request.extensions["timeout"] = httpx2.Timeout(GOODBYE_S).as_dict()
        response = await super().handle_async_request(request)
        if response.status_code >= 400:
            self._attention.refused_with = response.status_code
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.DecodingError("The answer is compressed.", request=request)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _MeasuredStream(response.stream)
        return response


class _MeasuredStream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream) -> None:
        self._inner = inner

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._inner:
            size += len(piece)
            if size > MESSAGE_BYTES_MAX:
                # A kind of error that the SDK turns into the answer to the one request.
                raise httpx2.StreamError(_too_long(size))
            yield piece

    async def aclose(self) -> None:
        await self._inner.aclose()


def _too_long(size_bytes: int) -> str:
    return f"the answer has {size_bytes} bytes or more, {MESSAGE_BYTES_MAX} are allowed"


# -- a local server


@contextlib.asynccontextmanager
async def _local(launch: Launch, means: Means, attention: Attention) -> AsyncIterator[_Streams]:
    """Start a server and speak with it over its pipes, a line for each message."""
    command = launch.settings.command
    assert command is not None, launch.settings
    environment = {**means.environment, **launch.env}
    try:
        child = await Child.start(
            [command, *launch.args], environment, means.folder, means.watchdog
        )
    except FileNotFoundError as error:
        raise Lost(f"cannot be started: there is no program {command!r}") from error
    except (OSError, ValueError) as error:
        raise Lost("cannot be started: the system refuses its command") from error
    means.started(child)
    to_session, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    write, from_session = anyio.create_memory_object_stream[SessionMessage](0)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_guarded, _read_from(child, to_session, attention))
            group.start_soon(_guarded, _write_to(child, from_session))
            try:
                yield read, write
            finally:
                group.cancel_scope.cancel()
    finally:
        for stream in (to_session, read, write, from_session):
            stream.close()
        with anyio.CancelScope(shield=True):
            await child.close()


async def _guarded(work: Awaitable[None]) -> None:
    # Whichever side goes first: the other one is told by the end of the stream.
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        await work


async def _read_from(child: Child, to_session: Any, attention: Attention) -> None:
    unasked = _Unasked(asyncio.get_running_loop().time)
    async with to_session:
        while (line := await child.read()) is not None:
            message = _understand(line)
            if not isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
                size = line.size_bytes if isinstance(line, TooLong) else len(line)
                if unasked.add(size):
                    attention.lose("wrote too much that nobody asked for to its standard output")
                    return
            if message is not None:
                await to_session.send(SessionMessage(message))
        attention.lose(await child.ended())


def _understand(line: bytes | TooLong) -> types.JSONRPCMessage | None:
    """Return the message that a line is, if it is one."""
    if isinstance(line, TooLong):
        found = _ID_FIRST.match(line.head) or _ID_LAST.search(line.tail)
        if found is None:
            return None
        error = types.ErrorData(code=types.INTERNAL_ERROR, message=_too_long(line.size_bytes))
        return types.JSONRPCError(jsonrpc="2.0", id=int(found[1]), error=error)
    # Many servers write a word to people there, though it is not the place.
    if not line[:ENDS_BYTES].lstrip().startswith(b"{"):
        return None
    try:
        return types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError:
        return None


class _Unasked:
    """Counts what comes unasked, in windows of time."""

    def __init__(self, time_s: Callable[[], float]) -> None:
        self._time_s = time_s
        self._began_s = time_s()
        self._lines = 0
        self._bytes = 0

    def add(self, size_bytes: int) -> bool:
        """Count a line; return whether it is too much."""
        now_s = self._time_s()
        if now_s - self._began_s > UNASKED_WINDOW_S:
            self._began_s, self._lines, self._bytes = now_s, 0, 0
        self._lines += 1
        self._bytes += size_bytes
        return self._lines > UNASKED_LINES_MAX or self._bytes > UNASKED_BYTES_MAX


async def _write_to(child: Child, from_session: Any) -> None:
    async with from_session:
        with contextlib.suppress(BrokenPipeError):
            async for item in from_session:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                await child.write(text.encode())
