"""What the scripts here answer to --help."""

import sys


def answer_help(text: str) -> None:
    """Print ``text`` and end, where it is asked for."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(text)
        raise SystemExit
