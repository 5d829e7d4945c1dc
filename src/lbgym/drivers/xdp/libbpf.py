"""The few functions of libbpf that the driver needs, by ctypes, so that the package has no compiled extension.

Every function raises OSError with the kernel's reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import DriverError

XDP_ATTACH = 37  # BPF_XDP of enum bpf_attach_type
DRIVER_MODE, GENERIC_MODE = 1 << 2, 1 << 1
NO_EXIST = 1


class _LinkOptions(ctypes.Structure):
    _fields_ = (("sz", c_size_t), ("flags", c_uint32), ("padding", c_uint32))


class _RunOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


_Print = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
_messages: list[str] = []


@_Print
def _remember(_level: int, form: bytes, values: int) -> int:
    buffer = ctypes.create_string_buffer(4096)
    ctypes.CDLL(None).vsnprintf(buffer, c_size_t(len(buffer)), c_char_p(form), c_void_p(values))
    _messages.append(buffer.value.decode(errors="replace").rstrip())
    return 0


@cache
def library() -> ctypes.CDLL:
    """Load libbpf.

    Raises:
        DriverError: if it is not installed, or too old.
    """
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise DriverError("libbpf.so.1 is not installed: install libbpf1 (Debian, Ubuntu) or libbpf (Fedora)") from None
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "libbpf_set_print": (c_void_p, [_Print]),
        "bpf_object__open_mem": (c_void_p, [c_char_p, c_size_t, c_void_p]),
        "bpf_object__load": (c_int, [c_void_p]),
        "bpf_object__close": (None, [c_void_p]),
        "bpf_object__find_map_by_name": (c_void_p, [c_void_p, c_char_p]),
        "bpf_object__find_program_by_name": (c_void_p, [c_void_p, c_char_p]),
        "bpf_object__next_map": (c_void_p, [c_void_p, c_void_p]),
        "bpf_map__name": (c_char_p, [c_void_p]),
        "bpf_map__fd": (c_int, [c_void_p]),
        "bpf_map__set_max_entries": (c_int, [c_void_p, c_uint32]),
        "bpf_map__value_size": (c_uint32, [c_void_p]),
        "bpf_program__fd": (c_int, [c_void_p]),
        "bpf_map_update_elem": (c_int, [c_int, c_void_p, c_void_p, c_uint64]),
        "bpf_map_lookup_elem": (c_int, [c_int, c_void_p, c_void_p]),
        "bpf_map_delete_elem": (c_int, [c_int, c_void_p]),
        "bpf_map_get_next_key": (c_int, [c_int, c_void_p, c_void_p]),
        "bpf_obj_pin": (c_int, [c_int, c_char_p]),
        "bpf_obj_get": (c_int, [c_char_p]),
        "bpf_obj_get_info_by_fd": (c_int, [c_int, c_void_p, POINTER(c_uint32)]),
        "bpf_link_create": (c_int, [c_int, c_int, c_int, POINTER(_LinkOptions)]),
        "bpf_link_detach": (c_int, [c_int]),
        "bpf_prog_test_run_opts": (c_int, [c_int, POINTER(_RunOptions)]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise DriverError(f"libbpf.so.1 has no {name}: version 1.0 or newer is needed") from None
        function.restype, function.argtypes = result, arguments
    lib.libbpf_set_print(_remember)
    return lib


def _checked(result: int, what: str) -> int:
    """Libbpf returns -1 or -errno and sets errno."""
    if result >= 0:
        return result
    number = -result if result < -1 else ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Object:
    """An object file that is open, and loaded by :meth:`load`."""

    def __init__(self, content: bytes) -> None:
        self._lib = library()
        self._content = content  # libbpf reads it again at load
        _messages.clear()
        self._object = self._lib.bpf_object__open_mem(content, len(content), None)
        if not self._object:
            raise DriverError(f"the XDP object cannot be read: {_reason()}")

    def set_entries(self, name: str, entries: int) -> None:
        """Size a map, before it is loaded."""
        _checked(self._lib.bpf_map__set_max_entries(self._map(name), entries), f"map {name}")

    def load(self) -> None:
        """Have the kernel verify the programs and make the maps; raises OSError."""
        _messages.clear()
        _checked(self._lib.bpf_object__load(self._object), "loading the XDP program")

    def map_fd(self, name: str) -> int:
        """A descriptor of a loaded map; it lives as long as the object."""
        return _checked(self._lib.bpf_map__fd(self._map(name)), f"map {name}")

    def value_size(self, name: str) -> int:
        """Bytes of a map's values."""
        return int(self._lib.bpf_map__value_size(self._map(name)))

    def program_fd(self, name: str) -> int:
        """A descriptor of a loaded program; it lives as long as the object."""
        program = self._lib.bpf_object__find_program_by_name(self._object, name.encode())
        if not program:
            raise DriverError(f"the XDP object has no program {name!r}")
        return _checked(self._lib.bpf_program__fd(program), f"program {name}")

    def _map(self, name: str) -> int:
        if name == ".bss":
            # Its name in the object depends on how that was opened.
            found = None
            while found := self._lib.bpf_object__next_map(self._object, found):
                if self._lib.bpf_map__name(found).endswith(b".bss"):
                    return int(found)
        found = self._lib.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise DriverError(f"the XDP object has no map {name!r}")
        return int(found)

    def close(self) -> None:
        """Close its descriptors. Idempotent."""
        if self._object:
            self._lib.bpf_object__close(self._object)
            self._object = None


