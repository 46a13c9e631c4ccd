"""Metrics, health and the admin API, over TCP and a unix socket."""
