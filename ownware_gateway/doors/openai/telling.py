"""Tells what a run says: a completion or a response, as it comes or when it is whole."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final, NamedTuple, Protocol

from aiohttp import web

from ownware_gateway import sse
from ownware_gateway.auth import LIMITED
from ownware_gateway.doors.openai.chunks import (
    DONE,
    Answer,
    Frames,
    Shape,
    Whole,
    completion_id,
)
from ownware_gateway.doors.openai.errors import Failed, Wrong
from ownware_gateway.doors.openai.readers import Readers, Reading
from ownware_gateway.engine import options_of
from ownware_gateway.errors import GatewayError
from ownware_gateway.log import Chunk, Gone, Log, Run
from ownware_gateway.models import Options
from ownware_gateway.stream import CaughtUp, Silence, Streamer, check_cursor, parse_cursor

_GONE: Final = Wrong(410, "thread_deleted", "The run's events are not kept any more.")
_LEAVING: Final = Wrong(
    503, "shutting_down", "The gateway is shutting down; the run goes on at its next start."
)


class Told(NamedTuple):
    """A completion that is to be told, and what is known of its run without a look at the log."""

    reading: Reading
    run: Run | None = None
    options: Options | None = None


class Taking(Protocol):
    """An answer that is told when it is whole; `wrong` is why there is none."""

    wrong: Wrong | None

    @property
    def answer(self) -> Answer:
        """How far it is."""
        ...

    def take(self, sent: sse.Sent) -> None:
        """Take the next event."""
        ...


class Framing(Protocol):
    """An answer that is told as it comes; `finished` once it came to an end that is of use."""

    @property
    def answer(self) -> Answer:
        """How far it is."""
        ...

    @property
    def finished(self) -> bool:
        """Whether a client got all there is to it."""
        ...

    def of(self, sent: sse.Sent) -> bytes:
        """Return the frames that an event becomes. May raise Failed."""
        ...

    def failure(self, wrong: Wrong) -> bytes:
        """Return the frame for a stream that ends before the answer does."""
        ...


class Telling:
    """What tells it. While somebody reads a run, it is known to the readers."""

    def __init__(self, log: Log, streamer: Streamer, readers: Readers) -> None:
        self._log = log
        self._streamer = streamer
        self._readers = readers

    async def respond(
        self,
        request: web.Request,
        told: Told,
        *,
        stream: bool,
        headers: Mapping[str, str] | None = None,
        seen: tuple[int, int] = (0, 0),
    ) -> web.StreamResponse:
        """Send a completion, as it comes or when it is whole."""
        run, shape = await self.known(told)
        after = run.start_seq if told.reading.after is None else told.reading.after
        sent = {"X-Run-Id": run.id, **(headers or {})}
        if not stream:
            whole = Whole(shape)
            await self.read_whole(request, run, whole, after)
            return web.json_response(whole.body(), headers=sent, dumps=dumps)
        return await self.stream(request, run, Frames(shape, seen), after, sent)

    async def stream(
        self, request: web.Request, run: Run, frames: Framing, after: int, headers: dict[str, str]
    ) -> web.StreamResponse:
        """Send frames as they come."""
        finished = False
        self._readers.enter(run)
        try:
            pieces = self._pieces(frames, run, after)
            response, taken = await self._streamer.relay(request, pieces, headers)
            finished = taken and frames.finished
        finally:
            self._readers.leave(run, finished=finished, once=await self._is_once(run))
        return response

    async def read_whole(self, request: web.Request, run: Run, whole: Taking, after: int) -> None:
        """Have an answer taken up to its end; raises Failed when there is none."""
        finished = False
        self._readers.enter(run)
        try:
            await self._streamer.while_there(request, self.read(whole, run, after))
            finished = True
        finally:
            self._readers.leave(run, finished=finished, once=await self._is_once(run))
        if whole.wrong is not None:
            raise Failed(whole.wrong, run.id)

    async def forsake(self, run: Run) -> None:
        """Have a run that is for nobody else end, if it does not by itself: nobody reads it."""
        self._readers.enter(run)
        self._readers.leave(run, finished=False, once=await self._is_once(run))

    async def read(self, whole: Taking, run: Run, after: int) -> None:
        """Have an answer take events up to its end. May raise Failed."""
        async with aclosing(self._chunks(run, after, whole.answer)) as chunks:
            async for chunk in chunks:
                for sent in sse.split(chunk.data if chunk is not None else b""):
                    whole.take(sent)
                    if whole.answer.over:
                        return

    async def _is_once(self, run: Run) -> bool:
        thread = await self._log.thread(run.thread_id)
        return thread is not None and thread.hidden

    async def _pieces(self, frames: Framing, run: Run, after: int) -> AsyncGenerator[bytes, None]:
        """Yield what goes to the client, up to the end."""
        try:
            async with aclosing(self._chunks(run, after, frames.answer)) as chunks:
                async for chunk in chunks:
                    if chunk is None:
                        yield sse.KEEP_ALIVE
                    elif piece := _frames_of(frames, chunk):
                        yield piece
                    if frames.answer.over:
                        break
        except Failed as failed:
            yield frames.failure(failed.wrong)
        yield DONE

    async def _chunks(
        self, run: Run, after: int, answer: Answer
    ) -> AsyncGenerator[Chunk | None, None]:
        """Yield the log's chunks, None after a silence; raises Failed where they end too early."""
        try:
            async with aclosing(self._streamer.follow(run.stream, after)) as following:
                async for item in following:
                    match item:
                        case Chunk():
                            await self.bring_arguments(run, item, answer)
                            yield item
                            after = item.last_seq
                        case Silence():
                            yield None
                        case CaughtUp():
                            pass
                    # Whoever has read the end does not ask for more.
                    if isinstance(item, CaughtUp) or (isinstance(item, Chunk) and item.ends_run):
                        now = await self._log.run(run.id)
                        if now is None or (now.end_seq is not None and after >= now.end_seq):
                            raise Failed(_GONE, run.id)
        except Gone:
            raise Failed(_GONE, run.id) from None
        raise Failed(_LEAVING, run.id)

    async def bring_arguments(self, run: Run, chunk: Chunk, answer: Answer) -> None:
        """Give an answer what the model wrote for the client; raises Failed if it is not kept."""
        if b"\nevent: client.call\n" not in chunk.data:
            return
        for sent in sse.split(chunk.data):
            if sent.type == b"client.call":
                asked = json.loads(sent.data)
                exact = await self._log.private_at(run.stream, asked["seq"], "calls")
                if exact is None:
                    raise Failed(_GONE, run.id)
                answer.exact[asked["requestId"]] = json.loads(exact)

    async def known(self, told: Told) -> tuple[Run, Shape]:
        """Return a completion's run, and how it is told. Raises GatewayError `run_not_found`."""
        reading, run, options = told
        run = run or await self._log.run(reading.run_id)
        if run is None:
            raise GatewayError("run_not_found", "There is no such run.")
        seq = run.start_seq if reading.after is None else reading.after
        door = (options or await options_of(self._log, run, to=seq + 1)).door or {}
        return run, Shape(
            id=completion_id(run.id, reading.after),
            run_id=run.id,
            model=door.get("model", run.profile_id),
            created=run.accepted_at // 1000,
            include_usage=door.get("include_usage", False),
            json=door.get("json", False),
            has_tools=door.get("has_tools", True),
            brought=door.get("brought", 0),
        )

    async def seen(self, run: Run, cursor: str) -> tuple[int, int]:
        """Return the place that `<epoch>.<seq>.<k>` names. Raises GatewayError."""
        event, _, number = cursor.rpartition(".")
        if not event or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise GatewayError("cursor_invalid", "A cursor is the id of a frame of this stream.")
        head = await self._log.head(run.stream)
        assert head is not None, run
        seq = check_cursor(parse_cursor(event), head)
        if seq <= run.start_seq or (run.end_seq is not None and seq > run.end_seq):
            raise GatewayError("cursor_mismatch", "The cursor is outside of this completion's run.")
        return seq, int(number)


def check_limited(request: web.Request) -> None:
    """Raise GatewayError for a reconnect that comes too often: only a native stream says so."""
    if (limited := request.get(LIMITED)) is not None:
        raise GatewayError("rate_limited", "Too many requests.", retry_after_s=limited)


def _frames_of(frames: Framing, chunk: Chunk) -> bytes:
    pieces = []
    for sent in sse.split(chunk.data):
        pieces.append(frames.of(sent))
        if frames.answer.over:
            break
    return b"".join(pieces)


def dumps(value: Any) -> str:
    """Return it as JSON, what is no text replaced."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Half a character, of a provider that cut one in two.
    return text.encode("utf-8", "replace").decode()
