# SPDX-License-Identifier: Apache-2.0
"""Completion scripts of bash, zsh and fish, from the tree of commands. Pure.

The agent's words about pods are only compared and offered as data, never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.cli.command_tree import Command, Option

_FILES = ("FILE", "PATH", "DIRECTORY", "BUNDLE")
_POD = "POD"


def script(shell: str, program: Command) -> str:
    """Returns the completion script. `shell` is bash, zsh or fish."""
    make = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return "\n".join(make(program)) + "\n"


def _groups(program: Command) -> str:
    return "|".join(one.words[0] for one in program.commands if one.commands)


def _subcommands(command: Command) -> str:
    """Returns the words known beforehand that may follow here."""
    below = [one.words[-1] for one in command.commands]
    choices = [word for one in command.positionals for word in one.choices]
    return " ".join([*below, *choices])


def _flags(command: Command) -> str:
    return " ".join(flag for option in command.options for flag in option.flags)


def _path(command: Command) -> str:
    return " ".join(command.words)


def _asks(command: Command) -> bool:
    """Returns whether the command takes a pod of the agent; the lab has its own."""
    return any(one.name == _POD for one in command.positionals) and command.words[:1] != ("lab",)


def _values(program: Command) -> Mapping[str, list[str]]:
    """Maps the value of an option to its commands, such as "lab up --backend"; settings are alike everywhere."""
    commands: dict[str, list[str]] = {}
    for command in program.walk():
        for option in command.options:
            for flag in option.flags if option.value else ():
                key = _value(option)
                pattern = f"* {flag}" if option.setting else f"{_path(command)} {flag}"
                if pattern not in commands.setdefault(key, []):
                    commands[key].append(pattern)
    return commands


def _value(option: Option) -> str:
    """Returns quoted words, "files" or "any"."""
    if option.choices:
        return f"'{' '.join(option.choices)}'"
    return "files" if option.value in _FILES else "any"


def _cases(program: Command, every: str) -> Iterator[tuple[str, str]]:
    """Returns (pattern of a case statement, value). Options of one command come before settings."""
    values = _values(program)
    for general in (False, True):
        for what, patterns in sorted(values.items()):
            chosen = [pattern for pattern in patterns if pattern.startswith("*") is general]
            if chosen:
                yield "|".join(f"{every}'{one[1:]}'" if general else f"'{one}'" for one in chosen), what


_BASH_HEAD = """\
# bash completion for sluice(1), as `sluice completion bash` writes it.
_sluice_pods() {
    local pod directory='' i
    for (( i = 1; i < COMP_CWORD; i++ )); do
        [[ ${COMP_WORDS[i]} == --run-dir ]] && directory=${COMP_WORDS[i+1]}
    done
    [[ $directory == '=' ]] && directory=''
    while IFS= read -r pod; do
        [[ $pod == "$2"* && $pod != *[!A-Za-z0-9./_-]* ]] && COMPREPLY+=("$pod")
    done < <("$1" completion pods ${directory:+--run-dir "$directory"} 2>/dev/null)
}
_sluice() {
    local cur=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} at=${COMP_WORDS[1]} words='' flags='' pods=''
    COMPREPLY=()
    [[ $cur == '=' ]] && cur=''
    [[ $before == '=' ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    if (( COMP_CWORD == 1 )); then
        at=''
    elif (( COMP_CWORD > 2 )); then
        case $at in GROUPS) at+=" ${COMP_WORDS[2]}" ;; esac
    fi
    case "$at $before" in"""
_BASH_TAIL = """\
    esac
    if [[ $cur == -* ]]; then
        words=$flags
    elif [[ $pods ]]; then
        _sluice_pods "$1" "$cur"
    fi
    [[ $words ]] && mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "$words" -- "$cur")
    return 0
}
complete -F _sluice sluice"""


def _bash(program: Command) -> Iterator[str]:
    yield _BASH_HEAD.replace("GROUPS", _groups(program))
    for pattern, what in _cases(program, "*"):
        match what:
            case "any":
                do = "return 0"
            case "files":
                do = 'mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames; return 0'
            case _:
                do = f'mapfile -t COMPREPLY < <(compgen -W {what} -- "$cur"); return 0'
        yield f"    {pattern})\n        {do} ;;"
    yield "    esac\n    case $at in"
    yield from _places(program)
    yield _BASH_TAIL


def _places(program: Command) -> Iterator[str]:
    """Returns the arguments of each command, as arms of a case statement for both bash and zsh."""
    for command in program.walk():
        pods = " pods=yes" if _asks(command) else ""
        choices = (
            " ".join(one.words[0] for one in program.commands) if command.words == ("help",) else _subcommands(command)
        )
        yield f"    '{_path(command)}') words='{choices}' flags='{_flags(command)}'{pods} ;;"


_ZSH_HEAD = """\
#compdef sluice
# zsh completion for sluice(1), as `sluice completion zsh` writes it.
_sluice() {
    local before=${words[CURRENT-1]} at=${words[2]} plain='' flags='' pods='' directory='' pod
    local -a names
    (( ${words[(I)--run-dir]} )) && directory=${words[${words[(I)--run-dir]}+1]}
    if (( CURRENT == 2 )); then
        at=''
    elif (( CURRENT > 3 )); then
        case $at in (GROUPS) at+=" ${words[3]}" ;; esac
    fi
    case "$at $before" in"""
_ZSH_TAIL = """\
    esac
    if [[ $PREFIX == -* ]]; then
        compadd -- ${=flags}
        return
    fi
    [[ -n $plain ]] && compadd -- ${=plain}
    if [[ -n $pods ]]; then
        for pod in ${(f)"$(${words[1]} completion pods ${directory:+--run-dir} $directory 2>/dev/null)"}; do
            [[ $pod == *[^A-Za-z0-9./_-]* ]] || names+=("$pod")
        done
        compadd -a -- names
    fi
}
if [[ $funcstack[1] == _sluice ]]; then
    _sluice "$@"