def log() -> str:
    """What libbpf said since the last object was opened or loaded, the verifier's log included."""
    return "\n".join(_messages)


def _reason() -> str:
    return next((message for message in reversed(_messages) if message), os.strerror(ctypes.get_errno()))


def update(fd: int, key: NDArray[Any], value: NDArray[Any], flags: int = 0) -> None:
    """Set an element of a map."""
    _checked(library().bpf_map_update_elem(fd, _address(key), _address(value), flags), "map update")


def lookup(fd: int, key: NDArray[Any], value: NDArray[Any]) -> bool:
    """Read an element of a map into ``value``; false if there is none."""
    if (result := library().bpf_map_lookup_elem(fd, _address(key), _address(value))) == -errno.ENOENT:
        return False
    _checked(result, "map lookup")
    return True


def delete(fd: int, key: NDArray[Any]) -> None:
    """Delete an element of a map, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _checked(library().bpf_map_delete_elem(fd, _address(key)), "map delete")


def keys(fd: int, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The keys of a map, one at a time; a map that changes meanwhile may show some twice."""
    key = np.zeros((), dtype)
    before: int | None = None
    while library().bpf_map_get_next_key(fd, before, _address(key)) == 0:
        yield key.copy()
        before = _address(key)


def pin(fd: int, path: str) -> None:
    """Give a map, program or link a name in a BPF file system."""
    _checked(library().bpf_obj_pin(fd, os.fsencode(path)), path)


def opened(path: str) -> int:
    """A new descriptor of what is pinned."""
    return _checked(library().bpf_obj_get(os.fsencode(path)), path)


def program_info(fd: int) -> tuple[int, int]:
    """Id of a program, and instructions that the verifier looked at."""
    info = np.zeros(256, np.uint8)
    size = c_uint32(len(info))
    _checked(library().bpf_obj_get_info_by_fd(fd, _address(info), ctypes.byref(size)), "program info")
    return int(info[4:8].view("u4")[0]), int(info[216:220].view("u4")[0])


def attach(program_fd: int, ifindex: int, flags: int) -> int:
    """Attach an XDP program by a link and return the link's descriptor."""
    options = _LinkOptions(sz=ctypes.sizeof(_LinkOptions), flags=flags)
    return _checked(
        library().bpf_link_create(program_fd, ifindex, XDP_ATTACH, ctypes.byref(options)), f"interface {ifindex}"
    )


def detach(link_fd: int) -> None:
    """Take a link's program off its interface, and close the link.

    The kernel does the first by itself as well, but some time after the last close.
    """
    try:
        _checked(library().bpf_link_detach(link_fd), "link")
    finally:
        os.close(link_fd)


class PacketRun:
    """Runs a program on packets of the caller's, without a network (BPF_PROG_TEST_RUN).

    Args:
        fd: of the program.
        size: bytes of the largest packet.
    """

    def __init__(self, fd: int, size: int = 2048) -> None:
        self._fd, self._run = fd, library().bpf_prog_test_run_opts
        self._in, self._out = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size + 512)
        self._options = _RunOptions(
            sz=ctypes.sizeof(_RunOptions), data_in=ctypes.addressof(self._in), data_out=ctypes.addressof(self._out)
        )

    def __call__(self, packet: bytes, repeat: int = 1) -> tuple[int, bytes]:
        """What the program returns for a packet, and the packet as it left it."""
        options = self._options
        ctypes.memmove(self._in, packet, len(packet))
        options.data_size_in, options.data_size_out, options.repeat = len(packet), len(self._out), repeat
        _checked(self._run(self._fd, ctypes.byref(options)), "test run")
        return int(options.retval), ctypes.string_at(self._out, options.data_size_out)

    @property
    def duration(self) -> int:
        """Mean time of one repetition of the last run, ns."""
        return int(self._options.duration)


def run(fd: int, context: NDArray[Any]) -> int:
    """Run a program of type syscall in this process's context."""
    options = _RunOptions(sz=ctypes.sizeof(_RunOptions), ctx_in=_address(context), ctx_size_in=context.nbytes)
    _checked(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)), "running a program")
    return int(options.retval)
