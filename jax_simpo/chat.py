"""Talks with a model: reads lines, streams its answers, and keeps the conversation.

On a terminal the user types the lines; otherwise they are read from standard input, so a file of lines is a
conversation too. Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import jax
from rich.console import Console

from jax_simpo.data.messages import BadRow, Message
from jax_simpo.models.dialogue import Dialogue
from jax_simpo.models.generate import Generation
from jax_simpo.models.transformer import Params
from jax_simpo.run import signals
from jax_simpo.terminal import visible
from jax_simpo.training.setup import Setup

HELP = "/reset forgets the conversation, /quit ends; Ctrl-C stops an answer"
_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character


class Chat:
    """A conversation of a user with a model."""

    def __init__(self, setup: Setup, params: Params, asked: Generation, console: Console, system: str | None) -> None:
        """Starts a conversation.

        Args:
            setup: the setup of the model.
            params: its parameters on the mesh.
            asked: how it answers.
            console: where notes go.
            system: the system turn that every conversation begins with; None for none.
        """
        self._setup, self._asked, self._console = setup, asked, console
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        forward = setup.forward
        with jax.set_mesh(setup.mesh):
            self.dialogue = Dialogue(forward, params, setup.mesh)
        self._turns = list(self._system)
        self._number = 0  # of answers, also before a reset: the same question again is answered by other draws

    def run(self) -> None:
        """Answers line after line, until there are no more or one of them is `/quit`."""
        self._console.print(HELP)
        for line in _read_lines():
            if line == "/quit":
                return
            if line == "/reset":
                self._turns = list(self._system)
                self._console.print("the conversation is forgotten")
            elif line.startswith("/"):
                self._console.print(f"{line.split()[0]} is no command: {HELP}. A space before the slash sends the line")
            elif line.strip():
                self._answer(line.strip())

    def _answer(self, text: str) -> None:
        """Adds a turn of the user's and the model's answer to it, which is printed as it comes."""
        turns = [*self._turns, {"role": "user", "content": text}]
        try:
            ids = self._setup.prompt_encoder.encode(turns)
        except BadRow as error:
            self._console.print(f"{error}; the turn is left out", style="yellow")
            return
        stopped = threading.Event()
        answer: list[int] = []
        with jax.set_mesh(self._setup.mesh), signals.interrupting(stopped.set):
            tokens = self.dialogue.answer(ids, self._asked, self._number)
            written = self._print_stream(tokens, answer, stopped)
        if stopped.is_set():
            self._console.print("(stopped)", style="yellow")
        elif len(answer) == self._asked.max_new_tokens:
            self._console.print(f"(cut at {len(answer)} tokens; --max_new_tokens sets more)", style="yellow")
        self._turns = [*turns, {"role": "assistant", "content": written}]
        self._number += 1

    def _print_stream(self, tokens: Iterator[int], answer: list[int], stopped: threading.Event) -> str:
        """Prints the text of tokens as they come and collects them in `answer`; returns the whole text."""
        shown = ""
        for token in tokens:
            answer.append(token)
            text = self._decode(answer)
            if not text.endswith(_UNFINISHED) and text.startswith(shown):
                print(visible(text[len(shown) :]), end="", flush=True)
                shown = text
            if stopped.is_set():
                break
        text = self._decode(answer)
        print(visible(text.removeprefix(shown)), flush=True)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._setup.tokenizer.decode(ids, skip_special_tokens=True))


def _read_lines() -> Iterator[str]:
    """Yields the lines that the user types, or those of standard input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    import readline  # noqa: F401 - lets `input` edit a line and remember former ones

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
