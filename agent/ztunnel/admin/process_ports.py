# SPDX-License-Identifier: Apache-2.0
"""Serves the pages of a ztunnel process: statistics (15020), readiness (15021) and administration (15000).

In a rollout two instances overlap, so a port may be in use: the new instance waits until the other has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from agent.kernel import http
from agent.kernel.http import Handler, HttpServer, Request, Response
from agent.ztunnel.admin.node_view import ALL_FAMILIES, NodeView
from agent.ztunnel.telemetry.traffic_metrics import render
from agent.ztunnel.ztunnel_settings import ZtunnelSettings, host_and_port

RETRY_SECONDS: Final = 0.5
_LEVELS: Final = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
_ONLY_POST = Response.text("use POST\n", 405)

log = logging.getLogger(__name__)


class ProcessPorts:
    """The three servers, each of which may be off. `quit` ends the process."""

    def __init__(self, settings: ZtunnelSettings, view: NodeView, quit: Callable[[], None]) -> None:
        self._view = view
        self._quit = quit
        self._levels: dict[str, int] = {}  # as the process set them
        servers: list[tuple[str, str, Handler]] = [
            ("statistics", settings.stats_address or "", self._statistics),
            ("readiness", settings.ready_address or "", self._readiness),
            ("administration", settings.admin_address or "", self._administration),
        ]
        self._tasks = [
            asyncio.create_task(_serve(name, address, handler)) for name, address, handler in servers if address
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _statistics(self, request: Request) -> Response:
        if request.path not in ("/metrics", "/stats/prometheus"):
            return _not_found()
        kind = http.OPENMETRICS if http.wants_openmetrics(request.headers.get("accept", "")) else http.PLAIN
        return Response(200, (render(await self._view.series(), ALL_FAMILIES) + "# EOF\n").encode(), kind)

    async def _readiness(self, request: Request) -> Response:
        if request.path != "/healthz/ready":
            return _not_found()
        pending = self._view.pending()
        return Response.text(f"not ready, pending: {', '.join(pending)}", 500) if pending else Response.text("ready")

    async def _administration(self, request: Request) -> Response:
        match request.path:
            case "/config_dump":
                return Response.json(await self._view.config_dump())
            case "/logging":
                return self._logging(request)
            case "/quitquitquit":
                if request.method != "POST":
                    return _ONLY_POST
                self._quit()
                return Response.text("shutdown now")
        return _not_found()

    def _logging(self, request: Request) -> Response:
        """Shows the levels, or sets them: ?level=debug, ?level=MODULE=debug,…, ?reset."""
        if "level" in request.query or "reset" in request.query:
            if request.method != "POST":
                return _ONLY_POST
            try:
                wanted = _parsed(request.query.get("level", ""))
            except ValueError as error:
                return Response.text(f"{error}; levels are {', '.join(_LEVELS)}", 400)
            self._set({**(self._levels if "reset" in request.query else {}), **wanted})
        modules = [f"{name}={_named(logging.getLogger(name).level)}" for name in self._levels if name]
        return Response.text(f"current log level is {','.join((*modules, _named(logging.getLogger().level)))}")

    def _set(self, levels: dict[str, int]) -> None:
        for name, level in levels.items():
            logger = logging.getLogger(name or None)
            self._levels.setdefault(name, logger.level)
            logger.setLevel(level)
        self._view.serving.set_levels(levels)


def _parsed(text: str) -> dict[str, int]:
    """Returns levels by module, "" for all. Raises ValueError."""
    levels = {}
    for clause in filter(None, text.split(",")):
        module, _, level = clause.rpartition("=")
        if level not in _LEVELS:
            raise ValueError(f"level {level} is invalid")
        # Istio's names of modules, as ztunnel::xds, mean packages here.
        levels[f"agent.{module.replace('::', '.')}" if module.startswith("ztunnel") else module] = _LEVELS[level]
    return levels


def _named(level: int) -> str:
    return next((name for name, number in _LEVELS.items() if number == level and name != "trace"), "inherited")


def _not_found() -> Response:
    return Response.text("not found", 404)


async def _serve(name: str, address: str, handler: Handler) -> None:
    waited = False
    while True:
        try:
            listener = _listen(address)
        except OSError as error:
            if not waited:
                log.warning("%s: cannot listen on %s, retrying: %s", name, address, os.strerror(error.errno or 0))
            waited = True
            await asyncio.sleep(RETRY_SECONDS)
            continue
        if waited:
            log.info("%s: listening on %s", name, address)
        with contextlib.closing(listener):
            await HttpServer(handler).serve(listener)


def _listen(address: str) -> socket.socket:
    """Listens for both families at [::], or for IPv4 alone where the kernel has no IPv6. Raises OSError."""
    host, port = host_and_port(address)
    if host != "::":
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if not socket.has_dualstack_ipv6():
        return socket.create_server(("0.0.0.0", port))
    return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
