"""The networks over servers for Stable-Baselines3: give one of these classes as ``policy``.

* :class:`EquivariantPolicy`: PPO and A2C, with the action types "discrete", "joint", "normalized" and "continuous";
* :class:`EquivariantQPolicy`: DQN, with "joint";
* :class:`EquivariantSACPolicy`: SAC, with "normalized" and "continuous".

The width is ``policy_kwargs={"features_extractor_kwargs": {"hidden": 64}}``. Every observation layout will do; give it
``normalize=True``, since nothing here scales features. No parameter depends on the number of servers: a policy made for
N servers takes the ``state_dict`` of one made for M.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from ..errors import LbgymError, MissingExtraError

try:
    import torch
    from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
    from stable_baselines3.sac.policies import Actor, SACPolicy
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("stable_baselines3", "sb3", "policies for Stable-Baselines3") from error

from ..features.columns import NUM_FEATURES, NUM_GROUND_TRUTH
from ..policies.action_kind import is_normalized
from ..policies.networks import ServerEncoder, ServerHead, centered, joint_sums, masked, value_of_context

# Numbers per server of a flat observation: whether it is active, and the features without and with the ground truth;
# then both with the weight in force.
_FLAT_WIDTHS = tuple(1 + w + NUM_FEATURES + truth for w in (0, 1) for truth in (0, NUM_GROUND_TRUTH))


def servers_of(observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any] | None = None) -> int:
    """The number of servers that an environment's spaces are for.

    Raises:
        LbgymError: if they are not those of an lbgym environment.
    """
    spaces = gymnasium.spaces
    if isinstance(observation_space, spaces.Dict) and {"features", "mask"} <= observation_space.spaces.keys():
        return int(np.prod(observation_space["mask"].shape or ()))
    shape = observation_space.shape or ()
    if len(shape) == 2:
        return int(shape[0])
    if len(shape) == 1:
        for n in (shape[0] // width for width in _FLAT_WIDTHS if shape[0] % width == 0):
            if isinstance(action_space, spaces.Discrete):
                fits = round(float(action_space.n) ** (1 / n)) ** n == int(action_space.n)
            else:
                fits = action_space is None or action_space.shape == (n,)
            if fits:
                return int(n)
    raise LbgymError(
        f"networks over servers need the spaces of an lbgym environment, got observations {observation_space} and "
        f"actions {action_space}"
    )


class EquivariantExtractor(BaseFeaturesExtractor):
    """Encodes every server with shared parameters, and pools over the active ones.

    The result, float[B, N + N H + 2 H], holds the mask, the encoded servers and the context;
    :func:`split` takes it apart. It is meant for the heads of this module: a dense layer over it is not equivariant.

    Args:
        observation_space: of any layout. "matrix" has no mask: there a server counts as inactive when its row is all
            zero and another's is not, whatever its weight.
        num_servers: N; None: from the space, without the ground truth and the weights if it is flat.
        hidden: H, width.
    """

    def __init__(
        self, observation_space: gymnasium.Space[Any], num_servers: int | None = None, hidden: int = 64
    ) -> None:
        n = servers_of(observation_space) if num_servers is None else num_servers
        super().__init__(observation_space, n + n * hidden + 2 * hidden)
        features = observation_space
        if isinstance(observation_space, gymnasium.spaces.Dict):
            features = observation_space["features"]
        shape = features.shape or ()
        self.num_servers, self.hidden = n, hidden
        # All columns but that of the weights, which alone is signed.
        self._seen = shape[-1] - bool(np.ravel(getattr(features, "low", 0.0))[-1] < 0.0)
        self.network = ServerEncoder(shape[1] if len(shape) == 2 else shape[0] // n - 1, hidden)

    def forward(self, observations: Any) -> Tensor:
        """Observations of the space, batched -> float[B, N + N H + 2 H]."""
        n = self.num_servers
        if isinstance(observations, dict):
            features, active = observations["features"], observations["mask"] > 0.5
        elif observations.dim() == 2:
            features, active = observations[:, n:].unflatten(1, (n, -1)), observations[:, :n] > 0.5
        else:
            features = observations
            seen = features[..., : self._seen].any(-1)
            active = seen | ~seen.any(-1, keepdim=True)
        h = self.network.encode(features, active)
        return torch.cat([active.to(h.dtype), h.flatten(1), self.network.pool(h, active)], -1)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Active bool[B, N], encoded servers [B, N, H] and the context [B, 2 H]."""
        return split(flat, self.num_servers, self.hidden)


