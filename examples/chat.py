#!/usr/bin/env python3
"""A complete chat client for the gateway, with Python's standard library alone.

    python3 examples/chat.py [--model provider:model]

OWNWARE_GATEWAY is the gateway's address, OWNWARE_GATEWAY_TOKEN its token (where it wants one),
OWNWARE_PROFILE the agent to talk to, OWNWARE_MODEL the model that answers.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

GATEWAY = os.environ.get("OWNWARE_GATEWAY", "http://localhost:3011").rstrip("/")
PROFILE = os.environ.get("OWNWARE_PROFILE", "assistant")
TOKEN = os.environ.get("OWNWARE_GATEWAY_TOKEN")
RETRIES_MAX = 20  # connections in a row that bring nothing new
SILENCE_S = 45  # a stream says something every 15 s


def open_url(path: str, body: Any = None) -> Any:
    """Send a request and return the open response; raise RuntimeError with the gateway's words."""
    request = urllib.request.Request(f"{GATEWAY}/api/v1{path}")
    if TOKEN:
        request.add_header("Authorization", f"Bearer {TOKEN}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    try:
        return urllib.request.urlopen(request, timeout=SILENCE_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code >= 500:
                raise ConnectionError(f"it answers {error.code}") from error
            raise RuntimeError(json.load(error)["message"]) from error


def ask(path: str, body: Any = None) -> Any:
    """Send a request and return its answer."""
    with open_url(path, body) as response:
        return json.load(response)


def frames(path: str) -> Iterator[dict[str, Any]]:
    """Yield the frames of one response: their data, which an empty line ends."""
    data = []
    with open_url(path) as response:
        for line in response:
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif line == b"\n" and data:
                yield json.loads(b"".join(data))
                data = []


def follow(thread_id: str, seq: int) -> None:
    """Show a thread from `seq` to the end of its run, through cut connections and restarts."""
    failures, why = 0, "the stream was cut off"
    while failures < RETRIES_MAX:
        pause_s = min(0.1 * 2**failures, 10)
        failures += 1
        try:
            for event in frames(f"/threads/{thread_id}/agents/root/events?since={seq}"):
                if event["type"] == "stream.shutdown":
                    pause_s = event["retryAfterMs"] / 1000
                if event.get("seq", 0) <= seq:
                    continue  # about the stream itself, or seen before
                seq, failures = event["seq"], 0
                show(event, thread_id)
                if event["type"] == "session.end":
                    return
        except (OSError, http.client.HTTPException) as error:
            why = str(error)
        time.sleep(pause_s)
    raise RuntimeError(why)


def show(event: dict[str, Any], thread_id: str) -> None:
    """Print what an event says; have a question answered."""
    match event["type"]:
        case "text.delta":
            print(event["text"], end="", flush=True)
        case "tool.call.execute":
            print(f"\n[{event['toolName']}]")
        case "agent.spawn":
            print(f"[{event['name']} begins: {event['task']}]")
        case "agent.complete":
            print(f"[an agent has ended: {event['status']}]")
        case "error":
            print(f"\n[{event['code']}: {event['message']}]", file=sys.stderr)
        case "permission.request":
            print(f"\n{event['toolName']} wants to run with {json.dumps(event['input'], indent=2)}")
            print("Allow it? [y]es / [n]o / [a]lways: ", end="", flush=True)
            said = sys.stdin.readline().strip().lower()[:1]
            action = {"y": "approve", "a": "always"}.get(said, "deny")
            resume(thread_id, {"action": action, "requestId": event["requestId"]})
        case "question.request":
            said = answer(event)
            words = {"action": "answer", "answer": said} if said else {"action": "deny"}
            resume(thread_id, {**words, "requestId": event["requestId"]})
        case _:  # everything else, and what a newer gateway may say
            pass


def answer(event: dict[str, Any]) -> str:
    """Return what the person says to a question; options can be chosen by their numbers."""
    options = event["options"] or []
    print(f"\n{event['question']}")
    for number, option in enumerate(options, 1):
        print(f"  {number}. {option}")
    print("Answer (an empty line declines): ", end="", flush=True)
    line = sys.stdin.readline().strip()
    numbers = line.replace(",", " ").split() if event["multiple"] else [line]
    by_number = {str(number): option for number, option in enumerate(options, 1)}
    chosen = [by_number.get(number, "") for number in numbers]
    return ", ".join(chosen) if chosen and all(chosen) else line


def resume(thread_id: str, body: dict[str, Any]) -> None:
    """Send an answer; someone else may have answered meanwhile."""
    try:
        ask(f"/threads/{thread_id}/resume", body)
    except RuntimeError as error:
        print(error, file=sys.stderr)


def main() -> None:
    """Read prompts and show what the agent answers, in one conversation."""
    parser = argparse.ArgumentParser(description="Chat with an agent of a gateway.")
    parser.add_argument("--model", default=os.environ.get("OWNWARE_MODEL"))
    model = parser.parse_args().model
    if model is None:
        usable = [item["id"] for item in ask("/models") if item["hasCredentials"]]
        model = usable[0] if usable else sys.exit("no model is usable: set a provider's key")
    print(f"Talking to {PROFILE} ({model}). Ctrl-D ends.\n\n> ", end="", flush=True)
    thread: dict[str, str] = {}  # one conversation: the first answer names it
    for line in sys.stdin:
        if line.strip():
            body = {"profileId": PROFILE, "prompt": line.strip(), "model": model, **thread}
            run = ask("/run", body)
            thread = {"threadId": run["threadId"]}
            follow(run["threadId"], run["startSeq"])
        print("\n> ", end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as problem:
        sys.exit(f"{GATEWAY}: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
