"""HTML as text that can be read: the title, and what the page is about in a kind of Markdown.

It is made in a child process with limits on its time and memory. A page is written by strangers,
and every parser there is can be kept busy for minutes by two megabytes that were made for it; some
of those in C can be made to crash. A child can be stopped, and takes nothing else down.
"""

import asyncio
import json
import re
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import urljoin

from ownware_gateway.tools import ToolFailed

#: How long a page may take to be made readable, and how much memory.
TIME_S: Final = 10.0
MEMORY_BYTES: Final = 1024 * 1024 * 1024

#: Most characters of text; links are longer than they stand in the page.
TEXT_CHARS_MAX: Final = 2_000_000

TITLE_CHARS_MAX: Final = 200
LINK_CHARS_MAX: Final = 500
LIST_DEPTH_MAX: Final = 8

#: A `main` or `article` with less text than this is not what the page is about.
MAIN_CHARS_MIN: Final = 200

#: Elements whose text nobody reads, and those that stand around a page's own.
_LEFT_OUT: Final = frozenset(
    {
        *("script", "style", "noscript", "template", "svg", "math", "iframe"),
        *("object", "canvas", "audio", "video", "select", "button", "textarea"),
        *("nav", "footer", "aside", "dialog"),
    }
)
_MAIN: Final = frozenset({"main", "article"})
_HEADINGS: Final = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS: Final = frozenset(
    {
        *("p", "div", "section", "article", "main", "header", "form"),
        *("fieldset", "figure", "figcaption", "blockquote", "address", "details", "summary"),
        *("dl", "dd", "dt", "ul", "ol", "table", "caption"),
        *("thead", "tbody", "tfoot", "hgroup", "body"),
    }
)
#: What the child process runs. It sees the standard library and this package alone.
_CHILD: Final = (
    "import sys; sys.path.append(sys.argv[1]);"
    "from ownware_gateway.tools.readable import read_in_child; read_in_child()"
)


async def readable(
    html: str, address: str, environment: Mapping[str, str], time_limit_s: float = TIME_S
) -> tuple[str, str]:
    """Return a page's title and text; `address` is what its links are relative to.

    Raises ToolFailed when the page takes too long or too much memory.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-X", "utf8", "-c", _CHILD),
        str(Path(__file__).parents[2]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=dict(environment),
    )
    try:
        written, _ = await process.communicate(json.dumps([html, address, time_limit_s]).encode())
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        # A pipe that is not read to its end would be left open.
        await process.communicate()
    if process.returncode == -signal.SIGALRM:
        raise ToolFailed(f"The page at {address} cannot be made readable in {time_limit_s:g} s.")
    if process.returncode:
        raise ToolFailed(f"The page at {address} cannot be made readable: it is too intricate.")
    title, text = json.loads(written)
    return title, text


def read_in_child() -> None:
    """Read a page from standard input and write its title and text, within the limits."""
    html, address, time_limit_s = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    with suppress(ValueError, OSError):  # Not every system knows or allows it.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    json.dump(extract(html, address), sys.stdout)


def extract(html: str, address: str) -> tuple[str, str]:
    """Return a page's title and text. It may take very long for a page that was made for that."""
    page = _Page(address)
    page.feed(html)
    page.close()
    return page.title(), page.text()