def split(flat: Tensor, num_servers: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take the extractor's output apart: active bool[B, N], servers [B, N, H], context [B, 2 H]."""
    active, h, pooled = flat.split([num_servers, num_servers * hidden, 2 * hidden], dim=-1)
    return active > 0.5, h.unflatten(-1, (num_servers, hidden)), pooled


class ServerOutputs(nn.Module):
    """O outputs per server from the extractor's output, 0 where inactive.

    They come server by server, [B, N O], with ``centered`` less their mean over the active servers
    (:func:`~lbgym.policies.networks.centered`), or with ``joint`` as the sum over the servers for each of the O^N joint
    choices (:func:`~lbgym.policies.networks.joint_sums`).
    """

    def __init__(
        self, extractor: EquivariantExtractor, outputs: int, *, joint: bool = False, centered: bool = False
    ) -> None:
        super().__init__()
        self.num_servers, self.hidden = extractor.num_servers, extractor.hidden
        self.joint, self.centered = joint, centered
        self.head = ServerHead(self.hidden, outputs)

    def forward(self, flat: Tensor) -> Tensor:
        active, h, pooled = split(flat, self.num_servers, self.hidden)
        out = masked(self.head.decode(h, pooled), active)
        if self.centered:
            out = centered(out, active)
        return joint_sums(out) if self.joint else out.flatten(1)


class ContextValue(nn.Module):
    """A value [B, 1] of the extractor's context."""

    def __init__(self, extractor: EquivariantExtractor) -> None:
        super().__init__()
        self.num_servers, self.hidden = extractor.num_servers, extractor.hidden
        self.critic = value_of_context(self.hidden)

    def forward(self, flat: Tensor) -> Tensor:
        return self.critic(split(flat, self.num_servers, self.hidden)[2])


class ActionValue(nn.Module):
    """A value [B, 1] of what the extractor gives and one action per server behind it, [B, N + N H + 2 H + N]."""

    def __init__(self, extractor: EquivariantExtractor) -> None:
        super().__init__()
        self.num_servers, self.hidden = extractor.num_servers, extractor.hidden
        self.encoder = ServerEncoder(self.hidden + 1, self.hidden)
        self.critic = value_of_context(self.hidden)

    def forward(self, flat: Tensor) -> Tensor:
        actions = flat[:, -self.num_servers :]
        active, h, _ = split(flat[:, : -self.num_servers], self.num_servers, self.hidden)
        h = self.encoder.encode(torch.cat([h, actions.unsqueeze(-1)], -1), active)
        return self.critic(self.encoder.pool(h, active))


def _prepared(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords for a policy of Stable-Baselines3 whose layers are replaced by those over servers."""
    if kwargs.get("net_arch"):
        raise LbgymError(
            f"the layers over servers are given by features_extractor_kwargs={{'hidden': ...}}, not by "
            f"net_arch={kwargs['net_arch']!r}"
        )
    if kwargs.get("use_sde"):
        raise LbgymError("use_sde=True draws noise per output and latent feature, which has no form over servers")
    return {"features_extractor_class": EquivariantExtractor} | kwargs | {"net_arch": []}


def _extractor(policy: Any) -> EquivariantExtractor:
    num_servers = servers_of(policy.observation_space, policy.action_space)
    made = policy.features_extractor_class(
        policy.observation_space, num_servers=num_servers, **policy.features_extractor_kwargs
    )
    assert isinstance(made, EquivariantExtractor)
    return made


class EquivariantPolicy(ActorCriticPolicy):
    """Actor and critic for PPO and A2C: a shared encoder, a head per server, a value of the context.

    The standard deviation of continuous actions is one parameter for all servers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_prepared(kwargs))

    def make_features_extractor(self) -> EquivariantExtractor:
        return _extractor(self)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        # Stable-Baselines3 types these attributes as its own layers.
        this: Any = self
        space, actor = this.action_space, this.pi_features_extractor
        if isinstance(space, gymnasium.spaces.Discrete):
            this.action_net = ServerOutputs(actor, _levels(space, actor.num_servers), joint=True)
        elif isinstance(space, gymnasium.spaces.MultiDiscrete):
            this.action_net = ServerOutputs(actor, int(space.nvec[0]))
        else:
            this.action_net = ServerOutputs(actor, 1, centered=is_normalized(space))
            this.log_std = nn.Parameter(torch.full((1,), float(this.log_std_init)))
        this.value_net = ContextValue(this.vf_features_extractor)
        this.optimizer = this.optimizer_class(this.parameters(), lr=lr_schedule(1), **this.optimizer_kwargs)


class EquivariantQPolicy(DQNPolicy):
    """For DQN on joint actions: the value of a joint action is the sum of one utility per server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_prepared(kwargs))

    def make_features_extractor(self) -> EquivariantExtractor:
        return _extractor(self)

    def make_q_net(self) -> QNetwork:
        network: Any = super().make_q_net()
        extractor = network.features_extractor
        network.q_net = ServerOutputs(extractor, _levels(self.action_space, extractor.num_servers), joint=True)
        made: QNetwork = network.to(self.device)
        return made


class EquivariantSACPolicy(SACPolicy):
    """For SAC: mean and standard deviation per server; critics of the encoded servers beside their actions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_prepared(kwargs))

    def make_features_extractor(self) -> EquivariantExtractor:
        return _extractor(self)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor: Any = super().make_actor(features_extractor)
        actor.mu = ServerOutputs(actor.features_extractor, 1, centered=is_normalized(self.action_space))
        actor.log_std = ServerOutputs(actor.features_extractor, 1)
        made: Actor = actor.to(self.device)
        return made

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        critic: Any = super().make_critic(features_extractor)
        critic.q_networks = [ActionValue(critic.features_extractor) for _ in range(critic.n_critics)]
        for i, network in enumerate(critic.q_networks):
            critic.add_module(f"qf{i}", network)
        made: ContinuousCritic = critic.to(self.device)
        return made


def _levels(space: Any, num_servers: int) -> int:
    return round(float(space.n) ** (1 / num_servers))
