"""Keeps what one service offers: fetches its description, and again when it is old or was wrong."""

import asyncio
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from aiohttp.abc import AbstractResolver
from yarl import URL

from ownware_gateway.masking import Masker
from ownware_gateway.profile.services import Service, shown_url
from ownware_gateway.services import OfferedOperation, State
from ownware_gateway.services.call import Ways, call
from ownware_gateway.services.config import Filled, fill, secrets, spellings, variables
from ownware_gateway.services.fetch import (
    Documents,
    Fetcher,
    Unchanged,
    is_url,
    origin,
    policy,
    read_files,
)
from ownware_gateway.services.login import LoginState
from ownware_gateway.services.schema import Wrong
from ownware_gateway.services.spec import Operation, describe
from ownware_gateway.tools import Context, Output, Tool, ToolFailed

#: A description that is older is asked for again when a run begins, which does not wait for it.
FRESH_S: Final = 300.0

#: The pause after a failure, doubled each time up to the maximum.
RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 60.0

#: How long a whole description may take, with all that it refers to.
LOAD_S: Final = 60.0

#: Calls of one service at the same time; more wait.
CALLS_AT_ONCE_MAX: Final = 16

#: How long a call may take beyond its requests: two of its own, and two log-ins.
REQUESTS_OF_A_CALL: Final = 4
MARGIN_S: Final = 10.0

#: Values of log-ins that are masked: the last ones. An older one opens nothing any more.
LOGINS_HIDDEN_MAX: Final = 8

_SAFE: Final = frozenset({"GET", "HEAD"})
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE"})

_log: Final = logging.getLogger(__name__)


class Given(NamedTuple):
    """What every keeper works with; `lookup` reads a variable of the gateway's own environment."""

    lookup: Callable[[str], str | None]
    masker: Masker
    tasks: set[asyncio.Task[None]]
    resolver: AbstractResolver | None = None


