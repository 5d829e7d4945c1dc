"""HAProxy's runtime API: persistent connections to its processes, and what they say."""

from __future__ import annotations

import csv
import errno
import re
import socket
from dataclasses import dataclass

from ..base import DriverError
from ..proxy import Followed, Place, Process, shown

#: The oldest version whose answers are understood.
OLDEST = (2, 4)
#: Rules of ``balance`` that follow weights while HAProxy runs, and that do not; of hashes the consistent ones do.
_WEIGHTED, _UNWEIGHTED = ("roundrobin", "leastconn", "random"), ("static-rr", "first")
_PROMPT = b"\n> "
#: Seconds to wait for an answer.
_TIMEOUT = 2.0


class Connection:
    """A persistent connection to one process of HAProxy.

    Args:
        place: path of its ``stats socket``, or host and port.

    Raises:
        DriverError: if nobody answers there, or may not be asked.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        try:
            if isinstance(place, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    self._socket.settimeout(_TIMEOUT)
                    self._socket.connect(place)
                except BaseException:
                    self._socket.close()
                    raise
            else:
                self._socket = socket.create_connection(place, _TIMEOUT)
        except OSError as error:
            raise DriverError(_unreachable(place, error)) from error
        try:
            # From here on the connection outlives an answer.
            self.ask("prompt")
        except BaseException:
            self.close()
            raise

    def ask(self, *commands: str) -> list[str]:
        """The answers to commands, sent together.

        Raises:
            DriverError: if they do not come.
        """
        answers: list[str] = []
        try:
            self._socket.sendall("".join(f"{command}\n" for command in commands).encode())
            data = bytearray()
            start = 0
            while len(answers) < len(commands):
                part = self._socket.recv(1 << 16)
                if not part:
                    raise DriverError(f"HAProxy has closed the connection to {shown(self._place)}")
                data += part
                while (end := data.find(_PROMPT, max(0, start))) >= 0 and len(answers) < len(commands):
                    answers.append(data[:end].decode("utf-8", "replace").strip())
                    del data[: end + len(_PROMPT)]
                    start = 0
                start = len(data) - len(_PROMPT)
        except OSError as error:
            raise DriverError(f"HAProxy does not answer at {shown(self._place)}: {error.strerror or error}") from error
        return answers

    def close(self) -> None:
        """Close it. Idempotent."""
        self._socket.close()


def _unreachable(place: Place, error: OSError) -> str:
    where = shown(place)
    if isinstance(error, FileNotFoundError):
        return f"there is no socket {where}: does HAProxy run, with 'stats socket {where} level admin' in 'global'?"
    if isinstance(error, PermissionError):
        return f"no right to use HAProxy's socket {where}: let this user in by its 'mode', 'user' or 'group'"
    if error.errno in (errno.ECONNREFUSED, errno.ENOTSOCK):
        return f"nobody answers at {where}: is it the 'stats socket' of a HAProxy that runs?"
    return f"cannot connect to HAProxy's socket {where}: {error.strerror or error}"


@dataclass(slots=True)
class Server:
    """A server as a process sees it.

    Attributes:
        name: within its backend.
        operational: srv_op_state: 0 down, 1 starting, 2 running, 3 stopping.
        administrative: flags of srv_admin_state.
        weight, configured: now, and as in the configuration.
        agent: flags of srv_agent_state.
        backup: it takes flows only while no other server does.
        open: flows it has, or that wait for it.
        ended: flows that it had and has no more, since the process began.
        failed: those of them that the server did not answer, broke off, or that went on to another server.
        refused: connections that it did not take.
        attempts: to connect, since the process began.
    """

    name: str
    operational: int
    administrative: int
    weight: int
    configured: int
    agent: int
    backup: bool
    open: int
    ended: int
    failed: int
    refused: int
    attempts: int


@dataclass(slots=True)
class Backend:
    """A backend as a process sees it.

    Attributes:
        rule: of ``balance``; empty if the connection has not the right to know.
        mode: "tcp" or "http".
        unrouted: flows that found no server, since the process began.
        servers: by name.
    """

    rule: str
    mode: str
    unrouted: int
    servers: dict[str, Server]


class HaproxyProcess(Process):
    """A process of HAProxy.

    Attributes:
        connection: to it; as long as it lasts, a process that is stopping does not end.
        pid: of the process.
        dropped_logs: log lines that it could not send.
    """

    connection: Connection

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.pid = self.dropped_logs = 0

    def look(self) -> None:
        (answer,) = self.connection.ask("show info")
        info = dict(line.split(": ", 1) for line in answer.splitlines() if ": " in line)
        try:
            self.pid = int(info["Pid"])
            self.identity = self.pid, int(info.get("Start_time_sec", 0))
            self.version = info["Version"]
            self.stopping = info.get("Stopping", "0") != "0"
            self.idle = int(info["CurrConns"]) == 0
            self.dropped_logs = int(info.get("DroppedLogs", 0))
        except (KeyError, ValueError):
            raise DriverError(f"this is no HAProxy: it answers 'show info' by {answer[:60]!r}") from None
        found = re.match(r"(\d+)\.(\d+)", self.version)
        if found is None or tuple(map(int, found.groups())) < OLDEST:
            raise DriverError(f"HAProxy {self.version} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed")
        if int(info.get("Nbproc", 1)) > 1:
            raise DriverError("HAProxy runs with 'nbproc', of whose processes one alone answers; use 'nbthread'")

    def backend(self, name: str) -> Backend | None:
        """What it says of a backend; None if it has none of this name.

        Raises:
            DriverError: if it does not answer.
        """
        states, statistics = self.connection.ask(f"show servers state {name}", f"show stat {name} 6 -1")
        if "Can't find" in states or not states.startswith("1\n"):
            return None
        state_rows = _table(states.partition("\n")[2], " ")
        mine = {row["srv_name"]: row for row in state_rows if row["be_name"] == name}
        backend, servers = None, {}
        for row in _table(statistics, ","):
            if row["pxname"] != name:
                continue
            if row["svname"] == "BACKEND":
                backend = row
            elif row["svname"] in mine:
                servers[row["svname"]] = _server(row, mine[row["svname"]])
        if backend is None:
            return None
        refused = sum(server.refused for server in servers.values())
        return Backend(
            backend.get("algo", ""), backend.get("mode", ""), max(0, _int(backend, "econ") - refused), servers
        )

    def change(self, *commands: str) -> None:
        """Give commands that answer nothing.

        Raises:
            DriverError: with HAProxy's answer to the first that is refused.
        """
        if not commands:
            return
        for command, answer in zip(commands, self.connection.ask(*commands), strict=True):
            if answer:
                raise DriverError(f"HAProxy refuses {command!r}: {answer.splitlines()[0]}")


def _table(text: str, separator: str) -> list[dict[str, str]]:
    rows = list(csv.reader(text.removeprefix("# ").splitlines(), delimiter=separator))
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:] if row] if rows else []


def _int(row: dict[str, str], key: str) -> int:
    return int(row.get(key) or 0)


def _server(row: dict[str, str], state: dict[str, str]) -> Server:
    now, queued, tried = _int(row, "scur"), _int(row, "qcur"), _int(row, "stot")
    refused = _int(row, "econ")
    return Server(
        name=row["svname"],
        operational=_int(state, "srv_op_state"),
        administrative=_int(state, "srv_admin_state"),
        weight=_int(state, "srv_uweight"),
        configured=_int(state, "srv_iweight"),
        agent=_int(state, "srv_agent_state"),
        backup=_int(row, "bck") > 0,
        open=now + queued,
        # HAProxy counts every attempt as a session.
        ended=max(0, tried - _int(row, "wretr") - now),
        failed=refused + _int(row, "eresp") + _int(row, "wredis"),
        refused=refused,
        attempts=tried,
    )


class Haproxy(Followed[HaproxyProcess]):
    """A HAProxy, followed through restarts and reloads; shared by the backends that are driven.

    The connections to its processes also keep those that are stopping from ending unseen.

    Args:
        place: path of its ``stats socket``, or host and port.

    Attributes:
        dropped_logs: log lines that HAProxy says it could not send, since this object exists.

    Raises:
        DriverError: if it does not answer, or is too old.
    """

    proxy = "HAProxy"

    def __init__(self, place: Place) -> None:
        self.dropped_logs = 0
        super().__init__(place)

    def _open(self) -> HaproxyProcess:
        return HaproxyProcess(Connection(self.place))

    def _look_at(self, process: HaproxyProcess) -> None:
        before = process.dropped_logs
        process.look()
        self.dropped_logs += max(0, process.dropped_logs - before)


def check_rule(process: HaproxyProcess, name: str, backend: Backend) -> None:
    """Refuse rules of ``balance`` that do not follow weights while HAProxy runs, and leave the weights as they are.

    Raises:
        DriverError: with the rule, or without the right to set weights.
    """
    refusal = (
        f"backend {name!r} has 'balance {backend.rule or '?'}', which does not follow weights while HAProxy runs; use "
        "roundrobin, leastconn or random"
    )
    if backend.rule in _UNWEIGHTED:
        raise DriverError(refusal)
    for server in backend.servers.values():
        weight = server.weight
        if backend.rule not in _WEIGHTED and weight:
            # Of hashes, those that are not consistent refuse every weight but 0 and the configured one.
            other = next(w for w in range(1, 4) if w not in (weight, server.configured))
            (answer, _) = process.connection.ask(
                f"set server {name}/{server.name} weight {other}", f"set server {name}/{server.name} weight {weight}"
            )
        else:
            (answer,) = process.connection.ask(f"set server {name}/{server.name} weight {weight}")
        if "static" in answer:
            raise DriverError(refusal)
        if answer:
            raise DriverError(
                f"HAProxy does not let weights be set ({answer.splitlines()[0].rstrip('.')}): its socket needs "
                "'level admin'"
                if "ermission" in answer
                else f"HAProxy refuses to set the weight of {name}/{server.name}: {answer.splitlines()[0]}"
            )
        return


__all__ = ["Backend", "Connection", "Haproxy", "HaproxyProcess", "Server", "check_rule"]
