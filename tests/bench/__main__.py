"""`make bench`: medians of what the design promises, in one table, with the aims that were met or missed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from agent.core.errors import SluiceError
from agent.lab.lab import check_machine, interruptible
from tests.bench import plugin, start
from tests.bench.measure import Row, show

PREFIX = "slubench"


def rows(quick: bool) -> Iterator[Row]:
    runs = 10 if quick else 50
    yield from plugin.alone(PREFIX, runs)
    yield from plugin.whole_add(PREFIX, runs)
    yield from start.many_pods(PREFIX, 2 if quick else 5, 50 if quick else start.PODS, 20 if quick else 100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs and pods: to see that it works")
    args = parser.parse_args()
    found: list[Row] = []
    try:
        check_machine()
        with interruptible():
            for row in rows(args.quick):
                found.append(row)
                print(f"bench: {row.name}: {row.median:.4g} {row.unit}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("bench: interrupted; what it made is removed", file=sys.stderr)
        return 130
    except (SluiceError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        if found:
            load, cores = os.getloadavg()[0], os.cpu_count()
            print(f"\nLinux {os.uname().release}, {cores} cores, load {load:.1f}\n{show(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
