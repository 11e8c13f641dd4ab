"""Fetching the description of a service: the document, and those that it refers to."""

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from aiohttp.abc import AbstractResolver
from yarl import URL

from ownware_gateway.outbound import (
    WEB_PORTS,
    Limits,
    NotReached,
    Outbound,
    Policy,
    Refused,
    Request,
)
from ownware_gateway.profile.services import shown_url
from ownware_gateway.services.schema import Wrong

#: How large the documents of one description may be together; YAML is slow to read.
SPEC_BYTES_MAX: Final = 8 * 1024 * 1024
YAML_BYTES_MAX: Final = 2 * 1024 * 1024
DOCUMENTS_MAX: Final = 32

#: How long one document may take.
SPEC_TIMEOUT_S: Final = 20.0

#: What no service is reached at, whatever is allowed: where clouds hand out credentials to whoever
#: asks from the inside, most of them link-local.
NEVER: Final = tuple(
    map(
        ip_network,
        (
            *("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254/128"),
            *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        ),
    )
)


class Documents(NamedTuple):
    """A description: its documents by their addresses, and that of the first.

    `stamp` tells whether it has changed: the server's word for this version, or the times and sizes
    of the files.
    """

    by_uri: Mapping[str, Any]
    root: str
    stamp: Any


class Unchanged(Exception):
    """The description is what it was."""


def policy(urls: list[str], *, private: bool) -> Policy:
    """Return where requests may go for these addresses of a service. Raises Wrong."""
    hosts: set[tuple[str, int]] = set()
    for text in urls:
        try:
            url = URL(text)
            host, port = (url.raw_host or "").removesuffix("."), url.port
        except ValueError:
            raise Wrong("an address of it is none") from None
        if not host or port is None:
            raise Wrong("an address of it names no host")
        hosts.add((host, port))
    # The operator names the port with the address.
    ports = WEB_PORTS | {port for _, port in hosts}
    return Policy(ports=ports, hosts=frozenset(hosts if private else ()), never=NEVER)


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return what two addresses of one server have in common. Raises Wrong."""
    try:
        parts = URL(url)
        return parts.scheme, parts.raw_host, parts.port
    except ValueError:
        raise Wrong(f"{shown_url(url)[:200]} is no address") from None


def is_url(spec: str) -> bool:
    """Whether a description is fetched, and not read from a file."""
    return spec.startswith(("http://", "https://"))


# -- over HTTP


class Fetcher(NamedTuple):
    """How documents are fetched: where they may be, how names are looked up, and the headers."""

    policy: Policy
    resolver: AbstractResolver | None
    headers: Mapping[str, str]

    async def documents(self, spec: str, stamp: Any) -> Documents:
        """Return a description, if it is not the one of the stamp. Raises Unchanged, Wrong."""
        limits = Limits(bytes_max=SPEC_BYTES_MAX, total_s=SPEC_TIMEOUT_S)
        async with Outbound(self.policy, limits, self.resolver) as outbound:
            text, root, tag = await self._one(outbound, spec, stamp, self.headers)
            found = {root: await asyncio.to_thread(parse, text, root)}
            size = len(text)
            while wanted := await asyncio.to_thread(_wanted, found):
                uri = wanted[0]
                _check_count(found)
                if origin(uri) != origin(root):
                    raise Wrong(f"it refers to another server: {shown_url(uri)[:200]}")
                # The first may have come by a redirect, whose server is given nothing.
                own = origin(uri) == origin(spec)
                text, _, _ = await self._one(outbound, uri, None, self.headers if own else {})
                size += len(text)
                if size > SPEC_BYTES_MAX:
                    raise Wrong(f"it has more than {SPEC_BYTES_MAX} bytes")
                found[uri] = await asyncio.to_thread(parse, text, uri)
        # Only the first is asked for by its tag: what it refers to may change with it as well.
        return Documents(found, root, tag if len(found) == 1 else None)

    async def _one(
        self, outbound: Outbound, uri: str, stamp: Any, given: Mapping[str, str]
    ) -> tuple[bytes, str, str | None]:
        headers = {"Accept": "application/json, application/yaml;q=0.9, */*;q=0.5"} | {**given}
        if isinstance(stamp, str):
            headers["If-None-Match"] = stamp
        where = shown_url(uri)[:200]
        try:
            async with outbound.open(Request(uri, headers=headers)) as response:
                if response.status == 304 and stamp is not None:
                    raise Unchanged
                if response.status != 200:
                    raise Wrong(f"{where} answered HTTP {response.status}")
                data, is_whole = await outbound.read(response)
                if not is_whole:
                    raise Wrong(f"{where} has more than {SPEC_BYTES_MAX} bytes")
                return data, str(response.url), response.headers.get("ETag")
        except NotReached as error:
            why = str(error).rstrip(".")
            if isinstance(error, Refused) and not self.policy.hosts:
                why += ". What is on this machine or in a private network wants 'allowPrivate'"
            raise Wrong(f"{where} was not reached: {why}") from None


# -- from files


def read_files(path: Path, stamp: Any) -> Documents:
    """Return a description, if it is not the one of the stamp. Raises Unchanged, Wrong."""
    try:
        path = path.resolve()
        if stamp is not None and stamp == _stamp([Path(name) for name, *_ in stamp]):
            raise Unchanged
        root = path.as_uri()
        files = {root: path}
        found = {root: _read(path, root)}
        while wanted := _wanted(found):
            uri = wanted[0]
            _check_count(found)
            other = Path(unquote(urlsplit(uri).path)).resolve()
            if not uri.startswith("file:") or not other.is_relative_to(path.parent):
                raise Wrong(f"it refers to what does not lie beside it: {uri[:200]}")
            files[uri] = other
            found[uri] = _read(other, uri)
        return Documents(found, root, _stamp(list(files.values())))
    except OSError as error:
        raise Wrong(f"the file {path} cannot be read: {error.strerror}") from None


def _read(path: Path, uri: str) -> Any:
    with open(path, "rb", opener=_at_once) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise Wrong(f"{path} is not a regular file")
        data = opened.read(SPEC_BYTES_MAX + 1)
    if len(data) > SPEC_BYTES_MAX:
        raise Wrong(f"the file {path} has more than {SPEC_BYTES_MAX} bytes")
    return parse(data, uri)


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting, as for the other end of a named pipe, which may never come."""
    return os.open(path, flags | os.O_NONBLOCK)


