"""`python -m bench` measures speed and memory, `python -m bench calibration` what is named."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def run(names: list[str]) -> None:
    """Run the named measurements; those of speed and memory when none is named."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown measurement {unknown[0]!r}: choose from {', '.join(NAMES)}")
    missed = []
    for name in names or ["speed"]:
        print(f"== {name}", flush=True)
        sys.argv = [f"bench.{name}"]  # a measurement may have options of its own when it is run by itself
        try:
            importlib.import_module(f"bench.{name}").main()
        except SystemExit as end:  # a bar that was missed, or data that are not there: the others still run
            if isinstance(end.code, str):
                print(end.code)
            missed += [name] if end.code else []
    if missed:
        sys.exit(f"not met: {', '.join(missed)}")


if __name__ == "__main__":
    run(sys.argv[1:])
