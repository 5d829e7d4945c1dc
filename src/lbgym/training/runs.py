"""What recipes share: the progress they tell, their logs, and files of checkpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, MissingExtraError

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "training in plain torch") from error

#: Recipes in plain torch by the format of their checkpoints: module and class of the policy.
RECIPES = {
    "lbgym-ppo": ("ppo", "PPOPolicy"),
    "lbgym-sac-gru": ("sac_gru", "SACGRUPolicy"),
    "lbgym-exported": ("exported", "ExportedPolicy"),
}


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every update.

    Attributes:
        step: environment steps so far, all replicas together.
        seconds: training time so far, with the time before a resume.
        fraction: share of the budget that is used, 0 to 1.
        steps_per_second: environment steps per second of the last update, learning included.
        reward: mean reward per step over the last rollout.
        fct_mean: mean FCT, seconds, of the flows that ended in the last rollout; NaN when none did.
        losses: by name, those of the recipe. PPO: ``policy``, ``value``, ``entropy``, ``kl``, ``clipped`` (share of
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


def clone(tree: Any) -> Any:
    """A copy of nested containers of tensors."""
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
        writer.close()


def log(writer: Any, progress: Progress) -> None:
    """Write an update's progress to TensorBoard."""
    values = asdict(progress)
    for name, value in values.pop("losses").items():
        writer.add_scalar(f"losses/{name}", value, progress.step)
    for name in ("reward", "fct_mean"):
        writer.add_scalar(f"rollout/{name}", values[name], progress.step)
    writer.add_scalar("time/steps_per_second", progress.steps_per_second, progress.step)


def output_file(out: str | os.PathLike[str] | None, name: str) -> Path | None:
    """The file to write: ``out`` if it ends as ``name`` does, else ``name`` in the folder ``out``, which is made."""
    if out is None:
        return None
    path = Path(out)
    if path.suffix != Path(name).suffix:
        path = path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is whole or not there: to a temporary file beside it, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def read_format(path: str | os.PathLike[str], versions: Mapping[str, int]) -> dict[str, Any]:
    """Read a checkpoint of one of the formats in ``versions``; only tensors and plain data are unpickled.

    Raises:
        CheckpointError: if the file is missing, is no such checkpoint or is of another version.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {os.fspath(path)} does not exist") from error
    except Exception as error:
        raise CheckpointError(f"{os.fspath(path)} is not a checkpoint that can be read: {error}") from error
    found = str(saved.get("format") if isinstance(saved, dict) else type(saved).__name__)
    if not isinstance(saved, dict) or found not in versions:
        *others, last = versions
        known = f"{', '.join(others)} or {last}" if others else last
        raise CheckpointError(f"{os.fspath(path)} is no {known} checkpoint: its format is {found}")
    if saved["version"] != versions[found]:
        raise CheckpointError(
            f"checkpoint {os.fspath(path)} has format version {saved['version']}, written by lbgym {saved['lbgym']}; "
            f"this lbgym reads version {versions[found]}"
        )
    return saved


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of any recipe in plain torch; ``["format"]`` tells which.

    Raises:
        CheckpointError: if the file is missing, is no such checkpoint or is of another version.
    """
    return read_format(path, {recipe: _module(recipe).VERSION for recipe in RECIPES})


def load_policy(path: str | os.PathLike[str], *, deterministic: bool = True, seed: int | None = None) -> Any:
    """The policy of a checkpoint; build its environment with ``LoadBalanceEnv(**policy.env_kwargs, scenario=...)``.

    Args:
        path: a checkpoint of any recipe in plain torch.
        deterministic: the most likely action instead of a drawn one.
        seed: of drawn actions.

    Returns:
        A :class:`~lbgym.training.ppo.PPOPolicy` or :class:`~lbgym.training.sac_gru.SACGRUPolicy`.

    Raises:
        CheckpointError: if the file cannot be read or is of another version.
    """
    saved = read_checkpoint(path)
    policy = getattr(_module(saved["format"]), RECIPES[saved["format"]][1])
    return policy(saved, deterministic=deterministic, seed=seed)


def _module(recipe: str) -> Any:
    return import_module(f".{RECIPES[recipe][0]}", __package__)
