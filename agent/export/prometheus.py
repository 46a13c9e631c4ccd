# SPDX-License-Identifier: Apache-2.0
"""prometheus_client without the HTTP servers and clients that it imports: they take 2 MB, and nothing here uses them.

Its renderer of the page is in one module with programs that serve and push it. While it is imported, empty classes
stand in for those of the standard library.
"""

from __future__ import annotations

import sys
from types import ModuleType

_SERVERS = ("http.server", "urllib.error", "urllib.request", "wsgiref.simple_server")


class _EmptyClasses(ModuleType):
    """A module that has an empty class of every name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


_replaced = [name for name in _SERVERS if name not in sys.modules]
sys.modules.update((name, _EmptyClasses(name)) for name in _replaced)

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics  # noqa: E402
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric  # noqa: E402
from prometheus_client.exposition import generate_latest  # noqa: E402
from prometheus_client.gc_collector import GCCollector  # noqa: E402
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics  # noqa: E402
from prometheus_client.process_collector import ProcessCollector  # noqa: E402
from prometheus_client.registry import Collector  # noqa: E402

for name in _replaced:
    del sys.modules[name]

__all__ = [
    "Collector",
    "CollectorRegistry",
    "Counter",
    "CounterMetricFamily",
    "GCCollector",
    "GaugeMetricFamily",
    "Histogram",
    "HistogramMetricFamily",
    "Metric",
    "ProcessCollector",
    "disable_created_metrics",
    "generate_latest",
    "generate_openmetrics",
]