class Keeper:
    """Keeps one service. Paths of files are relative to `folder`."""

    def __init__(self, name: str, settings: Service, folder: str, given: Given) -> None:
        self.name = name
        self.settings = settings
        self.folder = folder
        self.state: State = "stopped"
        self.error: str | None = None
        self.url: str | None = None
        self.offered: Sequence[OfferedOperation] = ()
        self.left_out: Sequence[str] = ()
        self._given = given
        self._tools: dict[str, Tool] = {}
        self._stamp: Any = None
        self._loaded_s: float | None = None
        self._retry_at_s = 0.0
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self._login: LoginState | None = None
        self._hidden: deque[set[str]] = deque()
        self._free = asyncio.Semaphore(CALLS_AT_ONCE_MAX)

    # -- what is known of it

    def tools(self) -> dict[str, Tool]:
        """Return its tools; while its description cannot be had again, those that it had."""
        return self._tools

    def unavailable(self) -> str | None:
        """Return why its tools cannot be used now, as a sentence; None when they can."""
        if self._loaded_s is not None:
            return None
        why = self.error or "its description has not been fetched"
        return f"The service {self.name!r} is not available: {why.rstrip('.')}."

    # -- its description

    def use(self) -> None:
        """Have its description fetched, unless it is fresh, or was wrong a moment ago."""
        now_s = asyncio.get_running_loop().time()
        old = self._loaded_s is None or now_s - self._loaded_s > FRESH_S
        # A file is looked at each time: that costs nothing.
        if (old or not is_url(self.settings.spec)) and now_s >= self._retry_at_s and not self._busy:
            if self._loaded_s is None:
                self.state = "loading"
            self._task = asyncio.get_running_loop().create_task(self._load())
            self._given.tasks.add(self._task)
            self._task.add_done_callback(self._given.tasks.discard)

    @property
    def _busy(self) -> bool:
        return self._task is not None and not self._task.done()

    async def settled(self) -> None:
        """Wait until it has been fetched once, or a file been looked at."""
        if self._task is not None and (self._loaded_s is None or not is_url(self.settings.spec)):
            # Whoever waits may be cancelled; others wait for the same.
            await asyncio.wait({self._task})

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(LOAD_S):
                await self._read()
        except Unchanged:
            pass
        except TimeoutError:
            return self._fail(f"its description took longer than {LOAD_S:g} s")
        except Wrong as error:
            return self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - whatever it holds, it must end nothing else
            _log.debug("the description of %s", self.name, exc_info=error)
            return self._fail(f"its description cannot be understood ({type(error).__name__})")
        self.state, self.error, self._failures = "ready", None, 0
        self._loaded_s = loop.time()
        return None

    def _fail(self, why: str) -> None:
        self._failures += 1
        pause_s = min(RETRY_S * 2 ** min(self._failures - 1, 16), RETRY_S_MAX)
        self._retry_at_s = asyncio.get_running_loop().time() + pause_s
        self.state = "failed"
        self.error = self._given.masker.text(why)
        _log.warning("the service %s: %s", self.name, self.error)

    async def _read(self) -> None:
        lookup = self._given.lookup
        missing = [name for name in variables(self.settings) if lookup(name) is None]
        if missing:
            raise Wrong(f"it needs variables that the gateway does not have: {', '.join(missing)}")
        filled = fill(self.settings, lookup)
        self._given.masker.hide(secrets(self.settings, filled, lookup))
        documents = await self._documents(filled)
        described = await asyncio.to_thread(
            describe, self.name, self.settings, documents.by_uri, documents.root
        )
        base = self._base(filled, described.url)
        ways = self._ways(filled, base)
        self.url = shown_url(base)
        self._stamp = documents.stamp
        self.left_out = described.left_out
        self._tools = {item.name: self._tool(ways, item) for item in described.operations}
        self.offered = [
            OfferedOperation(
                item.name, item.method, item.path, item.description, self._reads_only(item)
            )
            for item in described.operations
        ]

    async def _documents(self, filled: Filled) -> Documents:
        private = self.settings.allow_private
        if not is_url(filled.spec):
            return await asyncio.to_thread(read_files, Path(self.folder, filled.spec), self._stamp)
        # What the service is called with goes to no other server, if that has its description.
        own = not filled.url or origin(filled.url) == origin(filled.spec)
        headers = filled.headers if own else {}
        fetcher = Fetcher(policy([filled.spec], private=private), self._given.resolver, headers)
        return await fetcher.documents(filled.spec, self._stamp)

    def _base(self, filled: Filled, said: str | None) -> str:
        """Return where the service answers. Raises Wrong."""
        if not filled.url:
            if said is None:
                raise Wrong("its description does not say where it answers; set its 'url'")
            bound = self.settings.holds_secrets or self.settings.allow_private
            if is_url(filled.spec) and bound and origin(said) != origin(filled.spec):
                raise Wrong(
                    f"its description says that it answers at another server, {shown_url(said)}; "
                    "set its 'url' if that is meant"
                )
        base = filled.url or said or ""
        if set(base) & set("?#"):
            raise Wrong("its address has more than a path; 'inject' puts a value in the query")
        return base

    def _ways(self, filled: Filled, base: str) -> Ways:
        settings = self.settings
        urls = [base]
        login = None
        if filled.login is not None:
            own = filled.login.settings.url is None
            url = base.rstrip("/") + filled.login.url if own else filled.login.url
            urls.append(url)
            # What it gave holds for as long as its settings do.
            if self._login is None or self._login.url != url:
                self._login = LoginState(filled.login, url, self._hide)
            login = self._login
        return Ways(
            base=base,
            base_path=URL(base).raw_path,
            filled=filled,
            policy=policy(urls, private=settings.allow_private),
            resolver=self._given.resolver,
            login=login,
            timeout_s=settings.timeout / 1000,
        )

    def _hide(self, value: str) -> None:
        self._hidden.append(self._given.masker.hide(spellings({value})))
        if len(self._hidden) > LOGINS_HIDDEN_MAX:
            self._given.masker.forget(self._hidden.popleft())

    # -- its tools

    def _reads_only(self, operation: Operation) -> bool:
        return self.settings.trusted and operation.method in _SAFE

    def _tool(self, ways: Ways, operation: Operation) -> Tool:
        trusted = self.settings.trusted
        return Tool(
            name=operation.name,
            description=operation.description,
            input_schema=operation.input_schema,
            call=partial(self._call, ways, operation),
            reads_only=self._reads_only(operation),
            safe_to_repeat=trusted and operation.method in _IDEMPOTENT,
            timeout_s=REQUESTS_OF_A_CALL * ways.timeout_s + MARGIN_S,
            # That something is deleted is believed of anybody.
            exact=not trusted or operation.method == "DELETE",
            origin=_origin(self.name, ways.base, operation),
        )

    async def _call(
        self, ways: Ways, operation: Operation, _context: Context, arguments: dict[str, Any]
    ) -> Output:
        try:
            async with self._free:
                return await call(ways, operation, arguments, self._given.masker.cut)
        except ToolFailed as error:
            raise ToolFailed(f"The service {self.name!r}: {error}") from None


def _origin(name: str, base: str, operation: Operation) -> str:
    """Return what tells an operation from another of the same name: where and how it is called."""
    reached = [name, base, operation.method, operation.path, operation.wire_name]
    return hashlib.sha256(json.dumps(reached).encode()).hexdigest()[:16]
