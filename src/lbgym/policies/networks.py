"""Networks that share their parameters over the servers: permute the servers and the outputs are permuted.

Each server passes through one encoder, sees the others through a context pooled over the active servers, and ends in
one head ("Deep Sets", Zaheer et al. 2017; the layer x_i A + mean_j x_j B is theirs). No parameter depends on the
number of servers, so the same weights serve any number, and inactive servers have no part in anything.

The forms for Stable-Baselines3 are in :mod:`lbgym.training.sb3_policies`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtraError("torch", "train", "a policy in plain torch") from error

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}


class MLP(nn.Sequential):
    """Dense layers.

    Args:
        sizes: widths, from the inputs to the outputs.
        activation: after each layer but the last: a name of ``ACTIVATIONS``.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "tanh") -> None:
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            if i < len(sizes) - 2:
                layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers)


class ServerEncoder(nn.Module):
    """Encode every server's features, with the mean of all servers as context.

    Args:
        features: F, inputs per server.
        hidden: H, width.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self._add_encoder(features, hidden)

    def _add_encoder(self, features: int, hidden: int) -> None:
        self.encoder = linear(features, hidden, math.sqrt(2))
        self.others = linear(features, hidden, math.sqrt(2))

    def encode(self, features: Tensor, active: Tensor) -> Tensor:
        """Features [..., N, F], active bool[..., N] -> [..., N, H], not negative, 0 where inactive."""
        features = self.mask(features, active)
        h = torch.relu(self.encoder(features) + self.others(mean_over_servers(features, active)).unsqueeze(-2))
        return self.mask(h, active)

    @staticmethod
    def mask(x: Tensor, active: Tensor) -> Tensor:
        """X [..., N, F] with 0 where inactive, which is no work where all are active."""
        return masked(x, active)

    @staticmethod
    def pool(h: Tensor, active: Tensor) -> Tensor:
        """The context [..., 2 H]: mean and maximum over the active servers of h [..., N, H]."""
        # Encoded features are not negative, so the 0 of an inactive server never exceeds an active one's.
        return torch.cat([mean_over_servers(h, active), h.amax(-2)], -1)


class ServerHead(nn.Module):
    """Map every encoded server and the pooled context to the server's outputs.

    Args:
        hidden: H, width.
        outputs: O, outputs per server.
        gain: scale of the last layer's initial parameters; small: the outputs begin near 0.
    """

    def __init__(self, hidden: int, outputs: int, gain: float = 0.01) -> None:
        super().__init__()
        self._add_head(hidden, outputs, gain)

    def _add_head(self, hidden: int, outputs: int, gain: float) -> None:
        self.own = linear(hidden, hidden, 1.0)
        self.context = linear(2 * hidden, hidden, 1.0)
        self.head = linear(hidden, outputs, gain)

    def decode(self, h: Tensor, pooled: Tensor) -> Tensor:
        """Outputs [..., N, O] of encoded servers [..., N, H] and their context [..., 2 H]."""
        return self.head(torch.relu(self.own(h) + self.context(pooled).unsqueeze(-2)))


class EquivariantNetwork(ServerEncoder, ServerHead):
    """Map every server's features to its outputs, equivariant to the order of the servers; see the two parts."""

    def __init__(self, features: int, hidden: int, outputs: int, gain: float = 0.01) -> None:
        nn.Module.__init__(self)
        self._add_encoder(features, hidden)
        self._add_head(hidden, outputs, gain)

    def forward(self, features: Tensor, active: Tensor) -> Tensor:
        """Features [..., N, F], active bool[..., N] -> outputs [..., N, O]; inactive servers' are meaningless."""
        h = self.encode(features, active)
        return self.decode(h, self.pool(h, active))