else
    compdef _sluice sluice
fi"""


def _zsh(program: Command) -> Iterator[str]:
    yield _ZSH_HEAD.replace("GROUPS", _groups(program))
    for pattern, what in _cases(program, "*"):
        do = {"any": "return 0", "files": "_files; return"}.get(what, f"compadd -- {what.strip(chr(39))}; return")
        yield f"    ({pattern})\n        {do} ;;"
    yield "    esac\n    case $at in"
    for line in _places(program):
        yield line.replace("    '", "    ('", 1).replace(" words=", " plain=", 1)
    yield _ZSH_TAIL


_FISH_HEAD = """\
# fish completion for sluice(1), as `sluice completion fish` writes it.
function __sluice_at
    set -l words (commandline -opc)
    set -l at "$words[2]"
    contains -- "$at" GROUPS; and set at "$at $words[3]"
    test (string trim -- "$at") = "$argv[1]"
end
function __sluice_pods
    set -l words (commandline -opc)
    set -l directory
    if set -l i (contains -i -- --run-dir $words)
        set directory --run-dir $words[(math $i + 1)]
    end
    command $words[1] completion pods $directory 2>/dev/null
end
complete -c sluice -f"""


def _fish(program: Command) -> Iterator[str]:
    yield _FISH_HEAD.replace("GROUPS", _groups(program).replace("|", " "))
    for command in program.walk():
        here = f"complete -c sluice -n '__sluice_at \"{_path(command)}\"'"
        for one in command.commands:
            yield f"{here} -a {one.words[-1]} -d {_quoted(one.about)}"
        if command.words == ("help",):
            yield f"{here} -a '{' '.join(one.words[0] for one in program.commands)}'"
        for positional in command.positionals:
            if positional.choices:
                yield f"{here} -a '{' '.join(positional.choices)}'"
        if _asks(command):
            yield f"{here} -a '(__sluice_pods)'"
        for option in command.options:
            yield f"{here} {_fish_option(option)} -d {_quoted(option.help)}"


def _fish_option(option: Option) -> str:
    kinds = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
    if option.choices:
        kinds.append(f"-x -a '{' '.join(option.choices)}'")
    elif option.value:
        kinds.append("-r -F" if option.value in _FILES else "-x")
    return " ".join(kinds)


def _quoted(text: str) -> str:
    """Quotes a word for fish, without expansion."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
