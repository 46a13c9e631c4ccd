"""What values each setting takes, and how they are read from files, the environment and flags. Pure."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any

from agent.core import names, selectors
from agent.core.errors import SettingsError
from agent.core.selectors import Selector

_MOST_ENTRIES = 1 << 24
_NETFILTER = ("nftables", "iptables", "iptables-legacy")
BACKENDS = ("auto", *_NETFILTER, "ebpf")
# The values of the settings that are one word of a few.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": BACKENDS,
    "host_probes": ("auto", *_NETFILTER, "off"),  # iptables: of earlier versions, nftables is used
    "probe_canary": ("report", "rollback", "off"),
    "dns_capture_to": ("any", "resolvers"),
    "non_tcp": ("count", "refuse"),
    "accounting": ("auto", "ebpf", "inet_diag", "off"),
    "cni_install": ("auto", "own", "insert", "off"),
    "offline_pods": ("by-namespace", "refuse"),
    "log_level": ("debug", "info", "warning", "error"),
}
# Least and most of the settings that are whole numbers.
RANGES: Mapping[str, tuple[int, int]] = {
    "connection_log_bytes": (1 << 16, 1 << 40),
    "connection_log_keep": (0, 99),
    "connection_log_sample": (1, 1_000_000),
    "metrics_label_sets": (1, 1_000_000),
}
_PATHS = ("run_dir", "bpf_dir", "zds_socket", "kube_token_file", "kube_ca_file", "cni_plugin", "host_root")
_EXEMPT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9][-a-z0-9.]{0,252}\*?")
_CONF_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,200}\.conflist")
_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[-a-zA-Z0-9.]+)(:[0-9]{1,5})?")


def convert(key: str, kind: str, value: Any, place: str) -> Any:
    """`value` as the setting `key` has it; `kind` is its field's annotation. Raises SettingsError with the place."""

    def refuse(what: str) -> SettingsError:
        return SettingsError(f"{place}: {key}: {value!r} is not {what}")

    if kind == "bool":
        text = str(value).lower()
        if text not in ("true", "false"):
            raise refuse("true or false")
        return text == "true"
    if kind == "int":
        return _whole(str(value), *RANGES[key], refuse)
    if kind == "float":
        try:
            number = float("yes" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            raise refuse("a number of seconds") from None
        if not 0 < number <= 3600:
            raise refuse("a number of seconds between 0 and 3600")
        return number
    if kind.startswith("tuple[Selector"):
        return _selectors(value, refuse)
    if kind.startswith("tuple"):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise refuse("a list of names")
        words = tuple(part.strip() for part in parts if part.strip())
        if key == "bpf_sizes":
            return tuple(_size(word, refuse) for word in words)
        if key == "ztunnel_ports":
            return tuple(str(_whole(word, 1, 65535, refuse)) for word in words)
        if key == "dns_resolvers":
            return tuple(_address(word, refuse) for word in words)
        if key == "exempt_pods" and not all(_EXEMPT.fullmatch(word) for word in words):
            raise refuse("a list of NAMESPACE/NAME, where only NAME may end with *")
        return words
    if not isinstance(value, str):
        raise refuse("text")
    return _text(key, value, refuse)


def _text(key: str, value: str, refuse: Any) -> str:
    if key in CHOICES and value not in CHOICES[key]:
        raise refuse("one of " + ", ".join(CHOICES[key]))
    if key in _PATHS and (not value.startswith("/") or len(value) > 90):
        raise refuse("an absolute path of at most 90 characters")
    if key == "kube_server" and value not in ("", "none") and not _URL.fullmatch(value):
        raise refuse("a URL like https://10.96.0.1:443, or none")
    if key in ("cni_conf_dir", "cni_bin_dir") and value and not value.startswith("/"):
        raise refuse("an absolute path")
    if key == "cni_conf_name" and not _CONF_NAME.fullmatch(value):
        raise refuse("a file name that ends with .conflist")
    if key == "connection_log" and not value.startswith("/") and value not in ("", "-"):
        raise refuse("an absolute path, or - for the standard output")
    if key == "metrics_address" and value and not _host_port(value):
        raise refuse("address:port")
    for version in (4, 6):
        if key == f"probe_ipv{version}":
            return _address(value, refuse, version)
    return value


def _selectors(value: Any, refuse: Any) -> tuple[Selector, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refuse("JSON: a list of {podSelector, namespaceSelector}") from None
    try:
        return selectors.parse(value)
    except SettingsError as wrong:
        raise refuse(f"usable: {wrong}") from None


def _whole(value: str, least: int, most: int, refuse: Any) -> int:
    if not value.isascii() or not value.isdecimal() or len(value) > 20 or not least <= int(value) <= most:
        raise refuse(f"a whole number from {least} to {most}")
    return int(value)


def _size(word: str, refuse: Any) -> str:
    """MAP=ENTRIES of a map of names.BPF_MAPS."""
    name, sign, number = word.partition("=")
    if not sign or name not in names.BPF_MAPS or not number.isdecimal() or not 1 <= int(number) <= _MOST_ENTRIES:
        raise refuse(f"a list of MAP=ENTRIES (1 to {_MOST_ENTRIES}) with MAP of {', '.join(names.BPF_MAPS)}")
    return f"{name}={int(number)}"


def _address(value: str, refuse: Any, version: int | None = None) -> str:
    """As the ipaddress module writes it."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        address = None
    if address is None or version not in (None, address.version) or getattr(address, "scope_id", None):
        raise refuse(f"an IPv{version} address" if version else "a list of addresses")
    return str(address)


def _host_port(value: str) -> bool:
    host, _, port = value.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536
