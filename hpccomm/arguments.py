"""Command lines: an error names the word that was probably meant, and a shell can ask which words may follow."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from hpccomm.errors import ArgumentError

LIKENESS = 0.6
"""The likeness of two words from which one is taken for a misspelling of the other (difflib's default)."""


def flag_of(name: str) -> str:
    """The flag of an argument, as the user writes it."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the word that was probably meant and the command that lists all."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end with status 2."""
        self.exit(2, f"{self.prog}: {explain(message, self)} ({self.prog} --help)\n")


def explain(message: str, parser: argparse.ArgumentParser) -> str:
    """An argparse error in words of a user, and what was probably meant."""
    for pattern, words in PLAIN_WORDS:
        message = re.sub(pattern, words, message)
    return message + describe_meant(message, parser)


PLAIN_WORDS = (
    (r"^argument (\S+): invalid int value: (.*)$", r"\1 \2: give a whole number"),
    (r"^argument (\S+): invalid float value: (.*)$", r"\1 \2: give a number"),
    (r"^argument (\S+): expected one argument$", r"\1 needs a value behind it"),
    (r"^the following arguments are required: ", "missing: "),
)
"""Sentences of argparse that name no remedy, and ours."""


def describe_meant(message: str, parser: argparse.ArgumentParser) -> str:
    """``; did you mean …?`` for the words of an argparse error; empty where nothing is alike."""
    if re.search(r"unrecognized arguments:(.* )?-np?(=?\d+)?( |$)", message):
        return ": ranks are started with hpccomm-run -n 4 -m hpccomm …"
    return propose(near for word, known in misspellings(message, parser) for near in nearest(word, known))


def propose(found: Iterable[str]) -> str:
    """``; did you mean …?``, the end of an error; empty where nothing was found."""
    words = " ".join(found)
    return f"; did you mean {words}?" if words else ""


def unknown_name(what: str, word: str, known: Iterable[str]) -> ArgumentError:
    """The error for a name that is none of those known: which there are, and which was probably meant."""
    names = list(known)
    return ArgumentError(f"{what}: use one of {', '.join(names)}{propose(nearest(word, names))}")


def misspellings(message: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Iterable[str]]]:
    """The words that an argparse error does not know, each with those that could stand there."""
    wrong = re.search(r"unrecognized arguments: (.*)", message)
    for word in wrong[1].split() if wrong else ():
        if word.startswith("-"):
            yield word.partition("=")[0], list_options(parser)
    choice = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
    if choice:
        yield choice[1], re.findall(r"[\w-]+", choice[2])


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The word that is most like this one, in either case, if one is."""
    spelled = {each.lower(): each for each in known}
    return [spelled[each] for each in difflib.get_close_matches(word.lower(), spelled, 1, cutoff=LIKENESS)]


def list_options(parser: argparse.ArgumentParser) -> list[str]:
    """The long options of a parser and of the commands below it."""
    found = [word for word in parser._option_string_actions if word.startswith("--")]
    return found + [word for each in commands_of(parser).values() for word in list_options(each)]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def complete(parser: argparse.ArgumentParser, words: Sequence[str], begun: str) -> list[str]:
    """The words with which a shell may continue ``begun`` after ``words``, the words behind the program's name."""
    for k, word in enumerate(words):
        if word in commands_of(parser):
            return complete(commands_of(parser)[word], words[k + 1 :], begun)
    last = parser._option_string_actions.get(words[-1]) if words else None
    if last is not None and last.nargs != 0:
        possible = [str(each) for each in last.choices or ()]
    elif begun.startswith("-"):
        possible = list(parser._option_string_actions)
    else:
        possible = [str(each) for action in parser._actions for each in choices_of(action)]
    return sorted(each for each in possible if each.startswith(begun))


def choices_of(action: argparse.Action) -> Iterable[str]:
    """The words that a positional argument takes, if they are known."""
    return () if action.option_strings or not action.choices else action.choices
