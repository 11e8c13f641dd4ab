"""The conversations that were used last, so that the next run need not read them again.

Nothing here is needed to be right: what is not kept is read from the log. Only runs that have ended
are kept, and they are let go when a thread is deleted or the log is pruned.
"""

from collections import OrderedDict
from typing import Final

from ownware_gateway.log import Log, Stream
from ownware_gateway.transcript import RunFacts, load

#: Runs that are kept, of all threads together; the threads longest unused are let go first.
RUNS_MAX: Final = 2_000


class Recent:
    """Folded histories of finished runs, by stream, and the number they reach to."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._kept: OrderedDict[Stream, tuple[int, list[RunFacts]]] = OrderedDict()
        self._runs = 0

    async def before(self, stream: Stream, seq: int) -> list[RunFacts]:
        """Return the stream's runs up to a number at which one ended, or 0 where none began."""
        if seq == 0:
            return []
        through, known = self._take(stream)
        if through == seq:
            return known
        return [*known, *await load(self._log, stream, after=through, to=seq)]

    def keep(self, stream: Stream, seq: int, history: list[RunFacts]) -> None:
        """Keep a history up to the end of its last run, unless it is heavy."""
        self._take(stream)
        if any(run.files for run in history) or len(history) > RUNS_MAX:
            return
        self._kept[stream] = (seq, history)
        self._runs += len(history)
        while self._runs > RUNS_MAX:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._runs -= len(oldest)

    def forget(self, thread_id: str) -> None:
        """Let go of a thread that is being deleted."""
        for stream in [stream for stream in self._kept if stream.thread_id == thread_id]:
            self._take(stream)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._runs = 0

    def _take(self, stream: Stream) -> tuple[int, list[RunFacts]]:
        through, known = self._kept.pop(stream, (0, []))
        self._runs -= len(known)
        return through, known
