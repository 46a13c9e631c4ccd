# SPDX-License-Identifier: Apache-2.0
"""Reviews the permissions of a token: TokenReview, then SubjectAccessReview. Any failure denies."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.core.errors import KubeError
from agent.sources.kube.api_client import Client

log = logging.getLogger("sluice.kube")
TOKENS = "/apis/authentication.k8s.io/v1/tokenreviews"
ACCESS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
_TOKEN = re.compile(r"[!-~]{1,16384}")
_ALLOWED, _REFUSED = 10.0, 2.0  # seconds that an answer is cached
_MOST = 256  # answers kept
_AT_ONCE = 2  # reviews under way: callers must not flood the API server through the agent


@dataclass(frozen=True, slots=True)
class User:
    """A user, as TokenReview returns and SubjectAccessReview takes it."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None


class Review:
    """Keeps no token: answers are found by a keyed hash that means nothing outside of this process."""

    def __init__(self, client: Client, now: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._now = now
        self._key = os.urandom(32)
        self._answers: dict[bytes, tuple[float, bool]] = {}
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def allowed(
        self, token: str, verb: str, namespace: str | None = None, resource: str = "pods", subresource: str = ""
    ) -> bool:
        """Returns True if the token may; `namespace` None means all. False also if the API server does not answer."""
        if not _TOKEN.fullmatch(token):
            return False
        question = "\0".join((token, verb, namespace or "", resource, subresource))
        key = hashlib.blake2b(question.encode(), key=self._key).digest()
        if (kept := self._kept(key)) is not None:
            return kept
        async with self._free:
            if (kept := self._kept(key)) is not None:
                return kept
            try:
                user = await self._user(token)
                answer = user is not None and await self._may(user, verb, namespace, resource, subresource)
            except KubeError as error:
                log.warning("request denied: access review failed: %s", error)
                return False  # not kept: the next one may be asked again
            self._keep(key, answer)
            return answer

    async def _user(self, token: str) -> User | None:
        status = await self._ask(TOKENS, "TokenReview", "authentication.k8s.io/v1", {"token": token})
        user = status.get("user")
        if status.get("authenticated") is not True or status.get("error") or not isinstance(user, dict):
            return None
        name, groups, extra = user.get("username"), user.get("groups"), user.get("extra")
        if not isinstance(name, str) or not name:
            return None
        listed = tuple(one for one in groups if isinstance(one, str)) if isinstance(groups, list) else ()
        return User(name, str(user.get("uid") or ""), listed, extra if isinstance(extra, dict) else None)

    async def _may(self, user: User, verb: str, namespace: str | None, resource: str, subresource: str) -> bool:
        what = {"verb": verb, "version": "v1", "resource": resource}
        what |= {"namespace": namespace} if namespace else {}
        what |= {"subresource": subresource} if subresource else {}
        spec: dict[str, Any] = {"user": user.name, "groups": list(user.groups), "resourceAttributes": what}
        spec |= {"uid": user.uid} if user.uid else {}
        spec |= {"extra": dict(user.extra)} if user.extra else {}
        status = await self._ask(ACCESS, "SubjectAccessReview", "authorization.k8s.io/v1", spec)
        return status.get("allowed") is True and status.get("denied") is not True

    async def _ask(self, path: str, kind: str, version: str, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = await self._client.send("POST", path, {"apiVersion": version, "kind": kind, "spec": spec})
        status = answer.get("status")
        return status if isinstance(status, dict) else {}

    def _kept(self, key: bytes) -> bool | None:
        until, answer = self._answers.get(key, (0.0, False))
        return answer if self._now() < until else None

    def _keep(self, key: bytes, answer: bool) -> None:
        now = self._now()
        if len(self._answers) >= _MOST:
            self._answers = {one: kept for one, kept in self._answers.items() if now < kept[0]}
        if len(self._answers) < _MOST:
            self._answers[key] = (now + (_ALLOWED if answer else _REFUSED), answer)
