"""``tunesmith VERB ...``: find the verb's module, run it, turn errors into exit codes.

A verb's module is imported only when that verb is called, and imports torch only inside its function, so that ``--help``
answers at once. A new verb is one file here and one line in ``VERBS``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tunesmith import __version__
from tunesmith.cli import output
from tunesmith.errors import TunesmithError

# verb: (module:name of a function or of a typer app, the line shown by `tunesmith --help`)
VERBS = {
    "train": ("tunesmith.cli.train:train", "Train a model as a recipe says."),
    "launch": ("tunesmith.cli.launch:launch", "Train with several processes on this machine."),
    "check": (
        "tunesmith.cli.check:check",
        "Tell all that can be known before training: data, masks, steps, parameters.",
    ),
    "init": ("tunesmith.cli.init:init", "Write a commented recipe."),
    "evaluate": ("tunesmith.cli.evaluate:evaluate", "Figures of a model on a data file."),
    "predict": ("tunesmith.cli.predict:predict", "Classes, entities or answers for every row of a file."),
    "score": ("tunesmith.cli.score:score", "Rewards of answers by a reward model, and the order of several."),
    "generate": ("tunesmith.cli.generate:generate", "Answer a prompt, or every prompt of a file."),
    "chat": ("tunesmith.cli.chat:chat", "Talk with a model."),
    "show": ("tunesmith.cli.show:show", "What a model folder is, without loading it."),
    "merge": ("tunesmith.cli.merge:merge", "Fold a LoRA into its base model."),
    "adapters": ("tunesmith.cli.adapters:app", "List adapters, and combine several into one."),
    "models": ("tunesmith.cli.models:app", "List and pull models."),
    "runs": ("tunesmith.cli.runs:app", "List, show, compare and repeat runs."),
    "data": ("tunesmith.cli.data:app", "Preview, lint and make data."),
}


class Verbs(TyperGroup):
    """Lists the verbs from ``VERBS``; imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in VERBS else command, rest


def load(verb: str) -> Any:
    """The command of one verb, its module imported."""
    path, help_line = VERBS[verb]
    module, _, name = path.partition(":")
    target = getattr(importlib.import_module(module), name)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(verb)(target)
        target = app
    command: Any = typer.main.get_command(target)
    command.name = verb
    command.help = command.help or help_line
    return command


def main(argv: list[str] | None = None, fail: Callable[[BaseException, int, bool], int] = output.fail) -> int:
    """Run one command line and return its exit code: 0 done, 1 a bug of ours, 2 the user's input, 3 stopped, 130 interrupted.

    ``fail`` reports an error and returns its exit code.
    """
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    debug = bool(os.environ.get("TUNESMITH_DEBUG"))
    if not debug:  # a library's remarks are not the user's business
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with output.only_result() if as_json else contextlib.nullcontext():
            code = typer.main.get_command(_app())(args, prog_name="tunesmith", standalone_mode=False)
        if code == 130:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TunesmithError as error:
        if debug:
            traceback.print_exc()
        return fail(error, error.exit_code, as_json)
    except typer.TyperException as error:  # an unknown option, a missing argument
        if as_json:
            return fail(error, 2, as_json)
        usage: Any = error
        usage.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return fail(KeyboardInterrupt("interrupted"), 130, as_json)
    except Exception as error:  # noqa: BLE001 - the last line of defence: whatever arrives here is a bug of ours
        return fail(_bug(error, debug), 1, as_json)


def leave(code: int) -> NoReturn:
    """End the program. A tracker that hangs has handlers of its own that would wait for it: then without them."""
    trackers = sys.modules.get("tunesmith.runs.trackers")
    if trackers is not None and trackers.left():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def program() -> NoReturn:
    """The command ``tunesmith``."""
    leave(main())


def _bug(error: Exception, debug: bool) -> Exception:
    if debug:
        where = "above"
        traceback.print_exc()
    else:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tunesmith-bug-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(
                f"tunesmith {__version__}, Python {sys.version}, {sys.platform}\n{sys.argv}\n\n{traceback.format_exc()}"
            )
        where = f"in {file.name}"
    return RuntimeError(
        f"{type(error).__name__}: {error}\n  This is a bug in tunesmith. Please report it with the traceback {where}, "
        "the command line and the recipe (TUNESMITH_DEBUG=1 shows tracebacks)."
    )


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=Verbs,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Fine-tune language models, correctly and fast.",
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=_version)
        ] = False,
    ) -> None:
        pass

    for verb, (_, help_line) in VERBS.items():
        app.command(verb, help=help_line)(_listed)
    return app


def _listed() -> None:
    """Stands for a verb in the list of ``--help``; ``Verbs.resolve_command`` puts the real one in its place."""


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()
