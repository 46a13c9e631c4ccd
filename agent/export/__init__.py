# SPDX-License-Identifier: Apache-2.0
"""Metrics, health and the admin API, over TCP and a unix socket."""
