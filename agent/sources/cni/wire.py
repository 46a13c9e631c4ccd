# SPDX-License-Identifier: Apache-2.0
"""The wire between `sluice-cni` and the agent, without IO: bytes to a checked request, an answer to bytes.

A unix stream carries one request and one answer, each a frame: four bytes of length, big-endian, and that
many bytes of UTF-8 JSON. The pod's network namespace rides as SCM_RIGHTS with the request's first byte.
All values that a pod's author or a runtime can write are checked here once, so that later code may put ids and names
into paths.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from typing import Any, Final, NoReturn

from agent.core.errors import ProtocolError
from agent.core.model.pods import UID

HEADER: Final = struct.Struct(">I")
MAX_REQUEST: Final = 1024 * 1024 + 64 * 1024  # bytes of JSON, as in cni_plugin/wire.h
MAX_REPLY: Final = 64 * 1024

# Codes of the CNI specification 1.1.0 that the agent answers; the plugin has others.
OK: Final = 0
UNKNOWN_CONTAINER: Final = 3
INVALID_ENVIRONMENT: Final = 4
INVALID_CONFIG: Final = 7
TRY_AGAIN_LATER: Final = 11
NOT_AVAILABLE: Final = 50
LIMITED: Final = 51
DRIFT: Final = 100  # from here on codes are our own: the pod's rules are not what they should be

ANNOTATIONS: Final = "io.kubernetes.cri.pod-annotations"  # a capability; our entry asks for it
ATTACHMENTS: Final = "cni.dev/valid-attachments"

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,255}")
_IFNAME = re.compile(r"(?!\.{1,2}\Z)[^/:\s\x00]{1,15}")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,252}")  # podman passes container names


class CniVerb(StrEnum):
    """The verb of a request. VERSION never reaches the agent."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    STATUS = "STATUS"
    GC = "GC"

    @property
    def about_pod(self) -> bool:
        return self in (CniVerb.ADD, CniVerb.DEL, CniVerb.CHECK)


@dataclass(frozen=True, slots=True)
class CniRequest:
    """One call of the plugin. `container_id` and `ifname` are empty when the verb is not about one pod.

    `netns` is the path the runtime gave, empty in a pod's second DEL; `config` is the network configuration
    with what the runtime injected. The properties are derived; `parse_request` has tried them all, so on what
    it returns they do not raise.
    """

    verb: CniVerb
    container_id: str
    _: KW_ONLY
    ifname: str
    netns: str
    args: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def pod_namespace(self) -> str:
        return _optional(_NAMESPACE, self.args, "K8S_POD_NAMESPACE")

    @property
    def pod_name(self) -> str:
        return _optional(_NAME, self.args, "K8S_POD_NAME")

    @property
    def pod_uid(self) -> str:
        return _optional(UID, self.args, "K8S_POD_UID")

    @property
    def annotations(self) -> dict[str, str]:
        """The pod's annotations as the runtime handed them over; empty when it did not."""
        path = f"config.runtimeConfig.{ANNOTATIONS}"
        given = _object(self.config, "runtimeConfig", "config").get(ANNOTATIONS)
        if given is None:  # Go writes null for a map without entries
            return {}
        if not isinstance(given, dict):
            raise ProtocolError(f"{path}: not an object")
        return {_text(key, path): _text(value, f"{path}.{key}") for key, value in given.items()}

    @property
    def addresses(self) -> tuple[str, ...]:
        """The pod's IP addresses, canonical and without prefix length, in the order of prevResult."""
        path = "config.prevResult.ips"
        ips = _list(_object(self.config, "prevResult", "config").get("ips"), path)
        return tuple(dict.fromkeys(_address(item, f"{path}[{i}]") for i, item in enumerate(ips)))

    @property
    def resolvers(self) -> tuple[str, ...]:
        """The pod's resolvers: the runtime's (capability dns), or else what an earlier plugin answered.

        Invalid addresses are ignored: they could only reduce what is captured.
        """
        given = _object(_object(self.config, "runtimeConfig", "config"), "dns", "config.runtimeConfig").get("servers")
        answered = _object(_object(self.config, "prevResult", "config"), "dns", "config.prevResult").get("nameservers")
        resolvers: dict[str, None] = {}
        for item in _list(given, "config.runtimeConfig.dns.servers") or _list(answered, "config.prevResult.dns"):
            with contextlib.suppress(ValueError, TypeError):
                resolvers[str(ipaddress.ip_address(item if isinstance(item, str) and "%" not in item else ""))] = None
        return tuple(resolvers)

    @property
    def valid_attachments(self) -> tuple[tuple[str, str], ...]:
        """The container id and interface of all live attachments (GC); empty for other verbs."""
        if self.verb is not CniVerb.GC:
            return ()
        path = f"config.{ATTACHMENTS}"
        if ATTACHMENTS not in self.config:
            # Taken as an empty list it would say that no pod lives.
            raise ProtocolError(f"{path}: missing")
        items = _list(self.config[ATTACHMENTS], path)
        return tuple(_attachment(item, f"{path}[{i}]") for i, item in enumerate(items))