def _stamp(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    found = []
    for path in files:
        state = path.stat()
        found.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(found)


# -- what they hold


def parse(data: bytes, uri: str) -> Any:
    """Return what a document holds, JSON or YAML. Raises Wrong."""
    where = shown_url(uri)[:200]
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip()[:1] in ("{", "["):
            return json.loads(text)
        if len(data) > YAML_BYTES_MAX:
            raise Wrong(f"{where} is YAML of more than {YAML_BYTES_MAX} bytes; make it JSON")
        return _parse_yaml(text)
    except (ValueError, RecursionError):
        raise Wrong(f"{where} is neither JSON nor YAML that can be read") from None


def _parse_yaml(text: str) -> Any:
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # A date stays the text that it is: JSON has none.
    plain = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in base.yaml_implicit_resolvers.items()
    }
    loader = type("_Plain", (base,), {"yaml_implicit_resolvers": plain})
    try:
        return yaml.load(text, loader)  # noqa: S506 - it is the safe one, without dates
    except yaml.YAMLError as error:
        raise ValueError from error


def _check_count(found: Mapping[str, Any]) -> None:
    if len(found) >= DOCUMENTS_MAX:
        raise Wrong(f"it is more than {DOCUMENTS_MAX} documents")


def _wanted(found: Mapping[str, Any]) -> list[str]:
    """Return the addresses of documents that are referred to and not there yet."""
    wanted: dict[str, None] = {}
    for uri, document in found.items():
        for ref in _references(document):
            target = urldefrag(urljoin(uri, ref)).url
            if target not in found:
                wanted[target] = None
    return list(wanted)


def _references(document: Any) -> set[str]:
    """Return the references to other documents in one."""
    refs: set[str] = set()
    left, seen = [document], set()
    while left:
        value = left.pop()
        if not isinstance(value, dict | list) or id(value) in seen:
            continue  # YAML has parts that are in several places, in themselves even.
        seen.add(id(value))
        if isinstance(value, dict):
            ref = value.get("$ref")
            if isinstance(ref, str) and not ref.startswith("#"):
                refs.add(ref)
            left.extend(value.values())
        else:
            left.extend(value)
    return refs
