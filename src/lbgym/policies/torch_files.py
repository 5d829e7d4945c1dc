"""Read files of ``torch.save`` with NumPy alone: tensors become arrays, and nothing is executed.

Such a file is a zip archive: ``data.pkl``, a pickle in which every tensor names its storage, and the storages as plain
bytes, ``data/0``, ``data/1``, ... (torch/serialization.py). Of all that a pickle can call, only what makes tensors and
ordered dictionaries is allowed here.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def load_arrays(content: bytes) -> Any:
    """The object that ``torch.save`` wrote, with NumPy arrays in place of its tensors.

    Args:
        content: of the file.

    Raises:
        ValueError: for what is no such file, or holds anything but tensors and plain data.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
            return _Reader(archive, pickled).load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a file of torch.save: {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive, self._folder = archive, pickled.removesuffix("data.pkl")
        order = f"{self._folder}byteorder"
        big = order in archive.namelist() and archive.read(order) == b"big"
        self._order: Literal["<", ">"] = ">" if big else "<"
        self._storages: dict[str, NDArray[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _array
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name]).newbyteorder(self._order)
        raise ValueError(f"a file of tensors and plain data needs no {module}.{name}")

    def persistent_load(self, reference: Any) -> NDArray[Any]:
        _, dtype, key, *_ = reference
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype)
        return self._storages[key]


def _array(storage: NDArray[Any], offset: int, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """A tensor as torch takes it apart; strides and offset count elements."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if min(offset, *stride, *size, 0) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    steps = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps, writeable=False)
    return view.astype(storage.dtype.newbyteorder("="))