class FlatServerNetwork(EquivariantNetwork):
    """An :class:`EquivariantNetwork` on flat observations, as a drop-in for the dense layers of other frameworks.

    As a TorchRL module: ``TensorDictModule(FlatServerNetwork(12, 64, 3), ["observation"], ["logits"])``.

    Args:
        features: F, numbers per server behind the bitmap of the active ones; 11 for the observation layout "flat".
        hidden: H, width.
        outputs: O, outputs per server.
        joint: give the outputs of all O^N joint choices instead, each the sum of its servers'; see :func:`joint_sums`.
        value: give one value of all servers instead of their outputs.
        centered: make the first output of every server relative to its mean over the active ones; for the actions of
            type "normalized", see :func:`centered`.
        gain: scale of the last layer's initial parameters.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        outputs: int = 1,
        *,
        joint: bool = False,
        value: bool = False,
        centered: bool = False,
        gain: float = 0.01,
    ) -> None:
        nn.Module.__init__(self)
        self.features, self.joint, self.centered = features, joint, centered
        self._add_encoder(features, hidden)
        self.critic = value_of_context(hidden) if value else None
        if not value:
            self._add_head(hidden, outputs, gain)

    def forward(self, flat: Tensor) -> Tensor:  # type: ignore[override]
        """Flat [..., N (1 + F)] -> outputs [..., N O], 0 where inactive, or [..., O^N], or a value [..., 1]."""
        n = flat.shape[-1] // (1 + self.features)
        active = flat[..., :n] > 0.5
        h = self.encode(flat[..., n:].unflatten(-1, (n, self.features)), active)
        pooled = self.pool(h, active)
        if self.critic is not None:
            return self.critic(pooled)
        out = self.mask(self.decode(h, pooled), active)
        if self.centered:
            out = torch.cat([centered(out[..., :1], active), out[..., 1:]], -1)
        return joint_sums(out) if self.joint else out.flatten(-2)

    @staticmethod
    def mask(x: Tensor, active: Tensor) -> Tensor:
        """X [..., N, F] with 0 where inactive, without a branch: torch.vmap, in TorchRL's losses, allows none."""
        return x * active.unsqueeze(-1)


