"""Checking the arguments of a call, before anything that it takes has been imported."""

import subprocess
import sys

HEAD = """
import asyncio, resource, sys, threading
from ownware_gateway.tools import ToolFailed, files, load_schemas, parse_arguments
(tool,) = (tool for tool in files.TOOLS if tool.name == "read_file")
assert "jsonschema" not in sys.modules
"""


def run_python(code: str) -> None:
    """Run it in a fresh interpreter, where nothing is imported yet."""
    subprocess.run([sys.executable, "-c", HEAD + code], check=True, timeout=20)


def test_what_checks_them_is_not_imported_on_the_event_loops_thread() -> None:
    run_python("""
class Watch:
    threads = set()

    def find_spec(self, name, *_):
        if name.startswith("jsonschema"):
            self.threads.add(threading.current_thread())

sys.meta_path.insert(0, Watch())
asyncio.run(load_schemas())
assert parse_arguments(tool, '{"path": "a"}') == {"path": "a"}
assert Watch.threads and threading.main_thread() not in Watch.threads
""")


def test_without_a_file_handle_they_are_not_checked_and_with_one_they_are() -> None:
    run_python("""
async def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    await load_schemas()
    try:
        parse_arguments(tool, '{"path": "a"}')
    except ToolFailed as error:
        assert "Try again" in str(error), error
    else:
        raise AssertionError("not checked, and taken")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert parse_arguments(tool, '{"path": "a"}') == {"path": "a"}
    try:
        parse_arguments(tool, '{"path": 1}')
    except ToolFailed as error:
        assert "$.path" in str(error), error
    else:
        raise AssertionError("not checked")

asyncio.run(main())
""")