class _Page(HTMLParser):
    """What is to be read of a page, as its tags come by; no end tag has to be there."""

    def __init__(self, address: str) -> None:
        super().__init__(convert_charrefs=True)
        self._address = address
        self._all = _Text()
        self._main = _Text()
        self._title: list[str] = []
        self._in_title = False
        self._left_out: list[str] = []
        self._mains = 0
        self._lists: list[int | None] = []
        self._links: list[str] = []
        self._cells = 0
        self._pres = 0

    def title(self) -> str:
        """Return the title on one line, cut where it is long."""
        return " ".join("".join(self._title).split())[:TITLE_CHARS_MAX]

    def text(self) -> str:
        """Return the text of the part that the page is about, or of the whole page."""
        main = self._main.text()
        return main if len(main) >= MAIN_CHARS_MIN else self._all.text()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _LEFT_OUT:
            self._left_out.append(tag)
        elif tag == "title":
            self._in_title = not self._title
        elif not self._left_out:
            self._begin(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # HTML has no self-closing elements: `<div/>` begins one. SVG has, and is left out.
        if tag not in _LEFT_OUT:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._left_out:
            # What began inside of it and never ended, ends with it.
            while self._left_out.pop() != tag:
                pass
        elif tag == "title":
            self._in_title = False
        elif not self._left_out:
            self._end(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title.append(data)
        elif not self._left_out:
            self._write(data)

    def parse_marked_section(self, i: int, report: bool = True) -> int:  # noqa: FBT001, FBT002
        """Take `<![…` for a comment, as HTML has it; the parser would raise AssertionError."""
        return self.parse_bogus_comment(i, report)

    def _write(self, data: str) -> None:
        self._all.write(data)
        if self._mains:
            self._main.write(data)

    def _mark(self, mark: str) -> None:
        self._all.mark(mark)
        if self._mains:
            self._main.mark(mark)

    def _lines(self, count: int) -> None:
        self._all.lines(count)
        self._main.lines(count)

    def _begin(self, tag: str, attributes: dict[str, str | None]) -> None:
        self._mains += tag in _MAIN
        if tag in _HEADINGS or tag in _BLOCKS:
            self._lines(2 if tag in _HEADINGS or tag == "p" else 1)
            self._mark(_HEADINGS.get(tag, ""))
        if tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "a":
            self._links.append(self._target(attributes.get("href") or ""))
            self._mark("[" if self._links[-1] else "")
        else:
            self._begin_other(tag, attributes)

    def _begin_other(self, tag: str, attributes: dict[str, str | None]) -> None:
        match tag:
            case "br":
                self._lines(1)
            case "hr":
                self._lines(2)
                self._mark("---")
                self._lines(2)
            case "li":
                self._lines(1)
                self._mark(self._bullet())
            case "tr":
                self._lines(1)
                self._cells = 0
            case "td" | "th":
                self._mark(" | " if self._cells else "")
                self._cells += 1
            case "pre":
                self._pres += 1
                self._fence(1)
            case "img" if said := " ".join((attributes.get("alt") or "").split()):
                self._write(f"[image: {said[:TITLE_CHARS_MAX]}]")

    def _end(self, tag: str) -> None:
        if tag in _HEADINGS or tag in _BLOCKS:
            self._lines(2 if tag in _HEADINGS or tag == "p" else 1)
        if tag in _MAIN and self._mains:
            self._mains -= 1
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag == "a" and self._links:
            if target := self._links.pop():
                for text in (self._all, self._main) if self._mains else (self._all,):
                    text.end_link(target)
        elif tag == "pre" and self._pres:
            self._pres -= 1
            self._fence(-1)

    def _fence(self, change: int) -> None:
        self._lines(1)
        self._mark("```")
        for text in (self._all, self._main):
            text.exact += change
        self._lines(1)

    def _bullet(self) -> str:
        indent = "  " * (min(len(self._lists), LIST_DEPTH_MAX) - 1)
        if not self._lists or (number := self._lists[-1]) is None:
            return f"{indent}- "
        self._lists[-1] = number + 1
        return f"{indent}{number + 1}. "

    def _target(self, href: str) -> str:
        """Return where a link leads, nothing if that is nowhere else or not the web."""
        if not href or href.startswith("#") or len(href) > LINK_CHARS_MAX:
            return ""
        try:
            target = urljoin(self._address, href.strip())
        except ValueError:
            return ""
        fit = re.fullmatch(r"https?://[^\s()<>\[\]]+", target)
        return target if fit and len(target) <= LINK_CHARS_MAX else ""


class _Text:
    """Text that is put together: white space as a browser shows it, no more than the limit."""

    def __init__(self) -> None:
        self.exact = 0
        self._pieces: list[str] = []
        self._chars = 0
        self._newlines = 2
        self._space = False

    def text(self) -> str:
        """Return what there is."""
        return "".join(self._pieces)[:TEXT_CHARS_MAX].strip()

    def lines(self, count: int) -> None:
        """Begin a new line, or with 2 a new paragraph, unless one has just begun."""
        if more := "\n" * (count - self._newlines):
            self._put(more)
            self._newlines = count
        self._space = False

    def mark(self, mark: str) -> None:
        """Write something that is not of the page."""
        if mark:
            self.write("")
            self._put(mark)
            self._newlines = 0
            self._space = False

    def end_link(self, target: str) -> None:
        """Write where the link leads that has begun with a `[`; one without text is taken back."""
        if self._pieces[-1:] == ["["]:
            self._pieces.pop()
        else:
            self.mark(f"]({target})")

    def write(self, data: str) -> None:
        """Write text of the page."""
        if self.exact:
            self._put(data)
            if data:
                self._newlines = int(data.endswith("\n"))
            return
        words = data.split()
        if words or not data:
            if (self._space or data[:1].isspace()) and not self._newlines:
                self._put(" ")
            self._put(" ".join(words))
            self._newlines = 0 if words else self._newlines
        self._space = data[-1:].isspace()

    def _put(self, text: str) -> None:
        if self._chars <= TEXT_CHARS_MAX:
            self._pieces.append(text)
            self._chars += len(text)
