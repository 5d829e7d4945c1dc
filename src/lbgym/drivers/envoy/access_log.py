"""Flow completion times from Envoy's access log: :class:`LogFile`, and by gRPC :class:`LogService`."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..base import DriverError
from ..proxy import Log
from ..proxy.processes import Connection
from .endpoints import place_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: What an access log in a file must have in a line.
LOG_FORMAT = "lbgym1 %UPSTREAM_CLUSTER% %UPSTREAM_HOST% %DURATION% %RESPONSE_FLAGS%"

_LINE = re.compile(rb"lbgym1 (\S+) (\S+) (\d{1,15}) (\S+)")
#: Flags of flows that the client has ended, whose time says as much as that of one without any.
_TIMED = frozenset((b"-", b"DC", b"DR"))
#: Seconds between looks at the file.
_LOOK = 0.02


class LogFile(Log):
    """Follows an access log in a file, with lines of :data:`LOG_FORMAT`, from its end on and through rotations.

    Args:
        path: of the file; it may come later.

    Raises:
        DriverError: if it may not be read.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._rest = b""
        self._stream: BinaryIO | None = None
        try:
            self._open(os.SEEK_END)
        except OSError as error:
            raise DriverError(f"cannot read Envoy's access log {path}: {error.strerror or error}") from error
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lbgym-envoy-log", daemon=True)
        self._thread.start()

    def _open(self, where: int) -> None:
        try:
            self._stream = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise
            return
        self._stream.seek(0, where)

    def _run(self) -> None:
        while not self._end.wait(_LOOK):
            try:
                self._read()
            except OSError:
                # Whatever it is, it may be over at the next look.
                continue

    def _read(self) -> None:
        if self._stream is None:
            self._open(os.SEEK_SET)
        stream = self._stream
        if stream is None:
            return
        self._note(stream)
        there = os.fstat(stream.fileno())
        if there.st_size < stream.tell():
            # Cut short, as by copytruncate.
            stream.seek(0)
            self._rest = b""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        if (now.st_dev, now.st_ino) != (there.st_dev, there.st_ino):
            self._note(stream)
            stream.close()
            self._rest = b""
            self._open(os.SEEK_SET)

    def _note(self, stream: BinaryIO) -> None:
        while part := stream.read(1 << 20):
            *lines, self._rest = (self._rest + part).split(b"\n")
            now = time.monotonic()
            with self._lock:
                for line in lines:
                    found = _LINE.search(line)
                    if found is None:
                        continue
                    cluster, host, milliseconds, flags = found.groups()
                    self._received += 1
                    if host != b"-":
                        timed = flags in _TIMED
                        seconds = int(milliseconds) * 1e-3 if timed else None
                        failed = not timed and flags.startswith(b"U")
                        names = cluster.decode("utf-8", "replace"), host.decode("utf-8", "replace")
                        self._note_flow(*names, now, seconds, failed)

    def _stop(self) -> None:
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        if self._stream is not None:
            self._stream.close()


#: Kinds of entries that are made at the end of a flow: by TCP, by HTTP, and by an Envoy too old to say.
_ENDS = (0, 3, 6)


class LogService(Log):
    """Envoy's gRPC access log service: the entries that ``TcpGrpcAccessLogConfig`` and the like send."""

    def __init__(self) -> None:
        super().__init__()
        self._server: Connection | None = None

    def serve(self, server: Connection) -> None:
        """Close a server with this log, for which alone it is there."""
        self._server = server

    async def stream(self, messages: AsyncIterator[Any], _context: Any) -> Any:
        """Take the entries of one Envoy."""
        from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsResponse

        async for message in messages:
            now = time.monotonic()
            with self._lock:
                for entry in message.tcp_logs.log_entry or message.http_logs.log_entry:
                    self._entry(entry.common_properties, now)
        return StreamAccessLogsResponse()

    def _entry(self, entry: Any, now: float) -> None:
        if entry.access_log_type not in _ENDS:
            return
        self._received += 1
        address = entry.upstream_remote_address
        if address.HasField("socket_address"):
            host = place_key(address.socket_address.address, address.socket_address.port_value)
        elif address.HasField("pipe"):
            host = address.pipe.path
        else:
            return
        flags = [field.name for field, _ in entry.response_flags.ListFields()]
        timed = all(flag.startswith("downstream_") for flag in flags)
        duration = entry.duration
        seconds = duration.seconds + duration.nanos * 1e-9 if timed and entry.HasField("duration") else None
        failed = any(flag.startswith("upstream_") for flag in flags)
        self._note_flow(entry.upstream_cluster, host, now, seconds, failed)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()


__all__ = ["LOG_FORMAT", "LogFile", "LogService"]
