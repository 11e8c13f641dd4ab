"""`make bench`: measure, print a table, and say which targets are met.

`make bench ARGS="growth"` runs others than the usual ones, and `--save` keeps the figures: in
`results.json`, for the next time to compare with, and in the table of docs/performance.md.
"""

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.bench.doors import doors
from tests.bench.growth import default_folder, growth
from tests.bench.memory import memory
from tests.bench.rows import Row
from tests.bench.soak import soak
from tests.bench.speed import speed
from tests.bench.start import start

RESULTS: Final = Path(__file__).parent / "results.json"
PAGE: Final = Path(__file__).parents[2] / "docs" / "performance.md"

#: What stands around the tables in the page.
BEGIN: Final = "<!-- made by make bench ARGS=--save -->\n"
END: Final = "<!-- end -->\n"

Benchmark = Callable[[Path], Awaitable[list[Row]]]

#: What `make bench` measures, and what takes long (and for growth 3 GB of disk): only by name.
USUAL: Final[Mapping[str, Benchmark]] = {
    "start": start,
    "speed": speed,
    "doors": doors,
    "memory": memory,
}
LONG: Final[Mapping[str, Benchmark]] = {"growth": growth, "soak": soak}


def machine() -> str:
    """Describe what it runs on, for figures mean little without."""
    name = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as lines:
        name = next((line.split(": ")[1].strip() for line in lines if "model name" in line), name)
    cores = len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{cores} cores ({name}), {memory_gb:.0f} GB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table of Markdown."""
    lines = ["| | measured | target | | beside |", "|---|---|---|---|---|"]
    for row in rows:
        mark = "" if not row["target"] else "met" if row["met"] else "**not met**"
        figure = f"{number(row['value'])} {row['unit']}"
        lines.append(f"| {row['what']} | {figure} | {row['target']} | {mark} | {row['beside']} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Return a figure with as many digits as mean anything."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def page(results: Mapping[str, Any]) -> str:
    """Return what stands between the marks of docs/performance.md for these results."""
    parts = [BEGIN]
    for name in (*USUAL, *LONG):
        if name in results:
            kept = results[name]
            parts.append(f"\n### {name.capitalize()}\n\nOn {kept['machine']}.\n\n")
            parts.append(table(kept["rows"]))
    return "".join(parts) + "\n" + END


def save(measured: Mapping[str, Sequence[Row]]) -> None:
    """Keep what was measured, beside what was kept of the other benchmarks."""
    results = kept()
    for name, rows in measured.items():
        results[name] = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + page(results) + rest.partition(END)[2], encoding="utf-8")


def kept() -> dict[str, Any]:
    """Return what was saved last."""
    saved: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return saved


def say(rows: Sequence[Row], before: Sequence[Mapping[str, Any]]) -> None:
    """Print rows, each with what it was when the results were saved."""
    was = {row["what"]: number(row["value"]) for row in before}
    for row in rows:
        sys.stdout.write(f"{row.line()}  (was {was.get(row.what, '-')})\n")


async def measure(names: Sequence[str]) -> dict[str, list[Row]]:
    """Run benchmarks, one after the other."""
    measured = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            benchmark = {**USUAL, **LONG}[name]
            # What growth builds takes minutes and is used again.
            where = default_folder() if name == "growth" else Path(folder)
            measured[name] = await benchmark(where)
    return measured


def main() -> int:
    """Measure what is asked for; return 1 when a target is not met."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*USUAL, *LONG)))
    parser.add_argument("--save", action="store_true", help="keep the figures in docs/")
    arguments = parser.parse_args()
    names = arguments.names or list(USUAL)
    if unknown := set(names) - {*USUAL, *LONG}:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join((*USUAL, *LONG))}")
    sys.stdout.write(f"{machine()}\n")
    before = kept()
    measured = asyncio.run(measure(names))
    for name, rows in measured.items():
        sys.stdout.write(f"\n{name}\n")
        say(rows, before.get(name, {}).get("rows", []))
    if arguments.save:
        save(measured)
    return 0 if all(row.met for rows in measured.values() for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
