"""lbgym_shm.h from Python: the compiled header, and a region opened by it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lbgym.sharedmemory import Action, Layout, ObservationBuffer, get_include
from tests.sharedmemory.nursery import Say

SHIM = Path(__file__).with_name("c_shim.c")
ANY, READ_WRITE, READ_ONLY = 0, 1, 2
OK, NAME, NOT_FOUND, EXISTS, FORMAT, PERMISSION, NO_ROOM, BUSY, WEIGHTS, OPTION, ROLE, SYSTEM = range(0, -12, -1)
NO_SERVER = 2**32 - 1
FOREVER = 2**64 - 1

_REGION, _U32, _U64, _SIZE, _TEXT, _BOOL = (
    ctypes.c_void_p,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.c_bool,
)
_U32S, _U64S, _F32S, _F64S = (np.ctypeslib.ndpointer(t, flags="C") for t in ("u4", "u8", "f4", "f8"))
_FUNCTIONS: dict[str, tuple[Any, Sequence[Any]]] = {
    "region_size": (_SIZE, []),
    "tries": (ctypes.c_int, []),
    "now": (_U64, []),
    "code_text": (_TEXT, [ctypes.c_int]),
    "total_size": (_U64, [_U32]),
    "frame_offsets": (None, [_U32, _U64S]),
    "action_offsets": (None, [_U32, _U64S]),
    "create": (
        ctypes.c_int,
        [_REGION, _TEXT, _U32, _U32, _U64, ctypes.c_double, ctypes.c_void_p, _TEXT, _U32, ctypes.c_int64, _U32, _BOOL],
    ),
    "attach": (ctypes.c_int, [_REGION, _TEXT, ctypes.c_int]),
    "close_region": (None, [_REGION]),
    "forget": (None, [_REGION]),
    "unlink_region": (ctypes.c_int, [_REGION]),
    "message": (_TEXT, [_REGION]),
    "capacity": (_U32, [_REGION]),
    "mapping": (ctypes.c_void_p, [_REGION]),
    "frame": (ctypes.c_void_p, [_REGION]),
    "action": (ctypes.c_void_p, [_REGION]),
    "safe": (_BOOL, [_REGION]),
    "read_only": (_BOOL, [_REGION]),
    "table": (None, [_REGION, _U32S, _U32S]),
    "latest": (_U64, [_REGION]),
    "is_retired": (_BOOL, [_REGION]),
    "replaced": (_BOOL, [_REGION]),
    "producer_alive": (ctypes.c_int, [_REGION]),
    "agent_alive": (ctypes.c_int, [_REGION]),
    "heartbeat_age": (_U64, [_REGION]),
    "agent_heartbeat_age": (_U64, [_REGION]),
    "read_newest": (ctypes.c_int, [_REGION]),
    "read_earlier": (ctypes.c_int, [_REGION, _U64]),
    "wait_observation": (ctypes.c_int, [_REGION, _U64, _U64]),
    "lock_agent": (ctypes.c_int, [_REGION]),
    "unlock_agent": (None, [_REGION]),
    "write_action": (ctypes.c_int, [_REGION, _U64, _F64S, _U32, _U64]),
    "write_index": (ctypes.c_int, [_REGION, _U64, _F64S, ctypes.c_void_p, _U32, _U64]),
    "index_in_force": (_U32, [_REGION, _F64S]),
    "renew": (ctypes.c_int, [_REGION]),
    "set_num_servers": (ctypes.c_int, [_REGION, _U32]),
    "set_safe_weights": (ctypes.c_int, [_REGION, _F64S, _U32]),
    "set_active": (ctypes.c_int, [_REGION, _U32, _BOOL]),
    "set_stats": (ctypes.c_int, [_REGION, _U32, _F32S]),
    "set_ground_truth": (ctypes.c_int, [_REGION, _U32, _F32S]),
    "set_ground_truth_time": (ctypes.c_int, [_REGION, _U32, _U64]),
    "set_server_state": (ctypes.c_int, [_REGION, _U32, ctypes.c_int]),
    "set_server_name": (ctypes.c_int, [_REGION, _U32, _TEXT]),
    "read_names": (ctypes.c_int, [_REGION]),
    "server_name": (_TEXT, [_REGION, _U32]),
    "is_real": (_BOOL, [_REGION, ctypes.c_uint]),
    "set_counters": (ctypes.c_int, [_REGION, _U32, _U64S]),
    "set_totals": (ctypes.c_int, [_REGION, _U64, _U64, _U64]),
    "publish": (ctypes.c_int, [_REGION, _U64]),
    "heartbeat": (ctypes.c_int, [_REGION]),
    "poll_action": (ctypes.c_int, [_REGION]),
    "wait_action": (ctypes.c_int, [_REGION, _U64]),
    "lease_left": (_U64, [_REGION]),
    "pick": (None, [_REGION, _U64S, _U32S, _SIZE]),
    "largest": (ctypes.c_double, [_F64S, _SIZE]),
    "alias_table": (None, [_F64S, _U32, _U32S, _U32S, _U32S, _F64S]),
}


def run_compiler(language: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The machine's C or C++ compiler with the header's folder, and with all warnings as errors."""
    # Here, because the processes below do without it and pytest.
    from tests.features.test_c_header import STANDARDS, WARNINGS, compiler

    command = [*compiler(language), "-x", language, STANDARDS[language], *WARNINGS, f"-I{get_include()}"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def build(language: str, folder: Path) -> ctypes.CDLL:
    """The shim as a shared library."""
    file = folder / f"shm_{language.replace('+', 'p')}.so"
    done = run_compiler(language, "-O3", "-shared", "-fPIC", "-o", file, SHIM)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return load(str(file))


def load(file: str) -> ctypes.CDLL:
    library = ctypes.CDLL(file)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class NativeError(Exception):
    """A negative code; ``str`` is the region's message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class NativeRegion:
    """An lbgym_shm_region, in memory that was full of something else. Functions of the shim are its methods."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.created = library, False
        size = library.region_size()
        self.memory = ctypes.create_string_buffer(b"\xa5" * size, size)
        self.at = ctypes.addressof(self.memory)

    @classmethod
    def create(
        cls,
        library: ctypes.CDLL,
        name: str,
        num_servers: int = 4,
        *,
        capacity: int = 0,
        interval: int = 250_000_000,
        rate: float = 1.0,
        safe_weights: Sequence[float] | None = None,
        driver: str = "test",
        mode: int = 0o600,
        gid: int = -1,
        features: int = 0x707FF,
        takes_index: bool = False,
    ) -> NativeRegion:
        region = cls(library)
        region.created = True
        safe = None if safe_weights is None else np.ascontiguousarray(safe_weights, np.float64)
        at = None if safe is None else safe.ctypes.data
        code = library.create(
            region.at, name.encode(), num_servers, capacity, interval, rate, at, driver.encode(), mode, gid, features,
            takes_index,
        )  # fmt: skip
        return region._checked(code)

    @classmethod
    def attach(cls, library: ctypes.CDLL, name: str, access: int = ANY) -> NativeRegion:
        region = cls(library)
        return region._checked(library.attach(region.at, name.encode(), access))

    def _checked(self, code: int) -> NativeRegion:
        if code < 0:
            # Closing what could not be opened is harmless.
            self.close()
            raise NativeError(code, self.message)
        return self

    @property
    def message(self) -> str:
        return self.library.message(self.at).decode()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> Any:
            result = function(self.at, *arguments)
            if function.restype is ctypes.c_int and result < 0:
                raise NativeError(result, self.message)
            return result

        return call

    @property
    def layout(self) -> Layout:
        return Layout(self.library.capacity(self.at))

    def observation(self) -> ObservationBuffer:
        """A copy of the private frame."""
        buffer = ObservationBuffer(self.layout)
        ctypes.memmove(buffer.words.ctypes.data, self.library.frame(self.at), buffer.words.nbytes)
        return buffer

    def weights(self) -> Action:
        """A copy of the private action."""
        action = Action(self.layout)
        ctypes.memmove(action.words.ctypes.data, self.library.action(self.at), action.words.nbytes)
        return action

    def in_force(self) -> np.ndarray:
        buffer = self.observation()
        return buffer.weights[: buffer.num_servers].copy()

    def picks(self, hashes: np.ndarray) -> np.ndarray:
        servers = np.empty(len(hashes), np.uint32)
        self.library.pick(self.at, np.ascontiguousarray(hashes, np.uint64), servers, len(hashes))
        return servers

    def set_row(self, server: int, active: bool, stats: Any, counters: Any, truth: Any = None) -> None:
        self.set_active(server, active)
        self.set_stats(server, np.ascontiguousarray(stats, np.float32))
        self.set_counters(server, np.ascontiguousarray(counters, np.uint64))
        if truth is not None:
            self.set_ground_truth(server, np.ascontiguousarray(truth, np.float32))

    def close(self) -> None:
        self.library.close_region(self.at)

    def __enter__(self) -> NativeRegion:
        return self

    def __exit__(self, *_: object) -> None:
        if self.created and self.library.mapping(self.at):
            self.unlink_region()
        self.close()


# Roles of processes that the nursery forks


def produce(say: Say, name: str, file: str) -> None:
    """A producer in C that has published once, and then does nothing."""
    region = NativeRegion.create(load(file), name, 2)
    region.publish(7)
    say("published")
    signal.pause()


def drive(say: Say, name: str, file: str) -> None:
    """An agent in C that has written once, and then does nothing."""
    region = NativeRegion.attach(load(file), name)
    region.write_action(1, np.array([2.0]), 1, 0)
    say("written")
    signal.pause()


def leave_a_child(say: Say, name: str, file: str, forget: bool) -> None:
    """A producer and agent in C with a child that does nothing more, and lives on when they are killed."""
    library = load(file)
    producer = NativeRegion.create(library, name, 1)
    agent = NativeRegion.attach(library, name)
    agent.lock_agent()
    child = os.fork()
    if child == 0:
        if forget:
            producer.forget()
            agent.forget()
        say(os.getpid())
        signal.pause()
    signal.pause()
