"""A server of our own for the tests: a program that speaks MCP over its pipes, well or badly.

Written in plain JSON-RPC, because a library would not let it misbehave. What it does beside its
tools its arguments say:

- `--pids FILE` appends its process id to a file, and that of a child of its own with `--child`;
- `--deaf` ignores the end of its input and SIGTERM;
- `--silent` answers nothing at all; `--die` ends at once, after a word on stderr;
- `--idempotent` says of `slow` that it may be called again;
- `--chatty` writes to its output what is no message.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

VERSION: Final = "2025-11-25"

#: A PNG of one pixel.
DOT: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)

ANNOTATIONS: Final[dict[str, dict[str, bool]]] = {
    "echo": {"readOnlyHint": True},
    "append": {"destructiveHint": False},
    "put": {"idempotentHint": True},
    "wipe": {"destructiveHint": True},
}


def schema(**properties: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(properties),
    }


TOOLS: Final[dict[str, dict[str, Any]]] = {
    "echo": schema(text="string"),
    "append": schema(path="string", line="string"),
    "put": schema(path="string", line="string"),
    "wipe": schema(path="string"),
    "cat": schema(path="string"),
    "env": schema(),
    "slow": schema(path="string"),
    "hang": schema(),
    "die": schema(),
    "huge": schema(bytes="integer"),
    "flood": schema(),
    "change": schema(),
    "fail": schema(),
    "picture": schema(),
    "album": schema(),
    "structured": schema(),
    "progress": schema(),
    "ask": schema(),
    "hang_for_ever": schema(),
}

lock = threading.Lock()
extra: list[str] = []
cancelled: dict[Any, threading.Event] = {}
answers: dict[Any, Any] = {}
answered = threading.Condition()


def send(message: dict[str, Any]) -> None:
    with lock:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def ask(method: str, params: dict[str, Any]) -> Any:
    """Ask the client something, and return its answer."""
    with answered:
        send({"id": f"ask-{method}", "method": method, "params": params})
        answered.wait_for(lambda: f"ask-{method}" in answers)
        return answers.pop(f"ask-{method}")


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": said}], **fields}


def call(number: Any, name: Any, arguments: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    match name:
        case "echo":
            return text(arguments["text"])
        case "append":
            with Path(arguments["path"]).open("a") as file:
                file.write(arguments["line"] + "\n")
            return text("appended")
        case "put" | "wipe":
            Path(arguments["path"]).write_text(arguments.get("line", ""))
            return text("done")
        case "cat":
            return text(Path(arguments["path"]).read_text())
        case "env":
            return text(json.dumps(dict(os.environ)))
        case "slow":
            with Path(arguments["path"]).open("a+") as file:
                file.seek(0)
                again = bool(file.read())
                file.write("begun\n")
                file.flush()
                if not again and cancelled[number].wait(60):
                    file.write("cancelled\n")
            return text("slept")
        case "hang":
            cancelled[number].wait(60)
            return text("too late")
        case "hang_for_ever":
            with lock:
                time.sleep(600)
            return text("much too late")
        case "die":
            os._exit(3)
        case "huge":
            return text("x" * arguments["bytes"])
        case "flood":
            while True:
                with lock:
                    sys.stdout.write("na " * 100 + "\n")
        case "change":
            extra.append(f"extra_{len(extra)}")
            send({"method": "notifications/tools/list_changed"})
            return text("changed")
        case "fail":
            return text("it did not work", isError=True)
        case "picture":
            return {
                "content": [
                    {"type": "text", "text": "look:"},
                    {"type": "image", "mimeType": "image/png", "data": "aGVsbG8h"},
                    {"type": "resource_link", "uri": "urn:a.txt", "name": "a.txt"},
                    {
                        "type": "resource",
                        "resource": {"uri": "urn:b", "mimeType": "text/plain", "text": "b!"},
                    },
                ]
            }
        case "album":
            return album()
        case "structured":
            return {"content": [], "structuredContent": {"answer": 42}}
        case "progress":
            for done in range(1, 4):
                token = meta["progressToken"]
                params = {"progressToken": token, "progress": done, "total": 3, "message": "on it"}
                send({"method": "notifications/progress", "params": params})
            return text("finished")
        case "ask":
            message = {"role": "user", "content": {"type": "text", "text": "well?"}}
            wants: dict[str, dict[str, Any]] = {
                "sampling/createMessage": {"messages": [message], "maxTokens": 10},
                "elicitation/create": {"message": "Name?", "requestedSchema": schema()},
                "roots/list": {},
            }
            said = [ask(method, params) for method, params in wants.items()]
            return text(json.dumps([answer["error"]["message"] for answer in said]))
        case _ if name in extra:
            return text(f"this is {name}")
        case _:
            return text(f"there is no {name}", isError=True)


def album() -> dict[str, Any]:
    """Something of every kind that a result can hold."""

    def data(raw: bytes) -> str:
        return base64.b64encode(raw).decode()

    page = {"uri": "urn:page", "mimeType": "text/html", "text": "<b>hi</b>"}
    archive = {"uri": "urn:zip", "mimeType": "application/zip", "blob": data(b"PK")}
    return {
        "content": [
            {"type": "text", "text": "look:"},
            {"type": "image", "mimeType": "image/png", "data": DOT},
            {"type": "audio", "mimeType": "audio/wav", "data": data(b"RIFF")},
            {"type": "resource", "resource": page},
            {"type": "resource", "resource": archive},
            {"type": "resource_link", "uri": "urn:log", "name": "the log", "size": 9},
        ],
        "structuredContent": {"answer": 42},
    }


def tools() -> list[dict[str, Any]]:
    hints = dict(ANNOTATIONS)
    if "--idempotent" in sys.argv:
        hints["slow"] = {"idempotentHint": True}
    found = {**TOOLS, **{name: schema() for name in extra}}
    return [
        {
            "name": name,
            "description": f"The tool {name}.",
            "inputSchema": found[name],
            "annotations": hints.get(name),
        }
        for name in found
    ]


def answer(message: dict[str, Any]) -> None:
    number, params = message["id"], message.get("params") or {}
    try:
        match message["method"]:
            case "initialize":
                result: dict[str, Any] = {
                    "protocolVersion": VERSION,
                    "capabilities": {"tools": {"listChanged": True}},
                    "serverInfo": {"name": "test", "version": "1"},
                }
            case "ping":
                result = {}
            case "tools/list":
                result = {"tools": tools()}
            case "tools/call":
                arguments = params.get("arguments") or {}
                result = call(number, params["name"], arguments, params.get("_meta") or {})
            case method:
                send({"id": number, "error": {"code": -32601, "message": f"no {method}"}})
                return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is answered
        send({"id": number, "error": {"code": -32000, "message": f"{error!r}"}})
    else:
        # The order of fields that some servers have: what is answered comes last.
        send({"result": result, "id": number})


def prepare(flags: list[str]) -> None:
    if "--deaf" in flags:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = [os.getpid()]
    if "--child" in flags:
        pids.append(subprocess.Popen(["sleep", "300"], start_new_session=True).pid)
    if "--pids" in flags:
        with Path(flags[flags.index("--pids") + 1]).open("a") as file:
            file.writelines(f"{pid}\n" for pid in pids)
    print("the server is here", file=sys.stderr, flush=True)
    if "--die" in flags:
        print("and cannot go on", file=sys.stderr, flush=True)
        sys.exit(7)
    if "--chatty" in flags:
        print("Welcome to the server!\n{not json", flush=True)


def main(flags: list[str]) -> None:
    prepare(flags)
    for line in sys.stdin:
        message = json.loads(line)
        if "--silent" in flags:
            continue
        if "method" not in message:
            with answered:
                answers[message["id"]] = message
                answered.notify_all()
        elif message["method"] == "notifications/cancelled":
            cancelled[message["params"]["requestId"]].set()
        elif "id" in message:
            cancelled[message["id"]] = threading.Event()
            threading.Thread(target=answer, args=[message], daemon=True).start()
    while "--deaf" in flags:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1:])
