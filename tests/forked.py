"""Processes forked from one that has already imported what they need.

Each is a process of its own, with its own memory, folder and environment, as if Python had been started; but torch or
Stable-Baselines3 are imported once, not by every process for seconds. Not for tests of what happens in an import.
"""

from __future__ import annotations

import atexit
import io
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

#: A program that loads the compiled simulator.
WARM = """
import lbgym
env = lbgym.LoadBalanceEnv()
env.reset(seed=0)
env.step(env.action_space.sample())
env.close()
"""
#: Bytes of a request or an answer.
_LARGEST = 1 << 18


class Process:
    """A forked process, as ``subprocess.Popen`` has one.

    Attributes:
        pid: of the process.
        returncode: its exit code, or minus the signal that ended it; None as long as nobody looked, or it runs.
        stdin, stdout: pipes, as text; None where the process has a file or a terminal.
    """

    def __init__(self, template: Template, pid: int, stdin: IO[str] | None, stdout: IO[str] | None) -> None:
        self._template = template
        self._exited = os.pidfd_open(pid)
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._exited], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            os.close(self._exited)
            self.returncode = self._template._ask({"wait": self.pid}, [])
        return self.returncode

    def send_signal(self, number: int) -> None:
        # Until it has been waited for, nobody else can have its number.
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill it, if it still runs, and close the pipes."""
        self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Template:
    """A process with modules imported, of which others are forked.

    Args:
        modules: what it imports; those that are missing are left out.
        then: a program that it runs before it forks.
    """

    def __init__(self, modules: Sequence[str], then: str = "") -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forked", str(theirs.fileno()), then, *modules]
        # Who forks has one thread.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command, env=environment, cwd=Path(__file__).parents[1], pass_fds=[theirs.fileno()]
            )

    def run(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str = "",
        cores: int | None = None,
        timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """The same as ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)``.

        Args:
            arguments: as of Python: ``FILE ...``, ``-m MODULE ...`` or ``-c CODE ...``.
            cores: it may use; None: all.

        Raises:
            subprocess.TimeoutExpired: after ``timeout`` seconds, at which the process is killed.
        """
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(input.encode())
            stdin.seek(0)
            process = self._fork(arguments, [stdin, stdout, stderr], cwd, env, cores)
            try:
                code = process.wait(timeout)
            finally:
                process.close()
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(arguments, code, stdout.read().decode(), stderr.read().decode())

    def start(self, arguments: Sequence[object]) -> Process:
        """The same as ``subprocess.Popen([sys.executable, *arguments], stdin=PIPE, stdout=PIPE, text=True)``."""
        (read_input, write_input), (read_output, write_output) = os.pipe(), os.pipe()
        with open(read_input, "rb") as stdin, open(write_output, "wb") as stdout:
            process = self._fork(arguments, [stdin, stdout, sys.__stderr__], None, None, None)
        process.stdin, process.stdout = open(write_input, "w"), open(read_output)  # noqa: SIM115 - of the process
        return process

    def _fork(
        self,
        arguments: Sequence[object],
        streams: Sequence[Any],
        cwd: Path | None,
        env: Mapping[str, str] | None,
        cores: int | None,
    ) -> Process:
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "cores": cores,
        }
        return Process(self, self._ask(request, [stream.fileno() for stream in streams]), None, None)

    def _ask(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        answer = b""
        with suppress(ConnectionError):
            socket.send_fds(self._channel, [json.dumps(request).encode()], files)
            answer = self._channel.recv(_LARGEST)
        assert answer, f"the template process ended with {self._process.wait()}"
        return int(answer)

    def close(self) -> None:
        """End it; what was forked has ended already."""
        self._channel.close()
        self._process.wait()

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _next_request(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """In a forked process: what it is to do, and its standard streams; in the template: None, once all is done."""
    while True:
        message, files, *_ = socket.recv_fds(channel, _LARGEST, 3)
        if not message:
            return None
        request = json.loads(message)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                return request, files
            for file in files:
                os.close(file)
        channel.send(b"%d" % answer)


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run what was asked for, as Python does that has just been started."""
    code: Any = 0
    try:
        _run(request, files)
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # To free what the template has imported would copy all of its memory first, which takes longer than all the rest.
    os._exit(code or 0)


def _run(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # Where processes that it spawns look for the main module.
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]  # type: ignore[attr-defined]
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for name, number, mode in (("stdin", 0, "rb"), ("stdout", 1, "wb"), ("stderr", 2, "wb")):
        how = "backslashreplace" if name == "stderr" else errors or "strict"
        binary = open(number, mode, closefd=False)  # noqa: SIM115 - for as long as the process lives
        stream = io.TextIOWrapper(binary, encoding, how, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if request["cores"] is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["cores"]])
    options = os.environ.get("PYTHONWARNINGS", "")
    for option in filter(None, options.split(",")):
        warnings.simplefilter(option)  # type: ignore[arg-type]
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv[:] = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        file = Path(first).absolute()
        sys.argv[:] = [first, *rest]
        sys.path[0] = str(file.parent.resolve())
        runpy.run_path(str(file), run_name="__main__")


def _main(channel: str, then: str, *modules: str) -> None:
    for module in modules:
        with suppress(ModuleNotFoundError):
            import_module(module)
    exec(then, {})
    assert len(os.listdir("/proc/self/task")) == 1, "a process with several threads cannot be forked"
    with socket.socket(fileno=int(channel)) as requests:
        request = _next_request(requests)
    if request is not None:
        _become(*request)


if __name__ == "__main__":
    _main(*sys.argv[1:])
