"""Everything about speed and memory, as the table of `docs/performance.md`.

python -m bench                    measure and print
python -m bench.speed --write      and put the table into the page
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import (
    acdc_search,
    exact_effects,
    families,
    gradient_scores,
    inside,
    masked_runs,
    memory,
    neurons,
    small_circuits,
)
from bench._timing import keep, kept, machine, markdown

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Measure and print; `--write` puts all results into the page, `--only-write` those of earlier runs."""
    if "--only-write" not in sys.argv:
        for part in (
            gradient_scores,
            families,
            masked_runs,
            exact_effects,
            acdc_search,
            small_circuits,
            memory,
            inside,
            neurons,
        ):
            keep(part.rows())
    if {"--write", "--only-write"} & set(sys.argv):
        before, rest = PAGE.read_text().split(START)
        after = rest.split(END)[1]
        table = f"Measured on {machine()}.\n\n{markdown(kept())}"
        PAGE.write_text(f"{before}{START}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
