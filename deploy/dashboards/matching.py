# SPDX-License-Identifier: Apache-2.0
"""Label matchers from the dashboard's variables, and queries for the rates of counters."""

from __future__ import annotations

AT = 'instance=~"$instance"'
POD = f'{AT},namespace=~"$namespace",pod=~"$pod"'
WORKLOAD = f'{AT},namespace=~"$namespace",workload=~"$workload"'
SOURCE = f'{AT},reporter="source",source_workload_namespace=~"$namespace",source_workload=~"$workload"'
SERVER = f'{AT},reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"'
OURS = "and on (job, instance) sluice_agent_info"
AGENTS = 'up{job=~"(.+/)?sluice"}'


def per_second(metric: str, matching: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{matching}}}[$__rate_interval]))"


def lately(metric: str, matching: str, by: str) -> str:
    return f"sum by ({by}) (increase({metric}{{{matching}}}[$__rate_interval]))"