@dataclass(frozen=True, slots=True)
class CniReply:
    """The agent's answer: `code` 0 is success, any other is CNI's error `code` with its two texts."""

    code: int = OK
    msg: str = ""
    details: str = ""

    def encode(self) -> bytes:
        """Returns the framed answer; texts are cut to what the plugin reads, the end of `details` first."""
        if self.code == OK:
            return frame(b'{"code":0}')
        msg = self.msg[:4096]
        details = self.details[:MAX_REPLY]
        while len(body := _reply_body(self.code, msg, details)) > MAX_REPLY:
            details = details[: len(details) // 2]
        return frame(body)


def frame(payload: bytes) -> bytes:
    """Returns header and payload. Raises ProtocolError if the payload is larger than MAX_REQUEST."""
    if len(payload) > MAX_REQUEST:
        raise ProtocolError(f"frame: {len(payload)} bytes are more than {MAX_REQUEST}")
    return HEADER.pack(len(payload)) + payload


def parse_request(payload: bytes) -> CniRequest:
    """Parses a request from a frame's payload and checks every value. Raises ProtocolError, naming the key.

    A DEL needs only its container id and must not fail on its other values: they are empty if one of them is bad.
    """
    given = _decode(payload)
    word = _text(given.get("verb"), "verb")
    if word not in CniVerb.__members__:
        raise ProtocolError("verb: not one of " + ", ".join(CniVerb))
    verb = CniVerb(word)
    container_id = _match(_CONTAINER_ID, given.get("container_id"), "container_id", empty=not verb.about_pod)
    try:
        return _checked(verb, container_id, given)
    except ProtocolError:
        if verb is not CniVerb.DEL:
            raise
        return CniRequest(verb, container_id, ifname="", netns="", args={}, config={})


def _checked(verb: CniVerb, container_id: str, given: Mapping[str, Any]) -> CniRequest:
    needed = verb in (CniVerb.ADD, CniVerb.CHECK)
    request = CniRequest(
        verb=verb,
        container_id=container_id,
        ifname=_match(_IFNAME, given.get("ifname"), "ifname", empty=not needed),
        netns=_netns(given.get("netns"), needed=needed),
        args=_args(_text(given.get("args"), "args")),
        config=_object(given, "config", needed=True),
    )
    # The derived values are not kept, as they are cheap; they are tried here so that they never raise later.
    _ = (request.pod_namespace, request.pod_name, request.pod_uid)
    _ = (request.annotations, request.addresses, request.resolvers, request.valid_attachments)
    return request


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        given = json.loads(payload.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ProtocolError(f"request: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ProtocolError("request: not an object")
    return given


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _reply_body(code: int, msg: str, details: str) -> bytes:
    fields = {"code": code, "msg": msg, **({"details": details} if details else {})}
    # An unpaired surrogate, as in an undecodable file name, must not keep an answer from being sent.
    return json.dumps(fields, ensure_ascii=False).encode(errors="replace")


def _args(raw: str) -> dict[str, str]:
    """Returns CNI_ARGS as a mapping. The order varies from call to call; of a key given twice the last counts."""
    pairs = [pair for pair in raw.split(";") if pair]
    if any("=" not in pair for pair in pairs):
        raise ProtocolError("args: not of the form KEY=VALUE;KEY=VALUE")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def _netns(value: object, *, needed: bool) -> str:
    path = _text(value, "netns")
    if not path and not needed:
        return ""
    if not path.startswith("/") or "\0" in path:
        raise ProtocolError("netns: not an absolute path")
    return path


def _text(value: object, path: str) -> str:
    """Returns a string that can be written out again; JSON's escapes allow unpaired surrogates, UTF-8 does not."""
    if not isinstance(value, str):
        raise ProtocolError(f"{path}: not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError(f"{path}: has an unpaired surrogate") from None
    return value


def _match(pattern: re.Pattern[str], value: object, path: str, *, empty: bool = False) -> str:
    word = _text(value, path)
    if not pattern.fullmatch(word) and not (empty and not word):
        raise ProtocolError(f"{path}: {word[:80]!r} is not a valid value")
    return word


def _optional(pattern: re.Pattern[str], args: Mapping[str, str], key: str) -> str:
    return _match(pattern, args.get(key, ""), f"args.{key}", empty=True)


def _object(holder: Mapping[str, Any], key: str, path: str = "", *, needed: bool = False) -> dict[str, Any]:
    value = holder.get(key)
    if value is None and not needed:
        return {}
    if not isinstance(value, dict):
        raise ProtocolError(f"{path}{'.' if path else ''}{key}: not an object")
    return value


def _list(value: object, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ProtocolError(f"{path}: not a list")
    return value


def _address(item: object, path: str) -> str:
    given = item.get("address") if isinstance(item, dict) else None
    text = _text(given, f"{path}.address")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise ProtocolError(f"{path}.address: {text[:80]!r} is not an IP address") from None
    if "%" in text:
        raise ProtocolError(f"{path}.address: {text[:80]!r} has a zone, which means nothing outside the pod")
    return str(interface.ip)


def _attachment(item: object, path: str) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise ProtocolError(f"{path}: not an object")
    container_id = _match(_CONTAINER_ID, item.get("containerID"), f"{path}.containerID")
    return container_id, _match(_IFNAME, item.get("ifname"), f"{path}.ifname")
