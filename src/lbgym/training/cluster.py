"""Any recipe on a Ray cluster: it trains on whichever node is free, and survives the loss of that node.

The training runs in an actor; its checkpoints come back to this process through Ray and are written here, so the nodes
share no storage. When the actor is lost with its node, another one continues from the last checkpoint.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FileWriteError, InvalidOptionError, LbgymError, MissingExtraError

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "training on a Ray cluster") from error

from .config import TrainingConfig
from .recipes import recipe_of
from .recipes import train as run_recipe
from .runs import Callback, Progress, log, log_folder, output_file, summary_writer

logger = logging.getLogger("lbgym")

#: Seconds between two polls of the training.
POLL = 0.25
#: Seconds without an answer after which a warning is logged.
PATIENCE = 10.0


@dataclass(frozen=True)
class ClusterResult:
    """A finished training run: the last checkpoint (None without ``out``), the history, and how often it was lost."""

    checkpoint: Path | None
    history: list[Progress]
    restarts: int


class ClusterError(LbgymError, RuntimeError):
    """A Ray cluster that cannot be joined, or that lost a training more often than it may be restarted."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray, through the process's own connection if it has one, else through one that ends with the block.

    Args:
        address: of a cluster, such as "auto", "10.0.0.1:6379" or "ray://10.0.0.1:10001"; None: that of the environment
            variable RAY_ADDRESS, else a local Ray that is started here.

    Raises:
        ClusterError: if there is no cluster at that address.
    """
    if ray.is_initialized():
        yield
        return
    # Without an address Ray would join whatever cluster was last started on this machine
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    try:
        # Without this Ray starts workers with a copy of the current folder where it finds a uv environment
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {error}") from None
    finally:
        # Ray's own handler would end the process without saving anything.
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself takes minutes to find out that nothing listens at an address.

    Raises:
        ClusterError: if nothing does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        # "auto", "local": Ray finds the address itself.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: nothing answers there ({error})") from None


def train_on_ray(
    algo: str,
    config: TrainingConfig,
    *,
    address: str | None = None,
    cpus: float = 1.0,
    max_restarts: int = 10,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> ClusterResult:
    """Train with any recipe on a Ray cluster, whose nodes need lbgym and the recipe's framework.

    Args:
        algo: the recipe's name, one of ``RECIPES``.
        config: what to train on and how. ``checkpoint_every`` is what the loss of a node can cost.
        address: of the cluster; see :func:`connected`.
        cpus: that the training takes on its node. RLlib's env runners take theirs beside it.
        max_restarts: how often the training may be lost before that is an error.
        out: the checkpoint's file, or a folder for it, on this machine; None: keep nothing.
        resume_from: a checkpoint of the same recipe, on this machine, to continue.
        callback: receives the progress after every update; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    If it is interrupted, the training is asked to stop, and its checkpoint is written before the exception propagates.

    Raises:
        ClusterError: without a cluster, or if the training is lost more than ``max_restarts`` times.
        LbgymError: what the recipe itself raises.
    """
    recipe = recipe_of(algo)
    if not max_restarts >= 0:
        raise InvalidOptionError(f"max_restarts must be at least 0, got {max_restarts!r}")
    name = f"{algo}{recipe.suffix}"
    checkpoint = output_file(out, name)
    kept = None
    if resume_from is not None:
        if not Path(resume_from).is_file():
            raise CheckpointError(f"checkpoint {os.fspath(resume_from)} does not exist")
        kept = pack(Path(resume_from), (checkpoint or Path(name)).name)
    run = _Run(algo, config, cpus, checkpoint or Path(name), kept, keep=checkpoint is not None)
    with connected(address), summary_writer(log_folder(checkpoint, tensorboard)) as writer:

        def report(progress: Progress) -> bool:
            if writer is not None:
                log(writer, progress)
            return bool(callback(progress)) if callback is not None else False

        restarts = 0
        while True:
            try:
                run.follow(report)
                return ClusterResult(checkpoint, run.history, restarts)
            except RayActorError as error:
                restarts += 1
                if restarts > max_restarts:
                    raise ClusterError(
                        f"the training was lost {restarts} times, the last time at step {run.step:,}: {error}"
                    ) from None
                lost_at = run.step
                run.forget_lost_steps()
                logger.warning(
                    "the training was lost with its node at step %s; it resumes from %s",
                    f"{lost_at:,}", f"the checkpoint of step {run.step:,}" if run.step else "its beginning",
                )  # fmt: skip


class _Run:
    """The state of a remote training in this process."""

    def __init__(
        self, algo: str, config: TrainingConfig, cpus: float, file: Path, saved: bytes | None, *, keep: bool
    ) -> None:
        self._algo, self._config, self._cpus, self._file, self._keep = algo, config, cpus, file, keep
        self._saved = saved
        self._saved_step = 0
        self.history: list[Progress] = []

    @property
    def step(self) -> int:
        return self.history[-1].step if self.history else self._saved_step

    def forget_lost_steps(self) -> None:
        """Go back to the last checkpoint."""
        self.history = [progress for progress in self.history if progress.step <= self._saved_step]

    def follow(self, report: Callable[[Progress], bool]) -> None:
        """Start the training and poll it until it ends.

        Raises:
            RayActorError: if it is lost.
        """
        worker = ray.remote(_Worker).options(num_cpus=self._cpus, max_concurrency=2, max_restarts=0).remote()
        done = worker.run.remote(self._algo, self._config, self._file.name, self._saved)
        over, quiet_since, complained = False, time.monotonic(), False
        try:
            while not over:
                # Seen to be over before the last poll, so that the poll misses nothing.
                over = bool(ray.wait([done], timeout=POLL)[0])
                try:
                    news, saved = ray.get(worker.news.remote(), timeout=PATIENCE)
                except GetTimeoutError:
                    if not complained and time.monotonic() - quiet_since >= PATIENCE:
                        logger.warning(
                            "no answer for %.0f s: waiting for %g free CPU on a node of the Ray cluster, or for a node "
                            "that does not answer",
                            PATIENCE, self._cpus,
                        )  # fmt: skip
                        complained = True
                    over = False
                    continue
                quiet_since, complained = time.monotonic(), False
                self._take(news, saved, report, worker)
            ray.get(done)
        except KeyboardInterrupt:
            self._end(worker, done)
            raise
        except RayTaskError as error:
            # The recipe's own exception, without the traceback of another machine in its text.
            if isinstance(error.cause, LbgymError):
                raise error.cause from None
            if isinstance(error.cause, OSError):
                raise ClusterError(f"the training failed at step {self.step:,} on its node: {error.cause}") from None
            raise
        except RayActorError:
            raise
        except RayError as error:
            raise ClusterError(f"the Ray cluster was lost at step {self.step:,}: {error}") from None
        finally:
            ray.kill(worker)

    def _end(self, worker: Any, done: Any) -> None:
        """Stop an interrupted training, and take its last checkpoint if it still answers."""
        try:
            worker.stop.remote()
            # A worker that has not started, for want of a free CPU, does not answer: then there is nothing to wait for.
            for patience in (60.0, 0.0):
                news, saved = ray.get(worker.news.remote(), timeout=PATIENCE)
                self._take(news, saved, lambda progress: False, worker)
                ray.wait([done], timeout=patience)
        except RayError as error:
            logger.warning(
                "the training did not answer; kept is %s: %s",
                f"the checkpoint of step {self._saved_step:,}" if self._saved_step else "nothing",
                next(iter(str(error).splitlines()), type(error).__name__),
            )

    def _take(
        self, news: list[Progress], saved: tuple[int, bytes] | None, report: Callable[[Progress], bool], worker: Any
    ) -> None:
        for progress in news:
            self.history.append(progress)
            if report(progress):
                worker.stop.remote()
        if saved is not None:
            self._saved_step, self._saved = saved
            if self._keep:
                unpack(self._saved, self._file.parent)


class _Worker:
    """The actor that trains, on some node of the cluster."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news: list[Progress] = []
        self._saved: tuple[int, bytes] | None = None
        self._stop = threading.Event()

    def run(self, algo: str, config: TrainingConfig, name: str, saved: bytes | None) -> None:
        """Train to the end, or until :meth:`stop`."""
        with tempfile.TemporaryDirectory(prefix="lbgym-") as folder:
            file = Path(folder) / name
            if saved is not None:
                unpack(saved, file.parent)
            written, step = self._age(file), 0

            def callback(progress: Progress) -> bool:
                nonlocal written, step
                step = progress.step
                # In the thread that writes checkpoints, so that none changes while it is packed
                if (age := self._age(file)) != written:
                    written = age
                    self._publish(step, file)
                with self._lock:
                    self._news.append(progress)
                return self._stop.is_set()

            run_recipe(algo, config, out=file, resume_from=file if saved is not None else None, callback=callback)
            self._publish(step, file)

    def news(self) -> tuple[list[Progress], tuple[int, bytes] | None]:
        """Progress, and the newest checkpoint with its step, since the last call."""
        with self._lock:
            news, self._news = self._news, []
            saved, self._saved = self._saved, None
        return news, saved

    def stop(self) -> None:
        """End after the update in progress."""
        self._stop.set()

    def _publish(self, step: int, file: Path) -> None:
        packed = pack(file, file.name)
        with self._lock:
            self._saved = step, packed

    @staticmethod
    def _age(file: Path) -> int | None:
        return file.stat().st_mtime_ns if file.exists() else None


def pack(file: Path, name: str) -> bytes:
    """Pack a checkpoint and the files beside it of the same name (replay buffer, trainer's state) as ``name``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for part in sorted(file.parent.glob(f"{file.stem}.*")):
            archive.add(part, Path(name).stem + part.name.removeprefix(file.stem))
    return stream.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put the parts of a checkpoint into a folder, each whole or not at all, in place of those that are there.

    Raises:
        FileWriteError: if the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoint-") as temporary:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(temporary, filter="data")
            # The file itself last: what it needs is there by then.
            for part in sorted(Path(temporary).iterdir(), key=lambda part: part.is_file()):
                if (there := folder / part.name).is_dir():
                    shutil.rmtree(there)
                os.replace(part, there)
    except OSError as error:
        raise FileWriteError(f"cannot write a checkpoint into {folder}: {error.strerror or error}") from error
