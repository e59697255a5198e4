"""``hpccomm completion bash``: the lines that let a shell complete commands and flags.

The shell asks the program itself, so completion knows what the installed version knows.
"""

from __future__ import annotations

import argparse

BASH = """_hpccomm() {
    local IFS=$'\\n'
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    # shellcheck disable=SC2207 # zsh has no mapfile
    COMPREPLY=($(hpccomm completion --words "${words[@]/#/+}" 2>/dev/null))
    [ -n "${COMPREPLY[*]}" ] || compopt -o default
}
complete -F _hpccomm hpccomm
"""

SHELLS = {
    "bash": BASH,
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + BASH.replace("compopt -o default", "true"),
    "fish": "complete -c hpccomm -a "
    "'(hpccomm completion --words (string replace -r \"^\" + -- (commandline -opc)[2..] (commandline -ct)))'\n",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "bash: echo 'eval \"$(hpccomm completion bash)\"' >> ~/.bashrc"
    parser.add_argument("shell", nargs="?", choices=SHELLS, help="print the lines for this shell")
    parser.add_argument("--words", nargs="*", help="print what may follow: +word for each, the last one unfinished")


def run(args: argparse.Namespace) -> int:
    """Print."""
    if args.words is None:
        print(SHELLS[args.shell or "bash"], end="")
        return 0
    for word in complete_words([word.removeprefix("+") for word in args.words]):
        print(word)
    return 0


def complete_words(words: list[str]) -> list[str]:
    """The words with which the last one may go on."""
    from hpccomm.__main__ import parser
    from hpccomm.arguments import complete

    *before, begun = words or [""]
    if before[:1] == ["bench"] and len(before) == 1:
        from hpccomm.bench.cases import CASES

        return sorted(name for name in CASES if name.startswith(begun))
    if before[:1] == ["bench"]:
        from hpccomm.bench import flags, nccl_flags
        from hpccomm.bench.cases import CASES
        from hpccomm.errors import ArgumentError

        try:
            name, _, nccl = flags.read_name(before[1], before[2:])
        except ArgumentError:
            return []
        made = flags.parser(name, nccl or nccl_flags.is_meant(before)) if name in CASES else parser("bench")
        return complete(made, before[2:], begun)
    return complete(parser(before[0] if before else None), before, begun)
