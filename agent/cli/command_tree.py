# SPDX-License-Identifier: Apache-2.0
"""Commands and options as values, derived from the parser: for completion, the manual page and docs/cli.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option: `flags` as typed; `value` names its argument, "" for none; `choices` are its few possible values.

    `setting`: the option is one of those generated from the agent's settings.
    """

    flags: tuple[str, ...]
    value: str = ""
    choices: tuple[str, ...] = ()
    help: str = ""
    required: bool = False
    setting: bool = False


@dataclass(frozen=True, slots=True)
class Positional:
    name: str
    choices: tuple[str, ...] = ()
    help: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: `words` as in ("lab", "up"), () for the program; `about` is its line in lists."""

    words: tuple[str, ...]
    about: str
    options: tuple[Option, ...]
    positionals: tuple[Positional, ...]
    commands: tuple[Command, ...]

    def walk(self) -> Iterator[Command]:
        """Yields this command and all below it."""
        yield self
        for one in self.commands:
            yield from one.walk()


def command_tree(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), about: str = "") -> Command:
    """Returns the tree of the program's parser."""
    options = list[Option]()
    positionals = list[Positional]()
    commands = list[Command]()
    settings = {id(one) for group in parser._action_groups if group.title == "settings" for one in group._group_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {one.dest: str(one.help or "") for one in action._choices_actions}
            commands += (
                command_tree(below, (*words, name), lines.get(name, "")) for name, below in action.choices.items()
            )
        elif action.option_strings:
            options.append(_option(action, setting=id(action) in settings))
        else:
            name = str(action.metavar or action.dest)
            optional = action.nargs in ("?", "*", argparse.REMAINDER)
            positionals.append(Positional(name, _choices(action), _help(action), optional))
    return Command(
        words=words, about=about, options=tuple(options), positionals=tuple(positionals), commands=tuple(commands)
    )


def _option(action: argparse.Action, *, setting: bool) -> Option:
    choices = _choices(action)
    value = ""
    if action.nargs != 0:
        value = str(action.metavar or ("|".join(choices) if choices else action.dest.upper()))
    flags = tuple(action.option_strings)
    return Option(
        flags=flags, value=value, choices=choices, help=_help(action), required=action.required, setting=setting
    )


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """Returns the choices of argparse, or those that the metavar of a setting lists."""
    if action.choices is not None:
        return tuple(map(str, action.choices))
    metavar = str(action.metavar or "")
    return tuple(metavar.split("|")) if "|" in metavar else ()


def _help(action: argparse.Action) -> str:
    """Returns the help with argparse's substitutions."""
    text = str(action.help or "")
    return text % {"default": action.default, "prog": "sluice"} if "%" in text else text
