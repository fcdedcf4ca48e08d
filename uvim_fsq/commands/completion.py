"""`uvim-fsq completion`: prints a script that completes commands, options and configuration keys in bash or zsh."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

HELP = "print a completion script for bash or zsh"

#: %(cases)s: one case per command, which sets `words`. In zsh, the same function runs under bashcompinit.
SCRIPT = """\
_uvim_fsq() {
  local cur="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" words="" files=1
  if [ "$COMP_CWORD" -gt 2 ] && [ "$command" = data ]; then command="data ${COMP_WORDS[2]}"; fi
  if [ "$COMP_CWORD" -eq 1 ]; then command=""; fi
  case "${COMP_WORDS[COMP_CWORD-1]}" in
%(values)s
  esac
  if [ -z "$words" ]; then
    case "$command" in
%(cases)s
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
  if [ "$files" -eq 1 ]; then COMPREPLY+=( $(compgen -f -- "$cur") ); fi
  if [ "${#COMPREPLY[@]}" -eq 1 ]; then
    case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
  fi
}
complete -o filenames -F _uvim_fsq uvim-fsq
"""
ZSH = "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "shell", choices=("bash", "zsh"), help="add this to ~/.bashrc: source <(uvim-fsq completion bash)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the script. `args.parser` is the parser of all commands, `args.stages` maps those that take configuration
    keys to their stage.
    """
    print(completion_script(args.parser, args.stages, args.shell), end="")


def completion_script(parser: argparse.ArgumentParser, stages: Mapping[str, str], shell: str) -> str:
    """The script that completes what `parser` accepts.

    Args:
        stages: command -> the stage whose configuration keys it takes.
        shell: bash or zsh.
    """
    from uvim_fsq.config.parse import describe_keys
    from uvim_fsq.config.schema import STAGES
    from uvim_fsq.config.shipped import shipped_names

    described = {stage: [key for key, *_ in describe_keys(STAGES[stage])] for stage in set(stages.values())}
    keys = {stage: [f"{key}=" for key in names if key != "ancestors"] for stage, names in described.items()}
    cases, values = [], dict[str, list[str]]()
    for command, found in _commands(parser).items():
        words = [option for action in found._actions for option in action.option_strings]
        words += keys[stages[command]] if command in stages else []
        inner = _subparsers(found)
        words += list(inner.choices) if inner is not None else []
        for action in found._actions:
            if action.dest in ("config", "grid") and not action.option_strings:
                grids = action.dest == "grid"
                words += [name for name in shipped_names() if name.startswith("ablations/") == grids]
            if action.choices and inner is not action:
                choices = [str(choice) for choice in action.choices]
                if not action.option_strings:
                    words += choices
                for option in action.option_strings:
                    values.setdefault(option, []).extend(choices)
        files = "" if inner is None else " files=0"
        cases.append(f"    {_quote(command)}) words={_quote(' '.join(words))}{files} ;;")
    given = [
        f"  {option}) words={_quote(' '.join(dict.fromkeys(words)))} files=0 ;;" for option, words in values.items()
    ]
    script = SCRIPT % {"cases": "\n".join(cases), "values": "\n".join(given) or '  "") ;;'}
    return (ZSH if shell == "zsh" else "") + script


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    return next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """The words before the cursor -> the parser of what follows."""
    found, inner = {prefix: parser}, _subparsers(parser)
    for name, sub in (inner.choices if inner is not None else {}).items():
        found |= _commands(sub, f"{prefix} {name}".strip())
    return found


def _quote(text: str) -> str:
    return "'" + re.sub(r"[^\w=./@:,+ -]", "", text) + "'"
