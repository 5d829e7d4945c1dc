"""The bookkeeping that recipes share: budget, progress, logs, timed checkpoints, and the files they lie in."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import check_writable, write_whole
from ..errors import DivergedError, FileWriteError, InvalidOptionError, MissingExtraError
from ..policies.trained import TRAINED_SUFFIXES

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "training in plain torch") from error

if TYPE_CHECKING:
    from .config import TrainingConfig

logger = logging.getLogger("lbgym")


@dataclass(frozen=True)
class Progress:
    """A training's progress, as callbacks receive it after every update.

    Attributes:
        step: environment steps so far, over all replicas.
        seconds: training time so far, including the time before a resume.
        fraction: share of the budget that is used, 0 to 1.
        steps_per_second: environment steps per second since the last update, learning included.
        reward: mean reward per step over the last rollout.
        fct_mean: mean FCT, seconds, of the flows that ended in the last rollout; NaN if none did.
        losses: the recipe's losses by name. PPO: ``policy``, ``value``, ``entropy``, ``kl``, ``clipped`` (share of
            clipped ratios) and ``explained_variance``. SAC-GRU: ``policy``, ``value``, ``entropy``, ``temperature`` and
            ``q``.
    """

    step: int
    seconds: float
    fraction: float
    steps_per_second: float
    reward: float
    fct_mean: float
    losses: dict[str, float]


#: Receives the progress after every update; returning True stops the training.
Callback = Callable[[Progress], bool | None]


class Budget:
    """The steps and seconds that a training has used of its limits.

    Args:
        config: has the limits, ``total_steps`` and ``seconds``.
        step: environment steps before this run, when resuming.
        seconds: training time before this run.
    """

    def __init__(self, config: TrainingConfig, step: int = 0, seconds: float = 0.0) -> None:
        self.total_steps, self.limit = config.total_steps, config.seconds
        self.step, self.seconds = step, seconds
        self.start()

    def start(self) -> None:
        """Start the clock; what came before, such as compiling the simulator, is not counted."""
        self._began = time.perf_counter() - self.seconds

    def advance(self, steps: int) -> None:
        """Count environment steps, and the time they took."""
        self.step += steps
        self.seconds = time.perf_counter() - self._began

    @property
    def fraction(self) -> float:
        """Share of the budget that is used, 0 to 1."""
        by_steps = self.step / self.total_steps if self.total_steps is not None else 0.0
        by_time = self.seconds / self.limit if self.limit is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def used_up(self) -> bool:
        """True if no budget is left."""
        return self.fraction >= 1.0


class Reporter:
    """Report every update: history, log, a checkpoint if one is due, the user's callback.

    Args:
        budget: advanced by the recipe before each report.
        callback: receives the progress; returning True stops the training.
        writer: of TensorBoard, or None.
        save: writes a checkpoint, or None.
        every: seconds between checkpoints.

    Attributes:
        history: the progress after every update.
    """

    def __init__(
        self,
        budget: Budget,
        callback: Callback | None = None,
        writer: Any = None,
        save: Callable[[], object] | None = None,
        every: float = 0.0,
    ) -> None:
        self.history: list[Progress] = []
        self._budget, self._callback, self._writer, self._save, self._every = budget, callback, writer, save, every
        self.start()

    def start(self) -> None:
        """Start the clocks of the budget and of the checkpoints."""
        self._budget.start()
        self._saved = time.perf_counter()
        self._last = self._budget.step, self._budget.seconds

    def report(self, *, reward: float, fct_mean: float, losses: dict[str, float]) -> bool:
        """Report an update.

        A checkpoint that cannot be written meanwhile is only a warning, since the next one may succeed; the last one is
        an error.

        Returns:
            True to stop: the budget is used up, or the callback asked for it.
        """
        budget, (step, seconds) = self._budget, self._last
        progress = Progress(
            step=budget.step,
            seconds=budget.seconds,
            fraction=budget.fraction,
            steps_per_second=(budget.step - step) / (budget.seconds - seconds),
            reward=reward,
            fct_mean=fct_mean,
            losses=losses,
        )
        self._last = budget.step, budget.seconds
        self.history.append(progress)
        if self._writer is not None:
            try:
                log(self._writer, progress)
            except OSError as error:
                logger.warning("no TensorBoard log from step %s on: %s", f"{budget.step:,}", error.strerror)
                self._writer = None
        if self._save is not None and time.perf_counter() - self._saved >= self._every:
            try:
                self._save()
            except FileWriteError as error:
                logger.warning("no checkpoint at step %s: %s", f"{budget.step:,}", error)
            self._saved = time.perf_counter()
        asked = self._callback is not None and bool(self._callback(progress))
        return asked or budget.used_up

    @contextmanager
    def saving(self, last: Callable[[], object] | None = None) -> Iterator[None]:
        """Write the last checkpoint when the block ends, is interrupted or fails.

        A failure before the first update writes nothing, which keeps an earlier file. Where the state to save has
        diverged, the failure was no more than a consequence: the error that says so takes its place.

        Args:
            last: writes it; None: ``save``.
        """
        save = last or self._save or (lambda: None)
        try:
            yield
        except BaseException:
            if self.history:
                save()
            raise
        save()


def clone(tree: Any) -> Any:
    """Copy nested containers of tensors."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {k: clone(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(clone(v) for v in tree)
    return tree


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def log_folder(checkpoint: Path | None, tensorboard: bool) -> Path | None:
    """Return the folder of a training's logs, beside its checkpoint; None if nothing is logged."""
    return checkpoint.parent / "tensorboard" if checkpoint is not None and tensorboard else None


