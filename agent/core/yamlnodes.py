# SPDX-License-Identifier: Apache-2.0
"""YAML files read as nodes, so that every refusal can name its line. Pure.

Every function raises SettingsError as "file:line: key: what is wrong".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass

import yaml

from agent.core.errors import SettingsError


@dataclass(frozen=True, slots=True)
class YamlMapping:
    """A mapping of a file: its values by key, read by what they must be. `place` is the file's name."""

    source: str
    node: yaml.Node
    values: dict[str, yaml.Node]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, key: str, problem: str) -> SettingsError:
        return error(self.values.get(key, self.node), self.source, key, problem)

    def text(self, key: str) -> str:
        """Returns the text of the key; "" without the key."""
        return scalar(self.values[key], self.source, key) if key in self.values else ""

    def items(self, key: str) -> list[yaml.Node]:
        """Returns the items of a list; no items without the key, or when it is null."""
        node = self.values.get(key)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(key, "is not a list")
        return list(node.value)

    def addresses(self, key: str) -> list[str]:
        """Returns addresses, as the ipaddress module writes them; null is no list of addresses."""
        node = self.values.get(key)
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(key, "is not a list")
        try:
            return [str(ipaddress.ip_address(scalar(item, self.source, key))) for item in node.value]
        except ValueError as refused:
            raise self.error(key, str(refused)) from None

    def texts(self, key: str) -> dict[str, str]:
        node = self.values.get(key)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise self.error(key, "is not a mapping of text to text")
        return {scalar(k, self.source, key): scalar(v, self.source, f"{key}.{k.value}") for k, v in node.value}

    def entries(self, key: str, known: Collection[str]) -> list[YamlMapping]:
        return [mapping(item, self.source, known) for item in self.items(key)]


def document(text: str, source: str, known: Collection[str]) -> YamlMapping | None:
    """Returns the file's mapping, None when it holds nothing."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as refused:
        line = refused.problem_mark.line + 1 if refused.problem_mark else 1
        raise SettingsError(f"{source}:{line}: not YAML: {refused.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as refused:  # PyYAML raises all of them
        raise SettingsError(f"{source}: not YAML: {refused}") from None
    return None if root is None else mapping(root, source, known)


def mapping(node: yaml.Node, source: str, known: Collection[str]) -> YamlMapping:
    if not isinstance(node, yaml.MappingNode):
        raise error(node, source, "entry", "is not a mapping of keys to values")
    values: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in known:
            raise error(key, source, str(key.value)[:80], f"is not a known key; known: {', '.join(sorted(known))}")
        if key.value in values:
            raise error(key, source, key.value, "is given twice")
        values[key.value] = value
    return YamlMapping(source, node, values)


def scalar(node: yaml.Node, source: str, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value or not _printable(node.value):
        raise error(node, source, key, "is not text")
    return str(node.value)


def _printable(text: str) -> bool:
    """True without zero bytes and unpaired surrogates: YAML can write them, a path or a message cannot carry them."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def error(node: yaml.Node, source: str, key: str, problem: str) -> SettingsError:
    return SettingsError(f"{source}:{node.start_mark.line + 1}: {key}: {problem}")
