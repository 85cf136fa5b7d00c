"""`python -m tests.golden CASE_DIR [CASE_DIR ...]`: replay golden cases, exit 0 only if every one is ok."""

import argparse
import sys
from pathlib import Path

from tests.golden.runner import run_case


def main(arguments: list[str] | None = None) -> int:
    """One line per case: name, largest absolute difference, tolerance, ok or FAIL. Details go to stderr."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("case_dirs", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument("-v", "--verbose", action="store_true", help="also one line per tensor, on stderr")
    options = parser.parse_args(arguments)
    failed = 0
    for folder in options.case_dirs:
        report = run_case(folder)
        failed += not report.ok
        print(report.line(), flush=True)
        if options.verbose or not report.ok:
            print(report.details(only_failures=not options.verbose), file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
