"""The gateway as a person starts it, which says what it holds when it gets the signal SIGUSR1.

There is no route for that, on purpose: the figures are for the benchmarks alone. `python -m
tests.bench.counted` takes the arguments of `python -m ownware_gateway`.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from ownware_gateway.__main__ import main


def _say_counts(*_: object) -> None:
    # A signal's handler runs between two steps of the main thread, where the loop is.
    loop: Any = asyncio.get_running_loop()
    counts = {
        "tasks": len(asyncio.all_tasks(loop)),
        "timers": sum(not timer.cancelled() for timer in loop._scheduled),
    }
    os.write(sys.stdout.fileno(), json.dumps(counts).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _say_counts)
    main()
