"""The loop of the recipes in plain torch: rounds of collecting and learning, within a budget, with checkpoints."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ..policies.checkpoints import read_checkpoint
from .config import TrainingConfig, saved_config
from .runs import (
    Budget,
    Callback,
    Progress,
    Reporter,
    check_state,
    log_folder,
    output_file,
    summary_writer,
    torch_threads,
    write_torch,
)

C = TypeVar("C", bound=TrainingConfig)


class Trainer(ABC, Generic[C]):
    """A training under way: the environment, the networks, and the budget.

    Args:
        config: what to train on and how.

    Attributes:
        ALGO: the recipe's name.
        CONFIG: the class of its configuration.
    """

    ALGO: ClassVar[str]
    CONFIG: ClassVar[type[TrainingConfig]]

    def __init__(self, config: C) -> None:
        self.config = config
        self.env = config.make_env()
        self.budget = Budget(config)

    @abstractmethod
    def begin(self) -> None:
        """Begin the first episode of the run."""

    @abstractmethod
    def round(self) -> tuple[float, float, dict[str, float]]:
        """Step every replica ``num_steps`` times and learn; mean reward per step, mean FCT in seconds, losses."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds, as copies."""

    @abstractmethod
    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint, which was read from ``path``.

        Raises:
            CheckpointError: if it does not fit the environment.
        """

    def close(self) -> None:
        """Release the environment's threads."""
        self.env.close()

    def run(self, checkpoint: Path | None, callback: Callback | None, writer: Any) -> tuple[dict[str, Any], Reporter]:
        """Train until the budget is used up or the callback stops it; the last state, and the reporter."""
        config, budget = self.config, self.budget
        self.env.reset(seed=config.seed)
        self.env.step(self.env.action_space.sample())  # Compiles the simulator outside the time budget.
        self.begin()
        state = self.state()
        # A file from before this was checked may hold a state that diverged.
        check_state(state)

        def save() -> None:
            if checkpoint is not None:
                write_torch(checkpoint, state)

        reporter = Reporter(budget, callback, writer, save, config.checkpoint_every)
        stop = budget.used_up
        with reporter.saving():
            while not stop:
                reward, fct_mean, losses = self.round()
                budget.advance(config.num_envs * config.num_steps)
                # An interrupted round may be half done: what is saved is the state after the last whole one, and the
                # last finite one if the training diverges.
                after = self.state()
                check_state(after)
                state = after
                stop = reporter.report(reward=reward, fct_mean=fct_mean, losses=losses)
        return state, reporter

    @classmethod
    def train(
        cls,
        config: C | None,
        out: str | os.PathLike[str] | None,
        resume_from: str | os.PathLike[str] | None,
        callback: Callback | None,
        tensorboard: bool,
    ) -> tuple[dict[str, Any], Path | None, list[Progress]]:
        """Train; the arguments are those of the recipe's function.

        Returns:
            The last state, the checkpoint's file (None without ``out``), and the history.
        """
        saved = None if resume_from is None else read_checkpoint(resume_from, cls.ALGO)
        chosen: Any = config
        if chosen is None:
            chosen = cls.CONFIG() if saved is None else cls.CONFIG(**saved_config(saved["config"], resume_from or ""))
        checkpoint = output_file(out, f"{cls.ALGO}.pt")
        with torch_threads(chosen.torch_threads), summary_writer(log_folder(checkpoint, tensorboard)) as writer:
            trainer = cls(chosen)
            try:
                if saved is not None:
                    trainer.restore(saved, Path(resume_from or ""))
                state, reporter = trainer.run(checkpoint, callback, writer)
            finally:
                trainer.close()
        return state, checkpoint, reporter.history
