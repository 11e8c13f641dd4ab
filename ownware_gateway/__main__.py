"""`python -m ownware_gateway`, and the console script `ownware`."""

import sys

from ownware_gateway.cli import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
