"""`python -m ownware_gateway`, and the console script `ownware`."""

import gc
import os
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Whether there are plugins for pydantic, which the gateway has no use for, would be asked of
    # every package that is installed (https://docs.pydantic.dev/latest/concepts/plugins).
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # noqa: TID251 - set, not read
    # What is imported stays. Not to look for garbage in it makes a start a tenth faster, and each
    # look later on, which holds everybody up, shorter.
    gc.disable()
    from ownware_gateway.cli import run  # noqa: PLC0415 - after the lines above

    gc.freeze()
    gc.enable()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
