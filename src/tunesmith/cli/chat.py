"""`chat MODEL`: a conversation in the terminal, the answer streamed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.place import KeyOption, ServerOption, WorkspaceOption, client_for
from tunesmith.cli.terminal import NOT_FOUND, USAGE, CommandError, tell
from tunesmith.cli.text import clean, is_terminal

if TYPE_CHECKING:
    from tuning_sdk import TuningClient

_HELP = (
    "/exit ends, /reset forgets the conversation, /system TEXT sets the instruction, "
    "/history shows it, /model NAME asks another, /compare A B asks two side by side "
    "(/compare alone ends that), /help"
)


def chat(
    model: Annotated[str, typer.Argument(help="A served model: a name, a folder, a job's output.")],
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this one question and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The instruction before all.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show its answers beside the model's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    server: ServerOption = None,
    api_key: KeyOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Talk to a model. Without a terminal, all of standard input is one question."""
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    options = {name: value for name, value in options.items() if value is not None}
    with client_for(server, api_key, workspace) as client:
        talk = Talk(client, model, options, system, compare)
        if prompt is not None:
            talk.ask(prompt)
        elif sys.stdin.isatty():
            talk.converse()
        else:
            question = sys.stdin.read().strip()
            if not question:
                raise CommandError("standard input is empty", "give a question with -p", USAGE)
            talk.ask(question)


class Talk:
    """One conversation: its turns so far, and how to ask on."""

    def __init__(
        self,
        client: "TuningClient",
        model: str,
        options: dict[str, Any],
        system: str | None,
        other: str | None = None,
    ) -> None:
        self._client, self._model, self._options = client, model, options
        self._system = system
        self._turns: list[dict[str, str]] = []
        self._pair = None if other is None else (model, other)
        """Asked side by side; then answers of neither are remembered, as they differ."""

    def converse(self) -> None:
        """Read lines until /exit or the end of input."""
        _remember_lines()
        tell(f"{self._model} at {self._client.base_url}. {_HELP}")
        for line in _lines():
            if not line:
                continue
            if line in {"/exit", "/quit"}:
                return
            if not self._command(line):
                self._try(line)

    def ask(self, question: str) -> None:
        """Print the answer while it comes; remember both once it is whole."""
        if self._pair is not None:
            self._compare(question, *self._pair)
            return
        messages = [*self._opening(), *self._turns, {"role": "user", "content": question}]
        pieces = self._stream(self._model, messages)
        with waiting(f"{self._model} reads"):
            answer = next(pieces, "")
        print(clean(answer), end="", flush=True)
        for piece in pieces:
            answer += piece
            print(clean(piece), end="", flush=True)
        print(flush=True)
        self._turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    def _compare(self, question: str, *models: str) -> None:
        """The same conversation to both, at once; shown beside each other."""
        from concurrent.futures import ThreadPoolExecutor

        messages = [*self._opening(), *self._turns, {"role": "user", "content": question}]
        with waiting(f"{' and '.join(models)} answer"), ThreadPoolExecutor(len(models)) as pool:
            answers = list(pool.map(lambda one: "".join(self._stream(one, messages)), models))
        _show_beside(models, answers)

    def _try(self, question: str) -> None:
        """Ask; an interrupt stops this answer, an error leaves the conversation as it was."""
        from tunesmith.cli.terminal import explain
        from tuning_sdk import TuningAPIError

        try:
            self.ask(question)
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except (TuningAPIError, CommandError) as error:
            explain(error)

    def _stream(self, model: str, messages: list[dict[str, str]]) -> Iterator[str]:
        from tunesmith.cli.near import near_name
        from tuning_sdk import NotFoundError

        try:
            yield from self._client.chat(model, messages, **self._options)
        except NotFoundError as error:
            message = str(error).rstrip(".")
            if "did you mean" not in message:
                message += near_name(model, self._known())
            raise CommandError(message, "`tunesmith models ls` lists names", NOT_FOUND) from None

    def _known(self) -> list[str]:
        from tuning_sdk import TuningAPIError

        try:
            return [model.id for model in self._client.models.list()]
        except TuningAPIError:
            return []

    def _command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False where it is a question."""
        word, _, rest = line.partition(" ")
        if word == "/help":
            tell(_HELP)
        elif word == "/reset":
            self._turns.clear()
            tell("(forgotten)")
        elif word == "/system":
            self._system = rest.strip() or None
            self._turns.clear()
            tell("(instruction set, conversation forgotten)")
        elif word == "/history":
            self._show_history()
        elif word == "/model" and rest.strip():
            self._model, self._pair = rest.strip(), None
            tell(f"({self._model} from here on, with this conversation)")
        elif word == "/compare":
            self._set_pair(rest.split())
        else:
            return False
        return True

    def _show_history(self) -> None:
        for turn in [*self._opening(), *self._turns]:
            tell(f"{turn['role']}: {turn['content']}")
        if not self._turns:
            tell("(nothing has been said)")

    def _set_pair(self, names: list[str]) -> None:
        if len(names) == 1:
            names = [self._model, *names]
        if len(names) > 2:
            tell("/compare takes two models, or one to compare with this one")
            return
        self._pair = (names[0], names[1]) if names else None
        told = " and ".join(names)
        tell(f"({told} answer side by side)" if names else f"({self._model} alone again)")

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system else []


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A sign of life until the first word; a model may have to be loaded before it."""
    if not is_terminal(sys.stderr):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(clean(text)):
        yield


def _show_beside(titles: Sequence[str], texts: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True)
    for title in titles:
        table.add_column(Text(clean(title)), ratio=1)
    table.add_row(*(Text(clean(text)) for text in texts))
    Console().print(table)


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def _remember_lines() -> None:
    """Arrow keys bring back earlier lines, where the system has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
