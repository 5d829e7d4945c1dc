"""RLlib's modules around networks in plain torch, so that a trained actor is exported as it is.

``model_config`` has these keys: ``network``, a name of :data:`lbgym.policies.networks.NETWORKS`; ``actor``, ``critic``
and, for SAC's deviations, ``spread``, the keywords of its class; ``log_std``, where the log standard deviation of
continuous actions begins; and what each module names besides.

* :class:`ActorCriticModule`: PPO and IMPALA;
* :class:`TargetActorCriticModule`: APPO, which keeps an older actor;
* :class:`QModule`: DQN;
* :class:`SACModule`: SAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium

from ...errors import MissingExtraError

try:
    import torch
    from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
    from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.distribution.torch.torch_distribution import (
        TorchDeterministic,
        TorchMultiCategorical,
        TorchSquashedGaussian,
    )
    from ray.rllib.core.learner.utils import make_target_network
    from ray.rllib.core.models.base import ENCODER_OUT
    from ray.rllib.core.rl_module.apis import (
        TARGET_NETWORK_ACTION_DIST_INPUTS,
        InferenceOnlyAPI,
        TargetNetworkAPI,
        ValueFunctionAPI,
    )
    from ray.rllib.core.rl_module.torch import TorchRLModule
    from ray.rllib.utils.schedules.scheduler import Scheduler
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "training with RLlib") from error

from ...policies.networks import MLP, NETWORKS

#: Bounds of SAC's log standard deviation, as in the paper's code (Haarnoja et al., arXiv:1812.05905, 2018).
LOG_STD_BOUNDS = (-20.0, 2.0)


def _network(model_config: Mapping[str, Any], part: str) -> nn.Module:
    return NETWORKS[model_config["network"]](**model_config[part])


class Spread(nn.Module):
    """Append a constant log standard deviation per action to the means: float[B, N] -> float[B, 2 N]."""

    def __init__(self, actions: int, log_std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((actions,), log_std))

    def forward(self, means: Tensor) -> Tensor:
        return torch.cat([means, self.log_std.expand_as(means)], -1)


class ActorCriticModule(TorchRLModule, InferenceOnlyAPI, ValueFunctionAPI):
    """An actor and a critic that share nothing."""

    def setup(self) -> None:
        """Build the networks."""
        space = self.action_space
        actor = _network(self.model_config, "actor")
        if isinstance(actor, MLP):
            # Begin with about equal weights, as the networks over servers do.
            last = actor[-1]
            assert isinstance(last, nn.Linear)
            with torch.no_grad():
                last.weight.mul_(0.01)
                last.bias.zero_()
        self.actor = actor
        self.critic = _network(self.model_config, "critic")
        self.spread: nn.Module = nn.Identity()
        if isinstance(space, gymnasium.spaces.Box):
            self.spread = Spread(space.shape[0], self.model_config["log_std"])
        elif isinstance(space, gymnasium.spaces.MultiDiscrete):
            self.action_dist_cls = TorchMultiCategorical.get_partial_dist_cls(
                space=space, input_lens=[int(n) for n in space.nvec]
            )

    def get_non_inference_attributes(self) -> list[str]:
        """Name the networks that env runners do not need."""
        return ["critic"]

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.spread(self.actor(batch[Columns.OBS]))}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Values [B] of observations."""
        return self.critic(batch[Columns.OBS]).squeeze(-1)


class TargetActorCriticModule(ActorCriticModule, TargetNetworkAPI):
    """An actor-critic with a target actor, which APPO keeps the new one close to."""

    def make_target_networks(self) -> None:
        """Copy the actor."""
        self.old_actor = make_target_network(self.actor)
        self.old_spread = make_target_network(self.spread)

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pair the networks with their targets."""
        return [(self.actor, self.old_actor), (self.spread, self.old_spread)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the target actor's distribution."""
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: self.old_spread(self.old_actor(batch[Columns.OBS]))}

    def get_non_inference_attributes(self) -> list[str]:
        """Name the networks that env runners do not need."""
        return [*super().get_non_inference_attributes(), "old_actor", "old_spread"]


class PassOn(nn.Module):
    """An encoder that passes observations through unchanged."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {ENCODER_OUT: batch[Columns.OBS]}


class WithActions(nn.Module):
    """Observations [B, N (1 + F)] and actions [B, N] -> [B, N (2 + F)]: a server's action is its last feature."""

    def __init__(self, num_servers: int) -> None:
        super().__init__()
        self.num_servers = num_servers

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        flat, actions = batch[Columns.OBS], batch[Columns.ACTIONS]
        mask, features = flat[..., : self.num_servers], flat[..., self.num_servers :]
        servers = features.unflatten(-1, (self.num_servers, -1))
        both = torch.cat([servers, actions.unsqueeze(-1)], -1)
        return {ENCODER_OUT: torch.cat([mask, both.flatten(-2)], -1)}


class QModule(DefaultDQNTorchRLModule):
    """Values of all joint actions; ``model_config`` has DQN's ``epsilon`` and ``double_q`` as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Skip the default's constructor, which needs RLlib's catalogue of networks.
        TorchRLModule.__init__(self, *args, **kwargs)

    def setup(self) -> None:
        """Build the networks."""
        self.uses_dueling, self.num_atoms = False, 1
        self.uses_double_q = self.model_config["double_q"]
        self.epsilon_schedule = Scheduler(
            fixed_value_or_schedule=self.model_config["epsilon"], framework=self.framework
        )
        self.encoder = PassOn()
        self.af = _network(self.model_config, "actor")

    def _forward_exploration(self, batch: dict[str, Any], t: int) -> dict[str, Any]:
        # The default never explores actions whose value is exactly 0, as all are before the first flow arrives.
        self.epsilon_schedule.update(t)
        best = self._forward_inference(batch)[Columns.ACTIONS]
        explored = torch.rand(best.shape) < self.epsilon_schedule.get_current_value()
        return {Columns.ACTIONS: torch.where(explored, torch.randint_like(best, int(self.action_space.n)), best)}


class MeanAndSpread(nn.Module):
    """Means and log standard deviations float[B, 2 N], from a network each; the latter begin near ``log_std``."""

    def __init__(self, mean: nn.Module, spread: nn.Module, log_std: float) -> None:
        super().__init__()
        self.mean, self.spread, self.log_std = mean, spread, log_std

    def forward(self, observations: Tensor) -> Tensor:
        log_std = (self.log_std + self.spread(observations)).clamp(*LOG_STD_BOUNDS)
        return torch.cat([self.mean(observations), log_std], -1)


class SquashedGaussian(TorchSquashedGaussian):
    """RLlib's distribution, with its mode squashed as well."""

    def to_deterministic(self) -> TorchDeterministic:
        return TorchDeterministic(loc=self._squash(self.loc))


class SACModule(DefaultSACTorchRLModule):
    """An actor whose actions are squashed by tanh, and critics; ``model_config`` has SAC's ``twin_q`` as well."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Skip the default's constructor, which needs RLlib's catalogue of networks.
        TorchRLModule.__init__(self, *args, **kwargs)

    def setup(self) -> None:
        """Build the networks."""
        config, n = self.model_config, self.action_space.shape[0]
        self.action_dist_cls = SquashedGaussian
        self.twin_q = config["twin_q"]
        self.pi_encoder = PassOn()
        self.pi = MeanAndSpread(_network(config, "actor"), _network(config, "spread"), config["log_std"])
        if not self.inference_only:
            self.qf_encoder, self.qf = WithActions(n), _network(config, "critic")
            if self.twin_q:
                self.qf_twin_encoder, self.qf_twin = WithActions(n), _network(config, "critic")
