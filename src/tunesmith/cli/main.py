"""``tunesmith VERB ...``: find the verb's module, run it, turn errors into exit codes.

The module of a verb is imported only when the verb is called, and imports torch only inside its function, so
that ``--help`` answers at once. A new verb is one file here and one line in ``VERBS``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tunesmith import __version__, files
from tunesmith.cli import garbage_collection, output
from tunesmith.errors import TunesmithError, UserError

if TYPE_CHECKING:
    from typer._click import Command, Context  # these types have no public name

# verb: (module:name of a function or of a typer app, the line shown by `tunesmith --help`)
VERBS = {
    "train": ("tunesmith.cli.train:train", "Train a model from a recipe."),
    "launch": ("tunesmith.cli.launch:launch", "Train with several processes on this machine."),
    "pipeline": (
        "tunesmith.cli.pipeline:pipeline",
        "Train several stages in order, each on an earlier result.",
    ),
    "check": ("tunesmith.cli.check:check", "Check a recipe before training: data, masks, steps, parameters."),
    "init": ("tunesmith.cli.init:init", "Write a commented recipe."),
    "evaluate": ("tunesmith.cli.evaluate:evaluate", "Evaluate a model on a data file."),
    "predict": ("tunesmith.cli.predict:predict", "Predict classes, entities or answers for rows."),
    "score": ("tunesmith.cli.score:score", "Score answers with a reward model, and rank several."),
    "generate": ("tunesmith.cli.generate:generate", "Answer a prompt, or every prompt of a file."),
    "compare": (
        "tunesmith.cli.compare:compare",
        "Compare models on the same rows: every figure with its interval.",
    ),
    "judge": ("tunesmith.cli.judge:judge", "Let a model judge which of several systems answers better."),
    "chat": ("tunesmith.cli.chat:chat", "Chat with a model."),
    "show": ("tunesmith.cli.show:show", "Describe a model folder without loading it."),
    "verify": ("tunesmith.cli.verify:verify", "Compare the files of a model or a run with what was saved."),
    "merge": ("tunesmith.cli.merge:merge", "Merge a LoRA into its base model."),
    "adapters": ("tunesmith.cli.adapters:app", "List adapters, and combine several into one."),
    "models": ("tunesmith.cli.models:app", "List, pull and convert models."),
    "runs": ("tunesmith.cli.runs:app", "List, show, compare and repeat runs."),
    "data": ("tunesmith.cli.data:app", "Preview, lint, make and pull data."),
}


class Verbs(TyperGroup):
    """Lists the verbs from ``VERBS``; imports only the one that is called."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in VERBS else command, rest


def load(verb: str) -> Command:
    """Import the module of a verb and return its command."""
    path, help_line = VERBS[verb]
    module, _, name = path.partition(":")
    target = getattr(importlib.import_module(module), name)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(verb)(target)
        target = app
    command: Command = typer.main.get_command(target)
    command.name = verb
    command.help = command.help or help_line
    return command


Reporter = Callable[[BaseException, int, bool], int]
"""Gets an error, its exit code and whether --json was given; returns the exit code."""


def main(argv: list[str] | None = None, report: Reporter = output.report_error) -> int:
    """Run one command line. Returns 0 done, 1 a bug, 2 wrong input, 3 training stopped itself, 130 interrupted.

    Text that stdout holds back is written before the return, so that a full disk cannot swallow a result."""
    code, full = _run(argv, report), output.disk_error()
    return report(full, full.exit_code, False) if full and not code else code


def _run(argv: list[str] | None, report: Reporter) -> int:
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    debug = bool(os.environ.get("TUNESMITH_DEBUG"))
    if not debug:  # warnings of libraries are nothing that the user can act on
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with output.reserve_stdout() if as_json else contextlib.nullcontext():
            code = typer.main.get_command(_app())(args, prog_name="tunesmith", standalone_mode=False)
        if code == 130:  # typer returns 130 for Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TunesmithError as error:
        if debug:
            traceback.print_exc()
        return report(error, error.exit_code, as_json)
    except typer.TyperException as error:  # an unknown option, a missing argument
        if advice := _flag_advice(error, args):
            return report(UserError(advice), 2, as_json)
        if as_json:
            return report(error, 2, as_json)
        usage: Any = error
        usage.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return report(KeyboardInterrupt("interrupted"), 130, as_json)
    except Exception as error:  # noqa: BLE001 - every other exception is a bug in tunesmith, or a full disk
        path = error.filename if isinstance(error, OSError) else None
        if full := files.disk_error(error, path or f"a file or {output.STDOUT}"):
            return report(full, full.exit_code, as_json)
        return report(_bug_report(error, debug), 1, as_json)


def _flag_advice(error: Any, args: list[str]) -> str | None:
    """Return advice for an unknown option of a command that takes recipe keys.

    ``error`` is untyped, because typer has no public name for its class of an unknown option."""
    flag = vars(error).get("option_name")
    context = vars(error).get("ctx")
    if flag is None or context is None or "overrides" not in {one.name for one in context.command.params}:
        return None
    from tunesmith.recipe import flag_advice

    places = [index for index, word in enumerate(args) if word == flag or word.startswith(f"{flag}=")]
    if not places:
        return None
    place = places[0]
    value = args[place].partition("=")[2] or next(iter(args[place + 1 : place + 2]), "")
    return flag_advice(flag, None if not value or value.startswith("--") else value)


def exit_program(code: int) -> NoReturn:
    """End the process; skip the exit handlers if a tracker hangs, because they would wait for it."""
    trackers = sys.modules.get("tunesmith.runs.trackers")
    if trackers is not None and trackers.any_running():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def program() -> NoReturn:
    """Entry point of the command ``tunesmith``."""
    gc.set_threshold(garbage_collection.NEW_OBJECTS)
    exit_program(main())


def _bug_report(error: Exception, debug: bool) -> Exception:
    if debug:
        where = "above"
        traceback.print_exc()
    else:
        details = f"tunesmith {__version__}, Python {sys.version}, {sys.platform}\n{sys.argv}\n\n"
        try:
            handle, path = tempfile.mkstemp(prefix="tunesmith-bug-", suffix=".txt", text=True)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(details + traceback.format_exc())
            where = f"in {path}"
        except OSError as full:
            where = f"(no file could be written for it: {full.strerror})"
    return RuntimeError(
        f"{type(error).__name__}: {error}\n  This is a bug in tunesmith. Please report it with the traceback {where}, "
        "the command line and the recipe (TUNESMITH_DEBUG=1 shows tracebacks)."
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


_Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version)]


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=Verbs, add_completion=False, no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Fine-tune language models, correctly and fast.",
    )  # fmt: skip

    @app.callback()
    def root(version: _Version = False) -> None:
        pass

    for verb, (_, help_line) in VERBS.items():
        app.command(verb, help=help_line)(_placeholder)
    return app


def _placeholder() -> None:
    """Fills the list of ``--help``; ``Verbs.resolve_command`` replaces it with the real command."""
