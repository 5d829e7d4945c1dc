"""Networks that share their parameters over servers and balancers, as BenchMARL's models."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

from ...errors import MissingExtraError, UnsupportedSpaceError

try:
    import torch
    from torch import nn

    with warnings.catch_warnings():
        # TorchRL and its dependencies warn of their own classes while they are imported.
        warnings.simplefilter("ignore")
        from benchmarl.models.common import Model, ModelConfig
        from tensordict import TensorDictBase
        from torchrl.data import Categorical
except ModuleNotFoundError as error:
    raise MissingExtraError("benchmarl", "benchmarl", "training with BenchMARL") from error

from ...policies.action_kind import ActionKind
from ...policies.networks import MLP, FlatServerNetwork
from ..torchrl_env import GROUP

#: Where the background load of an "index" action begins: a third of a flow per configured core, or half a flow behind
#: the hyperbolic tangent of algorithms that have one.
FIRST_LOAD = -0.75


class LoadBalanceModel(Model):
    """A network of this package as BenchMARL's model of an actor, or of a critic that sees what one balancer sees.

    Its parameters are shared by the balancers. The keywords are those of :class:`LoadBalanceModelConfig` and of
    BenchMARL's ``Model``.
    """

    def __init__(self, network: str, num_servers: int, hidden: int, **keys: Any) -> None:
        super().__init__(**keys)
        sizes = {key: spec.shape[-1] for key, spec in self.input_spec.items(True, True)}
        self.num_servers, self.equivariant = num_servers, network == "equivariant"
        self.observed = next(key for key in self.in_keys if key[-1] == "observation")
        # A critic of continuous actions is given them, too.
        self.acted = next((key for key in self.in_keys if key[-1] == "action"), None)
        self.features = sizes[self.observed] // num_servers - 1
        outputs = self.output_leaf_spec.shape[-1]
        kind = kind_of(self.action_spec[GROUP, "action"], num_servers)
        value = self.out_key[-1] in ("state_value", "state_action_value")
        self.numbers = kind.numbers
        # Of continuous actions all means come first, then all standard deviations.
        self.parts = 1 if value or kind.joint else outputs // (num_servers * kind.numbers)
        if self.equivariant:
            if value:
                features = self.features + (0 if self.acted is None else kind.numbers)
                self.network: nn.Module = FlatServerNetwork(features, hidden, value=True)
            else:
                arguments = kind.actor_arguments(self.features, hidden)
                arguments["outputs"] *= self.parts
                self.network = FlatServerNetwork(**arguments)
        else:
            self.network = MLP([sum(sizes.values()), hidden, hidden, outputs])
        if kind.numbers > 1 and not value:
            self._begin_with_little_background()
        self.network.to(self.device)

    @torch.no_grad()
    def _begin_with_little_background(self) -> None:
        """Let actions of type "index" begin near FIRST_LOAD, with room to both sides, not at two flows per core."""
        if self.equivariant:
            means = cast(nn.Linear, self.network.head).bias[: self.numbers]
        else:
            last = [module for module in self.network.modules() if isinstance(module, nn.Linear)][-1]
            means = last.bias[: self.num_servers * self.numbers]
        means[1 :: self.numbers] += FIRST_LOAD

    def _perform_checks(self) -> None:
        super()._perform_checks()
        if self.centralised or not self.share_params:
            raise UnsupportedSpaceError(
                "LoadBalanceModel is of one balancer, with parameters that all share: it takes "
                "share_policy_params=True and is no central critic; give the experiment BenchMARL's MlpConfig as "
                "critic_model_config"
            )

    def _forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = tensordict.get(self.observed)
        n = self.num_servers
        if self.acted is not None:
            servers = inputs[..., n:].unflatten(-1, (n, self.features))
            acted = tensordict.get(self.acted).unflatten(-1, (n, self.numbers))
            inputs = torch.cat([inputs[..., :n], torch.cat([servers, acted], -1).flatten(-2)], -1)
        out = self.network(inputs)
        if self.equivariant and self.parts > 1:
            out = out.unflatten(-1, (n, self.parts, self.numbers)).transpose(-2, -3).flatten(-3)
        return tensordict.set(self.out_key, out)


@dataclass
class LoadBalanceModelConfig(ModelConfig):
    """BenchMARL's configuration of :class:`LoadBalanceModel`."""

    network: str
    """"equivariant", parameters shared over the servers, or "mlp", dense layers"""
    num_servers: int
    """N, of the observations"""
    hidden: int = 64
    """width of the layers"""

    @staticmethod
    def associated_class() -> type[Model]:
        return LoadBalanceModel


def kind_of(action: Any, num_servers: int) -> ActionKind:
    """Return the kind of actions of the task's spec."""
    if isinstance(action, Categorical):
        return ActionKind(round(float(action.n) ** (1 / num_servers)), True)
    return ActionKind(0, False, numbers=action.shape[-1] // num_servers)
