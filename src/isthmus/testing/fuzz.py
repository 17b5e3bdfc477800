"""Many mutated ``.ist`` files, decoded one after the other.

::

    python -m isthmus.testing.fuzz FOLDER --count 100000 --seed 0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from isthmus.testing.mutations import Report, fuzz


def main() -> int:
    """The command; exit code 1 where a file did what it must not."""
    parser = argparse.ArgumentParser(prog="python -m isthmus.testing.fuzz", description=__doc__)
    parser.add_argument("folder", type=Path, help="whole .ist files to mutate")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    files = [p.read_bytes() for p in sorted(chosen.folder.glob("*.ist"))]

    def tell(number: int, now: Report) -> None:
        if (number + 1) % 10_000 == 0:
            sys.stdout.write(f"{now}\n")
            sys.stdout.flush()

    found = fuzz(files, chosen.count, seed=chosen.seed, report=tell)
    sys.stdout.write("\n".join([str(found), *found.failures[:20]]) + "\n")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
