"""Compiles strangers' patterns: a process of its own, with little memory and time.

    python -P pattern_child.py < [PATTERN, …]

Counts inside of counts multiply, so that a few letters may become gigabytes. On stdout comes
what is wrong with the first pattern that is none, or nothing.
"""

import json
import resource
import sys
import warnings

import regex

MEMORY_BYTES = 512 << 20
"""Of address space; the interpreter's own is a part of it."""
SECONDS = 5
"""Of the processor's."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for pattern in json.load(sys.stdin):
        try:
            regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            print(error)
            return


if __name__ == "__main__":
    main()
