"""Everything about speed and memory, as the table of `docs/performance.md`.

python -m bench                    measure and print
python -m bench.speed --write      and put the table into the page
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import acdc_search, exact_effects, gradient_scores, masked_runs, memory
from bench._timing import keep, machine, markdown

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Measure, print, and with `--write` put the table into the page."""
    rows = []
    for part in (gradient_scores, masked_runs, exact_effects, acdc_search, memory):
        found = part.rows()
        keep(found)
        rows += found
    if "--write" in sys.argv:
        page = PAGE.read_text()
        before, rest = page.split(START)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{START}\nMeasured on {machine()}.\n\n{markdown(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
