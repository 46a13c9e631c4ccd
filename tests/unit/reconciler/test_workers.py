# SPDX-License-Identifier: Apache-2.0
"""The workers' queue: who waits comes first, whatever is being done."""

from __future__ import annotations

import asyncio
import threading

from agent.reconciler.workers import BATCH, Workers


def test_work_that_somebody_waits_for_comes_before_all_else_in_a_batch() -> None:
    async def script() -> None:
        workers, order, go = Workers(1), list[str](), threading.Event()
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow() -> None:
            loop.call_soon_threadsafe(begun.set)
            go.wait()

        rest = [asyncio.create_task(workers.run(slow))]
        rest += [asyncio.create_task(workers.run(lambda n=n: order.append(f"pod {n}"))) for n in range(3 * BATCH)]
        await begun.wait()
        urgent = asyncio.create_task(workers.run(lambda: order.append("ADD"), first=True))
        await asyncio.sleep(0)  # it has its place in the queue
        go.set()
        await urgent
        assert order[0] == "ADD"
        await asyncio.gather(*rest)
        assert len(order) == 3 * BATCH + 1
        workers.close()

    asyncio.run(script())


def test_errors_are_raised_where_they_are_awaited_and_the_worker_goes_on() -> None:
    async def script() -> None:
        workers = Workers(2)
        found = await asyncio.gather(
            *(workers.run(lambda n=n: 1 // n, first=bool(n % 2)) for n in range(5)), return_exceptions=True
        )
        assert isinstance(found[0], ZeroDivisionError) and found[1:] == [1, 0, 0, 0]
        workers.close()

    asyncio.run(script())
