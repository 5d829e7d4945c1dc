"""Numba's cache on disk, mended: an entry that is out of date or damaged is a miss, and a failure costs only time.

Numba by itself looks for changes in a function's own file only, though what the function calls is compiled into it;
raises whatever a truncated file makes ``pickle`` raise; and runs machine code of which a part is missing.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import logging
import pickle
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

logger = logging.getLogger("lbgym")

_ROOT = Path(__file__).resolve().parents[1]
_DIGEST_SIZE = hashlib.sha256().digest_size
_warned = False


def _warn(reason: str) -> None:
    """Say once per process that compiled functions are not kept."""
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "cannot keep compiled functions on disk (%s), so every process compiles them again, which may take a "
            "minute; set NUMBA_CACHE_DIR to a directory that can be written",
            reason,
        )


def _module_file(base: Path, name: str) -> Path | None:
    """The file of a module ``name`` (dotted, may be empty) of the package in folder ``base``."""
    path = base.joinpath(*name.split(".")) if name else base
    candidates = [path / "__init__.py", *([path.with_suffix(".py")] if name else [])]
    return next((file for file in candidates if file.is_file()), None)


@cache
def _imports(file: Path) -> frozenset[Path]:
    """The files of this package that a file imports at its top level."""
    found: set[Path | None] = set()
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith(f"{_ROOT.name}.")]
            found.update(_module_file(_ROOT.parent, name) for name in names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = file.parents[node.level - 1]
            elif module.partition(".")[0] == _ROOT.name:
                base = _ROOT.parent
            else:
                continue
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                found.add(_module_file(base, name) or _module_file(base, module))
    return frozenset(path for path in found if path is not None)


@cache
def sources_of(file: Path) -> tuple[Path, ...]:
    """Every file whose code or constants may be compiled into the functions of ``file``: itself and its imports."""
    found: set[Path] = set()
    pending = [file]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending.extend(_imports(path))
    return tuple(sorted(found))


@cache
def source_stamp(file: Path) -> str:
    """A digest of :func:`sources_of` a file."""
    digest = hashlib.sha256()
    for path in sources_of(file):
        content = path.read_bytes()
        digest.update(b"%d\0" % len(content) + content)
    return digest.hexdigest()


class _Files(IndexDataCacheFile):
    """An index and data files, each with a digest; what cannot be read is not there."""

    def __init__(self, cache_path: str, filename_base: str, file: Path) -> None:
        super().__init__(cache_path=cache_path, filename_base=filename_base, source_stamp=None)
        self._file = file

    def _load_index(self) -> dict[Any, str]:
        try:
            self._source_stamp = source_stamp(self._file)
            return dict(super()._load_index())
        except Exception as error:  # pickle raises almost anything; the next save replaces the file
            logger.debug("unreadable index of compiled functions %s: %r", self._index_path, error)
            return {}

    def load(self, key: Any) -> Any:
        name = self._load_index().get(key)
        if name is None:
            return None
        content = Path(self._data_path(name)).read_bytes()
        if _digest(key, content[_DIGEST_SIZE:]) != content[:_DIGEST_SIZE]:
            raise ValueError(f"{self._data_path(name)} is damaged, or of another function")
        return pickle.loads(content[_DIGEST_SIZE:])

    def save(self, key: Any, data: Any) -> None:
        overloads = self._load_index()
        if key not in overloads:
            taken = set(overloads.values())
            overloads[key] = next(name for i in itertools.count(1) if (name := self._data_name(i)) not in taken)
        content = self._dump(data)
        with self._open_for_write(self._data_path(overloads[key])) as file:
            file.write(_digest(key, content) + content)
        self._save_index(overloads)


def _digest(key: Any, content: bytes) -> bytes:
    return hashlib.sha256(repr(key).encode() + content).digest()


class KernelCache(FunctionCache):
    """The compiled forms of one function.

    Raises:
        RuntimeError, OSError: if there is no place for it.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        file = Path(inspect.getfile(function)).resolve()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, file)

    def __bool__(self) -> bool:
        """True if any form of the function, as it is now, is on disk."""
        return bool(self._cache_file._load_index())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # also from the linker, over the machine code
            logger.debug("unreadable compiled function in %s: %r", self._cache_path, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn(f"{self._cache_path}: {getattr(error, 'strerror', None) or repr(error)}")


class NoCache(NullCache):
    """There is no place to keep anything."""

    def __bool__(self) -> bool:
        return False

    def save_overload(self, sig: Any, data: Any) -> None:
        _warn("neither NUMBA_CACHE_DIR nor the package's folder nor the user's cache can be written")


def cache_of(function: Any) -> KernelCache | NoCache:
    """The cache of a function's compiled forms."""
    try:
        return KernelCache(function)
    except (RuntimeError, OSError):
        return NoCache()


def is_compiled(function: Any) -> bool:
    """True if calling a kernel for the first time loads it, or needs no compiler at all."""
    return bool(getattr(function, "_cache", True))


def is_kept(function: Any) -> bool:
    """True if a kernel, once compiled, stays so for other processes."""
    return not isinstance(getattr(function, "_cache", None), NoCache)
