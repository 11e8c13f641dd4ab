"""`ownware serve`, with named points where the process kills itself: run it with `-m`.

A point is reached by a wrapper around a part of the gateway; the gateway's own code knows nothing
of it. The file named by ARMED says at which one to die, and is removed at that moment, so that the
next process lives. `commit.before:text.delta` is a point of the groups that hold such an event.
"""

import json
import os
import runpy
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from ownware_gateway import app
from ownware_gateway.approvals import Approvals
from ownware_gateway.engine import Engine
from ownware_gateway.log.group import GroupConnection
from ownware_gateway.log.sqlite import SqliteLog
from ownware_gateway.log.tail import Tails
from ownware_gateway.tools import Context, Output, Tool

ARMED: Final = "RELIABILITY_ARMED"

P = ParamSpec("P")
T = TypeVar("T")


class Points:
    """Counts how often the armed point was passed, and dies there."""

    def __init__(self, armed: Path) -> None:
        self._armed = armed
        self._passes: Counter[str] = Counter()

    def passed(self, point: str) -> None:
        try:
            text = self._armed.read_text()
        except FileNotFoundError:
            return
        wanted = json.loads(text)
        if point != wanted["point"]:
            return
        self._passes[text] += 1
        if self._passes[text] == wanted["pass"]:
            self._armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            self.passed(f"{name}.before")
            result = await call(*args, **kwargs)
            self.passed(f"{name}.after")
            return result

        return wrapped

    def around_commits(self) -> None:
        """The group transaction: before it begins, before its COMMIT, after it."""
        whole = GroupConnection.executemany
        kinds: list[str] = []

        def passed(where: str) -> None:
            for kind in kinds:
                self.passed(f"commit.{where}:{kind}")

        def executemany(connection: GroupConnection, sql: str, group: Any, /) -> Any:
            if sql:
                return whole(connection, sql, group)
            kinds[:] = dict.fromkeys(kind for work in group for kind in getattr(work, "_types", ()))
            connection.set_trace_callback(
                lambda text: passed("within") if text == "COMMIT" else None
            )
            passed("before")
            done = whole(connection, sql, group)
            passed("after")
            return done

        GroupConnection.executemany = executemany  # type: ignore[method-assign]

    def around_publishing(self) -> None:
        add = Tails.add

        def added(tails: Tails, stream: Any, epoch: str, records: Any) -> None:
            kinds = dict.fromkeys(record.type for record in records)
            for kind in kinds:
                self.passed(f"publish.before:{kind}")
            add(tails, stream, epoch, records)
            for kind in kinds:
                self.passed(f"publish.after:{kind}")

        Tails.add = added  # type: ignore[method-assign, assignment]

    def around_tools(self) -> None:
        tools = app.tools

        def watched(tool: Tool) -> Tool:
            async def call(context: Context, arguments: dict[str, Any]) -> Output:
                return await self.around(f"tool:{tool.name}", tool.call)(context, arguments)

            return replace(tool, call=call)

        app.tools = lambda *given: {name: watched(tool) for name, tool in tools(*given).items()}

    def install(self) -> None:
        self.around_commits()
        self.around_publishing()
        self.around_tools()
        for owner, name in (
            (Engine, "start"),
            (Engine, "cancel"),
            (Engine, "recover"),
            (Engine, "begin"),
            (SqliteLog, "park"),
            (Approvals, "decide"),
        ):
            setattr(owner, name, self.around(name, getattr(owner, name)))


if __name__ == "__main__":
    Points(Path(os.environ[ARMED])).install()
    runpy.run_module("ownware_gateway", run_name="__main__", alter_sys=True)
