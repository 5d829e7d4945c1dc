"""The end of a command: its exit code, and for every error one line on standard error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ..errors import LbgymError
from ._signals import Interrupted
from ._streams import STANDARD_OUTPUT, standard_streams

#: Options that have another name now, by command.
RENAMED = {
    ("lbgym compare", "--interval"): "--step-interval",
    ("lbgym run", "--interval"): "--step-interval",
    ("lbgym run", "--dry-run"): "--shadow",
    ("lbgym dataplane emulate", "--interval"): "--publish-interval",
    ("lbgym shm record", "--interval"): "--sample-interval",
    ("lbgym train", "--policy"): "--network",
}

#: Exit codes beside 0 and 128 + signal.
FAULT, ERROR, CLOSED_PIPE = 1, 2, 141


def exit_code_of(command: Callable[[], None]) -> int:
    """Run a command, report what went wrong, and return the exit code."""
    with standard_streams():
        try:
            try:
                command()
            finally:
                sys.stdout.flush()
            return 0
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0 if end.code is None else FAULT
        except BaseException as error:
            code, message = _judge(error)
            if message:
                print(f"lbgym: {message}", file=sys.stderr)
            if os.environ.get("LBGYM_DEBUG", "") not in ("", "0") and not isinstance(error, KeyboardInterrupt):
                traceback.print_exception(error)
            return code


def _judge(error: BaseException) -> tuple[int, str]:
    """Exit code and message; no message where there is nothing to say."""
    if isinstance(error, Interrupted):
        ended = "interrupted" if error.exit_code == 130 else f"ended by {error}"
        return error.exit_code, ended if error.exit_code else ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, LbgymError):
        return ERROR, f"error: {error}"
    code = getattr(error, "exit_code", None)
    # Typer has Click's exceptions under module names that differ between its versions.
    if isinstance(code, int) and hasattr(error, "format_message"):
        return code, _usage(error)
    if isinstance(code, int) and type(error).__name__ == "Exit":
        return code, ""
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE, ""
    if isinstance(error, OSError) and error.errno is not None:
        return ERROR, f"error: {_system(error)}"
    if isinstance(error, MemoryError):
        return ERROR, "error: out of memory" + (f": {error}" if str(error) else "")
    return FAULT, f"fault: {_fault(error)}; LBGYM_DEBUG=1 shows the traceback"


def _usage(error: BaseException) -> str:
    """A wrong option or argument; the help itself where a command needs one and got none."""
    message, context = error.format_message(), getattr(error, "ctx", None)  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return ""
    option = getattr(error, "option_name", None)
    renamed = None if context is None or option is None else RENAMED.get((context.command_path, option))
    if renamed is not None:
        return f"error: {option} is now {renamed}"
    help_ = f"; see {context.command_path} --help" if context is not None else ""
    return f"error: {' '.join(message.split()).rstrip('.')}{help_}"


def _system(error: OSError) -> str:
    """Describe an error of the system, with its file."""
    reason = error.strerror or str(error)
    if error.filename == STANDARD_OUTPUT:
        return f"cannot write to standard output: {reason}"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, Path))]
    return f"{' to '.join(map(repr, names))}: {reason}" if names else f"{reason} ({_place(error)})"


def _fault(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''} ({_place(error)})"


def _place(error: BaseException) -> str:
    """The innermost line of ours that an error came through, or the innermost of all."""
    here, package = Path(__file__), Path(__file__).parents[1]
    # Every error of a command comes through this file.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) != here]
    if not frames:
        return "no traceback"
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    last = (ours or frames)[-1]
    path = Path(last.filename)
    where = path.relative_to(package.parent) if ours else path.name
    return f"{where}:{last.lineno}"
