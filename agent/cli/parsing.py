# SPDX-License-Identifier: Apache-2.0
"""Parses the command line: a mistake gives one line with the nearest valid word; `manual` extends the help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"argument (.+?): invalid choice: '(.*)' \(choose from (.*)\)", re.DOTALL)
_REQUIRED = "the following arguments are required: "
_UNKNOWN = "unrecognized arguments: "
_MANY = 12  # options that a line of usage may list


class Parser(argparse.ArgumentParser):
    """The parser of the program, of a command, or of a command in a group."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    @property
    def command(self) -> str:
        """The command as in "lab up"; "" for the program."""
        return self.prog.partition(" ")[2]

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and one line with the prefix of all errors."""
        prefix = f"{self.command}: " if self.command else ""
        self.exit(2, f"sluice: {prefix}{self._plain(' '.join(message.split()))}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Rejects unknown arguments here: no other parser receives them, and this one knows the nearest option."""
        known, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(_UNKNOWN + extra[0])
        return known, extra

    def format_help(self) -> str:
        from agent.cli import manual  # for people who ask: no other run pays for its texts

        if len(self._actions) > _MANY:
            takes = (one.metavar for one in self._actions if not one.option_strings)
            self.usage = " ".join((self.prog, "[OPTION]...", *(str(word) for word in takes if word)))
        if (page := manual.PAGES.get(self.command)) is not None:
            self.description = page.description
            self.epilog = page.epilog
        return super().format_help()

    def _plain(self, message: str) -> str:
        see = f"see `{self.prog} --help`"
        if message.startswith(_REQUIRED):
            return f"{message.removeprefix(_REQUIRED)} is missing; {see}"
        if message.startswith(_UNKNOWN):
            word = message.removeprefix(_UNKNOWN)
            if not word.startswith("-"):
                return f"unexpected argument {word!r}; {see}"
            options = (option for action in self._actions for option in action.option_strings)
            return f"unknown option {word}; {_meant(word.partition('=')[0], options)}{see}"
        if (match := _CHOICE.fullmatch(message)) is not None:
            argument = match[1]
            word = match[2]
            choices = [one.strip(" '") for one in match[3].split(",")]
            if argument == "COMMAND":
                return f"unknown command {word!r}; {_meant(word, choices)}{see}"
            return f"{argument}: {word!r} is not one of {', '.join(choices)}"
        return f"{message.removeprefix('argument ')}; {see}"


def _meant(word: str, choices: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(choices), 1, 0.55)
    return f"did you mean {near[0]}? " if near else ""


class ProgramParser(Parser):
    """The parser of the program: its help lists the commands in sections, one line each."""

    def __init__(self, sections: Sequence[tuple[str, Sequence[str]]], about: str, **options: Any) -> None:
        super().__init__(**options)
        self._sections = sections
        self._about = about

    def format_help(self) -> str:
        from agent.cli import manual

        lines = self._lines()
        named = [name for _, names in self._sections for name in names]
        rest = ("More", [name for name in lines if name not in named])
        text = [f"usage: {self.prog} COMMAND [OPTION]...", self._about]
        for title, names in (*self._sections, rest):
            if there := [f"  {name:<13} {lines[name]}" for name in names if name in lines]:
                text.append("\n".join([f"{title}:", *there]))
        return "\n\n".join([*text, manual.TOP]) + "\n"

    def _lines(self) -> dict[str, str]:
        """Yields each command and what it does."""
        (commands,) = (one for one in self._actions if isinstance(one, argparse._SubParsersAction))
        return {one.dest: str(one.help or "") for one in commands._choices_actions}
