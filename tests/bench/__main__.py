# SPDX-License-Identifier: Apache-2.0
"""`make bench`: prints medians in three tables, with the aims that were met or missed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support, as pytest has it

from agent.core.errors import SluiceError
from agent.lab.lab import check_machine, interruptible
from tests.bench import datapath, plugin, repair, rules, start
from tests.bench.measure import Row, show

PREFIX = "slubench"


def measured(quick: bool, matrix: rules.Matrix, path: datapath.DataPath) -> Iterator[Row]:
    runs = 10 if quick else 50
    yield from plugin.alone(PREFIX, runs)
    yield from plugin.whole_add(PREFIX, runs)
    yield from start.many_pods(PREFIX, 2 if quick else 5, 50 if quick else start.PODS)
    yield from repair.agents(PREFIX, 10 if quick else 50, 30 if quick else start.PODS, 3 if quick else 20)
    yield from rules.measure(matrix, tell)
    datapath.measure(path, datapath.Counts(2) if quick else datapath.Counts(), tell)


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs and pods: to see that it works")
    args = parser.parse_args()
    found: list[Row] = []
    matrix, path = rules.Matrix((1, 10, 20) if args.quick else rules.COUNTS), datapath.DataPath()
    try:
        check_machine()
        with interruptible():
            for row in measured(args.quick, matrix, path):
                found.append(row)
                tell(f"{row.name}: {row.median:.4g} {row.unit}")
    except KeyboardInterrupt:
        print("bench: interrupted; what it made is removed", file=sys.stderr)
        return 130
    except (SluiceError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        if found:
            load, cores = os.getloadavg()[0], os.cpu_count()
            print(f"\nLinux {os.uname().release}, {cores} cores, load {load:.1f}\n{show(found)}\n\n{matrix.show()}")
            print(f"\n{path.show()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