class RecurrentNetwork(EquivariantNetwork):
    """An :class:`EquivariantNetwork` with a GRU of shared weights per server between the encoder and the pooling."""

    def __init__(self, features: int, hidden: int, outputs: int, gain: float = 0.01) -> None:
        super().__init__(features, hidden, outputs, gain)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)

    def remember(self, features: Tensor, active: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features [B, T, N, F] and active bool[B, T, N] -> memories [B, T, N, H] and the last state [B, N, H].

        ``state``: the GRU's state before the first of the T steps; None: zeros.
        """
        h = self.encode(features, active)
        b, t, n, width = h.shape
        before = None if state is None else state.reshape(1, b * n, width)
        memories, after = self.gru(h.transpose(1, 2).reshape(b * n, t, width), before)
        return memories.view(b, n, t, width).transpose(1, 2), after.view(b, n, width)

    def forward_sequence(self, features: Tensor, active: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, N, O] and the last state [B, N, H]; the arguments of :meth:`remember`."""
        memories, after = self.remember(features, active, state)
        h = masked(torch.relu(memories), active)
        return self.decode(h, self.pool(h, active)), after


class RecurrentActor(nn.Module):
    """The actor of SAC-GRU: a :class:`RecurrentNetwork` behind the running moments of its inputs."""

    def __init__(self, features: int, hidden: int, choices: int) -> None:
        super().__init__()
        self.moments = Moments(features)
        self.actor = RecurrentNetwork(features, hidden, choices)

    def logits(self, inputs: Tensor, active: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [B, N, K] for one step's inputs [B, N, F], and the actor's next state."""
        scaled = self.moments.scale(inputs, active).unsqueeze(1)
        out, state = self.actor.forward_sequence(scaled, active.unsqueeze(1), state)
        return out.squeeze(1), state


class ServerNetwork(EquivariantNetwork):
    """Actor and critic of PPO: the head of every server acts, the pooled context has a value.

    Args:
        features: F, inputs per server.
        hidden: H, width.
        choices: K, choices per server; 0 for continuous actions.
        log_std: of continuous actions, at the start.
        numbers: D, of continuous actions per server.
    """

    def __init__(self, features: int, hidden: int, choices: int, log_std: float = -1.0, numbers: int = 1) -> None:
        super().__init__(features, hidden, choices or numbers)
        self.choices, self.numbers = choices, numbers
        self.moments = Moments(features)
        self.returns = Moments(1)
        self.critic = value_of_context(hidden)
        self.log_std = nn.Parameter(torch.tensor(log_std))

    def scale(self, inputs: Tensor, active: Tensor) -> Tensor:
        """Features [B, N, F], normalised; 0 where inactive."""
        return self.moments.scale(inputs, active)

    def forward(self, scaled: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Scaled features [B, N, F], active [B, N] -> the heads' outputs and normalised values [B].

        The outputs are logits [B, N, K], or means [B, N] or [B, N, D].
        """
        h = self.encode(scaled, active)
        pooled = self.pool(h, active)
        out = self.decode(h, pooled)
        return out if self.choices or self.numbers > 1 else out.squeeze(-1), self.critic(pooled).squeeze(-1)

    def value(self, inputs: Tensor, active: Tensor) -> Tensor:
        """Values [B] in units of reward, of features [B, N, F]."""
        return self.denormalize(self(self.scale(inputs, active), active)[1])

    def denormalize(self, value: Tensor) -> Tensor:
        return value * self.returns.std + self.returns.mean

    def sample(self, out: Tensor, active: Tensor, generator: torch.Generator | None) -> Tensor:
        """Choices [B, N], or numbers [B, N, D], drawn from the heads' output; inactive servers get the mode."""
        if not self.choices:
            noise = torch.randn(out.shape, generator=generator)
            where = active if self.numbers == 1 else active.unsqueeze(-1)
            return torch.where(where, out + self.log_std.exp() * noise, out)
        return draw(out, active, generator)

    def log_prob(self, out: Tensor, active: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability [B] of choices [B, N] and the entropy [B], both summed over the active servers."""
        if not self.choices:
            z = (choice - out) * torch.exp(-self.log_std)
            each = -0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)
            entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(out)
            if self.numbers > 1:
                each, entropy = each.sum(-1), entropy.sum(-1)
        else:
            log_p = out.log_softmax(-1)
            each = log_p.gather(-1, choice.long().unsqueeze(-1)).squeeze(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        mask = active.to(out.dtype)
        return (each * mask).sum(-1), (entropy * mask).sum(-1)


class Moments(nn.Module):
    """Running mean and standard deviation of features [F], kept with the parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))

    @property
    def std(self) -> Tensor:
        return torch.sqrt(self.var + 1e-6)

    def scale(self, rows: Tensor, active: Tensor) -> Tensor:
        """Rows [..., N, F], normalised and cut off at 10 standard deviations; 0 where inactive."""
        return ((rows - self.mean) / self.std).clamp_(-10, 10).mul_(active.unsqueeze(-1))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Merge rows [B, F] into the moments (the parallel form of Chan, Golub and LeVeque)."""
        n = len(rows)
        if n == 0:
            return
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
        total = self.count + n
        share = (n / total).float()
        delta = mean - self.mean
        if self.count == 0:
            self.var.copy_(var)
        else:
            self.var.mul_(1 - share).add_(share * var + share * (1 - share) * delta**2)
        self.mean.add_(share * delta)
        self.count.copy_(total)


def draw(logits: Tensor, active: Tensor, generator: torch.Generator | None) -> Tensor:
    """Choices [B, N] drawn from logits [B, N, K]; inactive servers get the mode."""
    drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator).view(active.shape)
    return torch.where(active, drawn, logits.argmax(-1))


def joint_sums(out: Tensor) -> Tensor:
    """Outputs [..., N, O] of every server -> their sums [..., O^N] for all joint choices, the last server's fastest.

    Of logits they are those of independent choices; of utilities, values by decomposition (Sunehag et al.,
    arXiv:1706.05296, 2017).
    """
    total = out[..., 0, :]
    for i in range(1, out.shape[-2]):
        total = (total.unsqueeze(-1) + out[..., i, :].unsqueeze(-2)).flatten(-2)
    return total


def centered(out: Tensor, active: Tensor) -> Tensor:
    """Outputs [..., N, O], which are 0 where inactive, less their mean over the active servers; 0 where inactive.

    Actions of type "normalized" are logarithms of weights, and dispatch rules know weights relative to one another
    only, so that what all actions have in common means nothing. Left to the network, it drifts with the noise of the
    gradients until all actions are cut off at the same bound: equal weights, from where no gradient leads back.
    """
    return (out - mean_over_servers(out, active).unsqueeze(-2)) * active.unsqueeze(-1)


def masked(x: Tensor, active: Tensor) -> Tensor:
    """X [..., N, F] with 0 where inactive."""
    return x if active.all() else x * active.unsqueeze(-1)


def mean_over_servers(x: Tensor, active: Tensor) -> Tensor:
    """Mean [..., F] of x [..., N, F], which is 0 where inactive, over the active servers."""
    return x.sum(-2) / active.sum(-1, keepdim=True).clamp(min=1)


def value_of_context(hidden: int) -> nn.Sequential:
    """A value [..., 1] of a context [..., 2 H]."""
    return nn.Sequential(linear(2 * hidden, hidden, math.sqrt(2)), nn.ReLU(), linear(hidden, 1, 1.0))


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer, orthogonal at the start, without offsets."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


#: Networks by the name that a checkpoint has for them; their keywords are plain data.
NETWORKS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "equivariant": FlatServerNetwork,
    "actor-critic": ServerNetwork,
    "recurrent": RecurrentActor,
}
