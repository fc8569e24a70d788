"""Benchmark of conversions of random models, each in pairs with a flushed `cp` of what it writes or with another partner.

    python scripts/bench/bench.py FOLDER [--rows NAME...] [--runs 9] [--touch 4] [--quick]

Prints Markdown tables: medians with ranges of wall seconds, CPU seconds (user and system) and anonymous memory (RssAnon), and the
ratios of pairs. The commands of a pair alternate in who comes first. A first pair, which warms the page cache, is not counted. The
folder holds, at any time, what a row reads, one output and one copy. Needs Linux.
"""

from __future__ import annotations

from pairs import parser, run_chosen
from rows import ROWS, TITLES


def main() -> None:
    """Run the rows that are asked for, and print their tables."""
    run_chosen(parser(__doc__, ROWS, TITLES).parse_args(), ROWS, TITLES)


if __name__ == "__main__":
    main()
