"""Networks that share their parameters over servers and balancers, as BenchMARL's models."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

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
        # A critic of continuous actions is given them, too: one number per server.
        self.acted = next((key for key in self.in_keys if key[-1] == "action"), None)
        self.features = sizes[self.observed] // num_servers - 1
        outputs = self.output_leaf_spec.shape[-1]
        kind = kind_of(self.action_spec[GROUP, "action"], num_servers)
        value = self.out_key[-1] in ("state_value", "state_action_value")
        # Of continuous actions all means come first, then all standard deviations.
        self.parts = 1 if value or kind.joint else outputs // num_servers
        if self.equivariant:
            if value:
                features = self.features + (self.acted is not None)
                self.network: nn.Module = FlatServerNetwork(features, hidden, value=True)
            else:
                arguments = kind.actor_arguments(self.features, hidden)
                self.network = FlatServerNetwork(**arguments | {"outputs": kind.choices or self.parts})
        else:
            self.network = MLP([sum(sizes.values()), hidden, hidden, outputs])
        self.network.to(self.device)

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
            servers = torch.cat([servers, tensordict.get(self.acted).unsqueeze(-1)], -1)
            inputs = torch.cat([inputs[..., :n], servers.flatten(-2)], -1)
        out = self.network(inputs)
        if self.equivariant and self.parts > 1:
            out = out.unflatten(-1, (n, self.parts)).transpose(-1, -2).flatten(-2)
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
    """Return the kind of actions of a TorchRL spec."""
    if isinstance(action, Categorical):
        return ActionKind(round(float(action.n) ** (1 / num_servers)), True)
    return ActionKind(0, False)
