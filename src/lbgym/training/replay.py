"""Replay of sequences for recurrent networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of T = burn-in + length steps, with the observation after the last.

    ``inputs`` [B, T + 1, N, F], ``active`` [B, T + 1, N]; for the last ``length`` steps: ``choices`` [B, L, N] and
    ``rewards`` [B, L]. ``first`` bool[B]: the sequence begins with an episode, and its burn-in is padding.
    """

    inputs: Tensor
    active: Tensor
    choices: Tensor
    rewards: Tensor
    first: Tensor


class Replay:
    """A ring buffer of the replicas' episodes; untouched rows take no memory.

    An episode longer than ``steps`` continues in another row, as an episode of its own.
    """

    def __init__(self, episodes: int, steps: int, num_envs: int, num_servers: int, features: int) -> None:
        self.num_envs, self.steps = num_envs, steps
        self.episodes = episodes // num_envs * num_envs
        self.inputs = torch.empty(self.episodes, steps + 1, num_servers, features)
        self.active = torch.empty(self.episodes, steps + 1, num_servers, dtype=torch.bool)
        self.choices = torch.empty(self.episodes, steps, num_servers, dtype=torch.uint8)
        self.rewards = torch.empty(self.episodes, steps)
        #: Steps stored of each episode.
        self.filled = torch.zeros(self.episodes, dtype=torch.int64)
        self._rows = torch.arange(-num_envs, 0)

    def begin(self, inputs: Tensor, active: Tensor, which: Tensor | None = None) -> None:
        """Begin an episode of the replicas marked in ``which`` bool[R] (None: of all), with its first observation."""
        which = torch.ones(self.num_envs, dtype=torch.bool) if which is None else which
        rows = self._rows[which] = (self._rows[which] + self.num_envs) % self.episodes
        self.inputs[rows, 0], self.active[rows, 0] = inputs[which], active[which]
        self.filled[rows] = 0

    def add(
        self, choices: Tensor, rewards: Tensor, inputs: Tensor, active: Tensor, which: Tensor | None = None
    ) -> None:
        """Add a step of the replicas marked in ``which`` bool[R] (None: of all), and the observation after it."""
        which = torch.ones(self.num_envs, dtype=torch.bool) if which is None else which
        full = which & (self.filled[self._rows] == self.steps)
        if full.any():
            self.begin(self.inputs[self._rows, self.steps], self.active[self._rows, self.steps], full)
        rows = self._rows[which]
        t = self.filled[rows]
        self.choices[rows, t], self.rewards[rows, t] = choices[which].to(torch.uint8), rewards[which]
        self.inputs[rows, t + 1], self.active[rows, t + 1] = inputs[which], active[which]
        self.filled[rows] = t + 1

    def sample(self, batch_size: int, length: int, burn_in: int, generator: torch.Generator) -> Batch:
        """Draw sequences uniformly, none of them across the end of an episode.

        A sequence that would begin within the first ``burn_in`` steps begins at the first, where the state is known.
        """
        starts = (self.filled - length + 1).clamp(min=0)
        row = torch.multinomial(starts.double(), batch_size, replacement=True, generator=generator)
        start = (torch.rand(batch_size, generator=generator) * starts[row]).long()
        start[start < burn_in] = 0
        steps = start[:, None] + torch.arange(-burn_in, length + 1)
        rows, seen, learnt = row[:, None], steps.clamp(min=0), steps[:, burn_in:-1]
        return Batch(
            self.inputs[rows, seen],
            self.active[rows, seen],
            self.choices[rows, learnt].long(),
            self.rewards[rows, learnt],
            start == 0,
        )