@contextmanager
def summary_writer(folder: Path | None) -> Iterator[Any]:
    """A TensorBoard writer, or None without a folder."""
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("tensorboard", "train", "logging to TensorBoard") from error
    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        try:
            writer.close()
        except OSError as error:
            logger.warning("cannot write the end of the log in %s: %s", folder, error.strerror)


def log(writer: Any, progress: Progress) -> None:
    """Write an update's progress to TensorBoard."""
    values = asdict(progress)
    for name, value in values.pop("losses").items():
        writer.add_scalar(f"losses/{name}", value, progress.step)
    for name in ("reward", "fct_mean"):
        writer.add_scalar(f"rollout/{name}", values[name], progress.step)
    writer.add_scalar("time/steps_per_second", progress.steps_per_second, progress.step)


def output_file(out: str | os.PathLike[str] | None, name: str) -> Path | None:
    """The file to write: ``out`` if it ends as ``name`` does, else ``name`` in the folder ``out``, which is made.

    Raises:
        FileWriteError: if it cannot be written.
        InvalidOptionError: if ``out`` is a file, or the name of one, of another kind.
    """
    if out is None:
        return None
    path, suffix = Path(out), Path(name).suffix
    if path.suffix != suffix:
        if path.suffix in TRAINED_SUFFIXES or path.is_file():
            raise InvalidOptionError(f"a checkpoint of this recipe ends in {suffix}, got {os.fspath(out)!r}")
        path = path / name
    check_writable(path)
    return path


def check_parameters(parameters: Mapping[str, Any], step: int) -> None:
    """Check that parameters, by name, are finite numbers after so many environment steps.

    Raises:
        DivergedError: naming the first that are not.
    """
    for name, value in parameters.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise DivergedError(
                f"the training has diverged by step {step:,}: the network's {name} is not finite any more; "
                f"a smaller learning_rate may help"
            )


def check_state(state: Mapping[str, Any]) -> None:
    """Check that the networks of a checkpoint's contents are finite: what acts, and what SAC-GRU has beside it.

    Raises:
        DivergedError: if they are not.
    """
    check_parameters(state["network"]["parameters"], state["step"])
    check_parameters(state["trainer"].get("agent", {}), state["step"])


def write_torch(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's contents, whole or not at all.

    Raises:
        DivergedError: if its networks are not finite; a file that was there is untouched.
        FileWriteError: if the file cannot be written.
    """
    check_state(state)
    # On a full disk torch's own writer raises an internal error.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, lambda stream: stream.write(buffer.getbuffer()))
