"""BenchMARL on the vector core of several balancers: a task, networks that share their weights, and one recipe.

BenchMARL steps PettingZoo environments one after the other. The task here, :class:`LoadBalanceTask`, hands it all
replicas as one batched environment (:class:`~lbgym.training.torchrl_env.MultiTorchRLEnv`). Every balancer runs the same
policy on what it observes itself; what the balancers know together, the environment's state, only helps to train it.

What the algorithms differ in is one table, :data:`ALGORITHMS`; the recipe, :func:`train_benchmarl`, is the same for
all.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import CheckpointError, InvalidOptionError, MissingExtraError, UnknownNameError, UnsupportedSpaceError

try:
    import torch
    from torch import Tensor, nn

    with warnings.catch_warnings():
        # TorchRL and its dependencies warn of their own classes while they are imported
        warnings.simplefilter("ignore")
        import benchmarl.algorithms as algorithms
        import benchmarl.environments as environments
        import benchmarl.experiment.experiment as experiments
        from benchmarl.environments import Task, TaskClass
        from benchmarl.experiment import Callback, Experiment, ExperimentConfig
        from benchmarl.models import MlpConfig
        from benchmarl.models.common import Model, ModelConfig
        from benchmarl.utils import seed_everything
        from tensordict import TensorDict, TensorDictBase
        from torchrl.data import Categorical, Composite
        from torchrl.envs import EnvBase, RewardScaling, Transform
        from torchrl.envs.utils import ExplorationType, set_exploration_type
except ModuleNotFoundError as error:
    raise MissingExtraError("benchmarl", "benchmarl", "training with BenchMARL") from error

from ..env.multi_agent_vector import REWARD_SHARINGS, MultiLoadBalanceVectorEnv
from ..policies.action_kind import ActionKind
from ..policies.checkpoints import read_checkpoint
from ..policies.networks import MLP, NETWORKS, FlatServerNetwork
from ..policies.neural import ExportedPolicy
from .config import PER_ALGORITHM, TrainingConfig, saved_config
from .exported import check_shapes, write_policy
from .runs import Progress, log, output_file, summary_writer, torch_threads
from .torchrl_env import GROUP, MultiTorchRLEnv

if TYPE_CHECKING:
    from ..scenarios import Scenario, ScenarioDistribution

#: Keys of the environment by action type, unless told otherwise. Two levels make 2 ** 7 joint actions of the 7 servers
#: of "marllb-moderate", three would make 2,187; and weights that are too far apart at random overload servers.
WEIGHTS: dict[str, dict[str, Any]] = {
    "joint": {"action_weights": [1.0, 2.0]},
    "normalized": {"min_weight": 0.25, "max_weight": 4.0},
}

#: Keys of the environment that balancers have together; one that acts alone knows none of them.
_OF_SEVERAL = ("num_balancers", "reward_sharing", "action_offsets", "action_delay")


# The task


class LoadBalanceTaskClass(TaskClass):
    """Balancers in front of the same servers, for BenchMARL: a group of agents "lb" and a state for central critics.

    Its ``config`` has the keys of :class:`lbgym.MultiLoadBalanceVectorEnv`, ``scenario`` being the task's unless given,
    and of these its own:

    * ``sees_weights``: see :class:`~lbgym.training.torchrl_env.TorchRLEnv` (default True);
    * ``reward_loc`` and ``reward_scale``: BenchMARL is given ``reward_scale * reward + reward_loc`` (default 1 and 0).

    Observations are "flat" and normalised unless told otherwise, rewards "open_flows". Without an ``action_type``,
    algorithms with continuous actions get "normalized" and those with discrete ones "joint", with the weights of
    ``WEIGHTS``.
    """

    def get_env_fun(
        self, num_envs: int, continuous_actions: bool, seed: int | None, device: Any
    ) -> Callable[[], EnvBase]:
        """What makes the environment of ``num_envs`` replicas."""
        keys = {"observation": "flat", "normalize": True, "reward_type": "open_flows"} | self.config
        sees_weights = keys.pop("sees_weights", True)
        for name in ("reward_loc", "reward_scale"):
            keys.pop(name, None)
        keys.setdefault("scenario", self.name.lower().replace("_", "-"))
        keys.setdefault("action_type", "normalized" if continuous_actions else "joint")
        keys = WEIGHTS.get(keys["action_type"], {}) | keys

        def make() -> EnvBase:
            vector = MultiLoadBalanceVectorEnv(num_envs, autoreset_mode="Disabled", **keys)
            env = MultiTorchRLEnv(vector, sees_weights=sees_weights, device=device)
            env.set_seed(seed)
            return env

        return make

    def supports_continuous_actions(self) -> bool:
        return self.config.get("action_type", "normalized") in ("normalized", "continuous")

    def supports_discrete_actions(self) -> bool:
        return self.config.get("action_type", "joint") == "joint"

    def max_steps(self, env: EnvBase) -> int:
        return int(env.env.max_steps)

    def has_render(self, env: EnvBase) -> bool:
        return False

    def group_map(self, env: EnvBase) -> dict[str, list[str]]:
        return dict(env.group_map)

    def observation_spec(self, env: EnvBase) -> Composite:
        return Composite({GROUP: _of_one(env.observation_spec, env)[GROUP]})

    def state_spec(self, env: EnvBase) -> Composite | None:
        return Composite({"state": _of_one(env.observation_spec, env)["state"]})

    def action_spec(self, env: EnvBase) -> Composite:
        return _of_one(env.full_action_spec, env)

    def action_mask_spec(self, env: EnvBase) -> Composite | None:
        return None

    def info_spec(self, env: EnvBase) -> Composite | None:
        return None

    def get_env_transforms(self, env: EnvBase) -> list[Transform]:
        """The scaling of the rewards, if any."""
        loc, scale = self.config.get("reward_loc", 0.0), self.config.get("reward_scale", 1.0)
        if (loc, scale) == (0.0, 1.0):
            return []
        return [RewardScaling(loc=loc, scale=scale, in_keys=[(GROUP, "reward")])]

    @staticmethod
    def env_name() -> str:
        return "lbgym"


def _of_one(spec: Composite, env: EnvBase) -> Composite:
    """The spec of one replica."""
    return spec[(0,) * len(env.batch_size)].clone()


class LoadBalanceTask(Task):
    """The built-in scenarios as BenchMARL's tasks: ``LoadBalanceTask.MARLLB_MODERATE.get_task({"num_balancers": 3})``.

    Importing this module puts them in BenchMARL's registry, as "lbgym/marllb_moderate" and so on.
    """

    MARLLB_MODERATE = None
    MARLLB_LARGE = None
    UNIFORM = None
    HETEROGENEOUS = None
    NOISY_NEIGHBOUR = None
    FAILURE = None
    DIURNAL = None
    BURSTY = None
    MODULATED = None
    FLASH_CROWD = None
    HEAVY_TAILED = None
    OVERLOAD = None
    FLEET = None
    PARK = None
    LLM_SERVING = None
    SAMPLE_TRACE = None

    @staticmethod
    def associated_class() -> type[TaskClass]:
        return LoadBalanceTaskClass

    def get_task(self, config: dict[str, Any] | None = None) -> TaskClass:
        """The task with these keys of the environment; None: the defaults."""
        return LoadBalanceTaskClass(self.name, dict(config or {}))


if LoadBalanceTask not in environments.tasks:
    environments.tasks.append(LoadBalanceTask)
    environments.task_config_registry.update(
        {f"lbgym/{name.lower()}": task for name, task in LoadBalanceTask.__members__.items()}
    )


# The networks


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
        # a critic of continuous actions is given them, too: one number per server
        self.acted = next((key for key in self.in_keys if key[-1] == "action"), None)
        self.features = sizes[self.observed] // num_servers - 1
        outputs = self.output_leaf_spec.shape[-1]
        kind = kind_of(self.action_spec[GROUP, "action"], num_servers)
        value = self.out_key[-1] in ("state_value", "state_action_value")
        # of continuous actions all means come first, then all standard deviations
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
    """How actions of a TorchRL spec are made of one choice per server."""
    if isinstance(action, Categorical):
        return ActionKind(round(float(action.n) ** (1 / num_servers)), True)
    return ActionKind(0, False)


# The recipe


@dataclass(frozen=True)
class Algorithm:
    """What one algorithm of BenchMARL takes, and its defaults here.

    Attributes:
        name: of its configuration's class, in ``benchmarl.algorithms``.
        action_types: those it takes, the default first.
        own_critic: whether its critic, if any, sees what one balancer sees, and not the state.
        num_steps: steps of every replica between two updates.
        learning_rate: step size of the optimiser.
        options: over BenchMARL's defaults.
    """

    name: str
    action_types: tuple[str, ...]
    own_critic: bool
    num_steps: int
    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Its configuration's class."""
        return getattr(algorithms, self.name)

    @property
    def on_policy(self) -> bool:
        return bool(self.load().on_policy())


_EITHER = ("normalized", "joint")
# With gamma 0.6 a reward matters for two or three steps: targets can follow at once, and what the policy did long ago
# is of no use.
_REPLAY = {"off_policy_memory_size": 65_536, "polyak_tau": 0.05}
# Where all balancers act alike always, nothing tells how much better that is than anything else.
_GREEDY = _REPLAY | {"exploration_eps_init": 1.0, "exploration_eps_end": 0.1}
# Actions are in [-1, 1], which a standard deviation of 1 would leave all the time.
_ACTOR = {"use_tanh_normal": False, "scale_mapping": "biased_softplus_0.3"}
# The entropy of an action per server outweighs rewards scaled to 1 for long if its weight begins at 1, too.
_SOFT = _REPLAY | {"alpha_init": 0.02, "scale_mapping": "biased_softplus_0.3"}

#: The algorithms by name.
ALGORITHMS = {
    "qmix": Algorithm("QmixConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "vdn": Algorithm("VdnConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "iql": Algorithm("IqlConfig", ("joint",), True, 8, 1e-3, _GREEDY),
    "mappo": Algorithm("MappoConfig", _EITHER, False, 16, 3e-3, _ACTOR),
    "ippo": Algorithm("IppoConfig", _EITHER, True, 16, 3e-3, _ACTOR),
    "maddpg": Algorithm(
        "MaddpgConfig",
        ("normalized",),
        False,
        8,
        2e-4,
        _REPLAY | {"exploration_eps_init": 0.4, "exploration_eps_end": 0.05},
    ),
    "isac": Algorithm("IsacConfig", _EITHER, True, 8, 1e-3, _SOFT),
    "masac": Algorithm("MasacConfig", _EITHER, False, 8, 1e-3, _SOFT),
}

# What is logged, by the names of Progress and those of BenchMARL's losses, of which the first found counts.
_LOSSES = {
    "policy": ("loss_objective", "loss_actor"),
    "value": ("loss", "loss_critic", "loss_qvalue", "loss_value"),
    "entropy": ("entropy",),
    "kl": ("kl_approx",),
    "clipped": ("clip_fraction",),
    "temperature": ("alpha",),
}


@dataclass(kw_only=True)
class BenchMARLConfig(TrainingConfig):
    """What to train on and how, with an algorithm of BenchMARL.

    The fields whose default depends on the algorithm hold it once the configuration is made; so ``dataclasses.replace``
    with another ``algorithm`` keeps those of the first.

    A step is one of a whole replica: all its balancers act.
    """

    algorithm: str = "qmix"
    """"qmix", "vdn", "iql", "mappo", "ippo", "maddpg", "isac" or "masac": a name of ``ALGORITHMS``"""
    policy: str = "equivariant"
    """"equivariant", parameters shared over the servers, or "mlp", dense layers; central critics are always dense"""
    options: dict[str, Any] = field(default_factory=dict)
    """further fields of the algorithm's configuration in BenchMARL, such as ``mixing_embed_dim``, or of its
    ``ExperimentConfig``, such as ``polyak_tau``, over those of ``ALGORITHMS``"""

    scenario: str | Path | Scenario | ScenarioDistribution | None = "marllb-moderate"
    """a scenario's name, a TOML path, a Scenario, or a distribution of them"""
    num_balancers: int | None = None
    """balancers; None: the scenario's"""
    reward_sharing: str = "mean"
    """how the balancers' rewards come about: "mean", "field", "own" or "difference"."""
    sees_weights: bool = True
    """observe of each server its weight in force as well; without it a policy could not tell a slow server from one
    that was given too much"""
    action_type: str = PER_ALGORITHM
    """an ``action_type`` of ``LoadBalanceEnv``: "joint" for "qmix", "vdn" and "iql", "normalized" for
    "maddpg", either for the others (default "normalized")"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of ``MultiLoadBalanceVectorEnv``; unless told otherwise "joint" actions are of weights 1 and 2,
    "normalized" ones of weights from 0.25 to 4"""

    num_steps: int = PER_ALGORITHM
    """steps of every replica between two updates; 16 for "mappo" and "ippo", 8 for the others"""
    learning_rate: float = PER_ALGORITHM
    """step size of the optimiser; 3e-3 for "mappo" and "ippo", 2e-4 for "maddpg", 1e-3 for the others"""
    gamma: float = 0.6
    """discount per step; queues forget within a second what was done, and a longer view adds noise"""
    batch_size: int = 256
    """steps of a replica in a gradient step; off-policy algorithms only"""
    optimizer_steps: int = 4
    """gradient steps after each collection; off-policy algorithms only"""
    hidden: int = 32
    """width of the layers; those of central critics are twice as wide"""
    exploration: float = 0.4
    """share of the budget over which exploration falls from ``exploration_eps_init`` to ``exploration_eps_end``: the
    share of random actions of "qmix", "vdn" and "iql", the standard deviation of the noise of "maddpg"."""
    gae_lambda: float = 0.9
    """lambda of the generalised advantage estimate; "mappo" and "ippo" only"""
    epochs: int = 2
    """passes over the rollout per update; "mappo" and "ippo" only"""
    minibatches: int = 4
    """minibatches per pass; "mappo" and "ippo" only"""

    whole_numbers: ClassVar[dict[str, int]] = TrainingConfig.whole_numbers | {
        "batch_size": 1,
        "optimizer_steps": 1,
        "epochs": 1,
        "minibatches": 1,
    }

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UnknownNameError("algorithm", self.algorithm, ALGORITHMS, "BenchMARLConfig")
        kind = ALGORITHMS[self.algorithm]
        self.fill_in(
            action_type=kind.action_types[0],
            num_steps=kind.num_steps,
            learning_rate=kind.learning_rate,
        )
        super().__post_init__()
        if self.reward_sharing not in REWARD_SHARINGS:
            raise UnknownNameError("reward sharing", self.reward_sharing, REWARD_SHARINGS, "BenchMARLConfig")
        if not 0.0 < self.exploration <= 1.0:
            raise InvalidOptionError(
                f"BenchMARLConfig.exploration must be above 0 and at most 1, got {self.exploration!r}"
            )
        if self.policy not in ("mlp", "equivariant"):
            raise UnknownNameError("policy", self.policy, ("mlp", "equivariant"), "BenchMARLConfig")
        self.check_action_type(f"{self.algorithm!r} of BenchMARL", kind.action_types, "mappo")
        self.env_kwargs = {**WEIGHTS.get(self.action_type, {}), **self.env_kwargs}

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a balancer's observations and actions depend on, also where it is alone."""
        return {k: v for k, v in super().observation_kwargs().items() if k not in _OF_SEVERAL}

    def environment_kwargs(self) -> dict[str, Any]:
        """All keys of the environment to train on, but the number of replicas and the autoreset mode."""
        together = {"num_balancers": self.num_balancers, "reward_sharing": self.reward_sharing}
        return together | super().environment_kwargs()

    def make_env(self) -> MultiLoadBalanceVectorEnv:  # type: ignore[override]
        """The vector environment to train on."""
        return MultiLoadBalanceVectorEnv(self.num_envs, autoreset_mode=self.autoreset_mode, **self.environment_kwargs())


@dataclass(frozen=True)
class BenchMARLResult:
    """A finished training run: the policy of one balancer, its checkpoint (None without ``out``) and the history."""

    policy: ExportedPolicy
    checkpoint: Path | None
    history: list[Progress]


#: Fields of BenchMARL's ``ExperimentConfig`` that ``options`` may have; the others follow from the configuration, or
#: are for files, devices and logs.
_EXPERIMENT_OPTIONS = (
    "adam_eps",
    "adam_extra_kwargs",
    "clip_grad_norm",
    "clip_grad_val",
    "soft_target_update",
    "polyak_tau",
    "hard_target_update_frequency",
    "exploration_eps_init",
    "exploration_eps_end",
    "off_policy_memory_size",
    "off_policy_init_random_frames",
    "off_policy_use_prioritized_replay_buffer",
    "off_policy_prb_alpha",
    "off_policy_prb_beta",
)


class _Stop(BaseException):
    """Ends BenchMARL's loop, which has no other way out; no ``Exception``, which it would report as a failure."""


class _Experiment(Experiment):
    """BenchMARL's experiment without files, prints and progress bar."""

    def _setup_name(self) -> None:
        # BenchMARL makes a folder and pickles callbacks into it
        self.algorithm_name = self.algorithm_config.associated_class().__name__.lower()
        self.model_name = self.critic_model_name = "lbgym"
        self.environment_name, self.task_name = self.task.env_name(), self.task.name.lower()
        self.name, self.folder_name = f"{self.algorithm_name}_{self.task_name}", Path()
        self.closed = False

    def run(self) -> None:
        """Train until the callback stops it or the budget is used."""
        seed_everything(self.seed)
        with _quiet():
            self._collection_loop()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            super().close()

    def explores(self) -> Any:
        """The module that draws the exploration, if the algorithm has one, and the name of how much."""
        last = self.group_policies[GROUP][-1]
        return next(((last, name) for name in ("eps", "sigma") if hasattr(last, name)), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bar nor news of TorchRL's buffers for a while, and no warnings of what cannot be helped."""
    bar, news = experiments.tqdm, logging.getLogger("torchrl")
    experiments.tqdm, level = partial(bar, disable=True), news.level
    news.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # episodes are longer than what is collected between two updates
            warnings.filterwarnings("ignore", message="No episode terminated this iteration")
            # it is BenchMARL that uses it
            warnings.filterwarnings("ignore", message="SyncDataCollector has been deprecated")
            yield
    finally:
        experiments.tqdm = bar
        news.setLevel(level)


class _Watch(Callback):
    """Reports progress, lets exploration fall, saves now and then, and stops at the time limit or when told to."""

    def __init__(
        self,
        config: BenchMARLConfig,
        told: Callable[[Progress], bool | None] | None,
        writer: Any,
        save: Callable[[], None],
        *,
        step: int,
        seconds: float,
        scaling: tuple[float, float],
    ) -> None:
        super().__init__()
        self.config, self.told, self.writer, self.save = config, told, writer, save
        self.step, self.seconds, self.scaling = step, seconds, scaling
        self.history: list[Progress] = []
        self.reward = 0.0
        self.collected = 0
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self.written = self.begun = time.perf_counter()
        self.started = self.begun - self.seconds

    @property
    def fraction(self) -> float:
        config = self.config
        by_steps = self.step / config.total_steps if config.total_steps is not None else 0.0
        by_time = self.seconds / config.seconds if config.seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_setup(self) -> None:
        """Take exploration over from BenchMARL, whose schedules know nothing of a budget of time."""
        if (found := self.experiment.explores()) is not None:
            module, _ = found
            module.step = lambda frames=1: None
            self.explore()

    def explore(self) -> None:
        """Set how much is explored, by the share of the budget that is used."""
        if (found := self.experiment.explores()) is not None:
            module, name = found
            share = min(1.0, self.fraction / self.config.exploration)
            first, last = (float(getattr(module, f"{name}_{end}")) for end in ("init", "end"))
            getattr(module, name).fill_(first + (last - first) * share)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        loc, scale = self.scaling
        self.reward = (float(batch["next", GROUP, "reward"].mean()) - loc) / scale
        self.collected = batch.numel()
        self.step += self.collected

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        now = time.perf_counter()
        self.seconds = now - self.started
        losses = {
            name: float(training_td[key].float().mean())
            for name, keys in _LOSSES.items()
            if (key := next((key for key in keys if key in training_td.keys()), None)) is not None  # noqa: SIM118
        }
        progress = Progress(
            step=self.step,
            seconds=self.seconds,
            fraction=self.fraction,
            steps_per_second=self.collected / (now - self.begun),
            reward=self.reward,
            fct_mean=float("nan"),
            losses=losses,
        )
        self.history.append(progress)
        if self.writer is not None:
            log(self.writer, progress)
        self.begun = now
        self.explore()
        if now - self.written >= self.config.checkpoint_every:
            self.save()
            self.written = now
        told = bool(self.told(progress)) if self.told is not None else False
        if told or (self.config.seconds is not None and self.seconds >= self.config.seconds):
            raise _Stop


def train_benchmarl(
    config: BenchMARLConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    tensorboard: bool = False,
) -> BenchMARLResult:
    """Train with an algorithm of BenchMARL.

    Rewards are scaled once, before the training: with random actions their mean becomes 0 and the standard deviation of
    their discounted sum 1. The time for that and for compiling the simulator is not counted.

    Args:
        config: None: the defaults.
        out: the checkpoint's file, ending in .pt, or a folder for ``benchmarl-qmix.pt`` and so on; always written whole
            or not at all. None: keep nothing.
        resume_from: a checkpoint to go on with: parameters, also of critics, mixer and targets, optimisers, step count,
            scale of the rewards. Everything else is the configuration's. The replay buffer is not saved: off-policy
            algorithms fill a new one as they go.
        callback: told the progress after every update; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the checkpoint.

    On KeyboardInterrupt the checkpoint is saved before the exception goes on.

    Raises:
        CheckpointError: if the checkpoint does not fit the environment, or is of another algorithm, policy or width.
        UnknownNameError: for an option that the algorithm does not have.
    """
    config = config or BenchMARLConfig()
    algorithm_config, experiment_config = _configs(config)
    checkpoint = output_file(out, f"benchmarl-{config.algorithm}.pt")
    logs = checkpoint.parent / "tensorboard" if checkpoint is not None and tensorboard else None
    with torch_threads(config.torch_threads), summary_writer(logs) as writer, TemporaryDirectory() as scratch:
        facts = _look_at(config)
        saved = None if resume_from is None else _read(Path(resume_from), config, facts)
        scaling = facts.scaling if saved is None else tuple(saved["trainer"]["scaling"])
        step, seconds = (0, 0.0) if saved is None else (saved["step"], saved["seconds"])
        path = checkpoint or Path(scratch) / "policy.pt"

        def save() -> None:
            _save(path, config, experiment, facts, watch)

        watch = _Watch(config, callback, writer, save, step=step, seconds=seconds, scaling=scaling)
        remaining = 2**62 if config.total_steps is None else config.total_steps - step
        experiment_config.max_n_iters = max(1, -(-remaining // (config.num_envs * config.num_steps)))
        experiment = _experiment(config, algorithm_config, experiment_config, facts, scaling, watch)
        try:
            if saved is not None:
                _restore(experiment, saved, Path(resume_from or ""))
            watch.begin()
            try:
                if remaining > 0 and watch.fraction < 1.0:
                    experiment.run()
            except _Stop:
                pass
            finally:
                save()
        finally:
            experiment.close()
        policy = ExportedPolicy(read_checkpoint(path))
    return BenchMARLResult(policy, checkpoint, watch.history)


@dataclass(frozen=True)
class _Facts:
    """What the networks depend on, and the scaling of rewards, (loc, scale): BenchMARL's are ``scale * r + loc``."""

    num_servers: int
    num_balancers: int
    features: int
    kind: ActionKind
    scaling: tuple[float, float]


def _look_at(config: BenchMARLConfig) -> _Facts:
    """The facts of a configuration's environment, of which a short run with random actions tells the rewards."""
    env = config.make_env()
    try:
        env.action_space.seed(config.seed)
        env.reset(seed=config.seed)
        steps = min(config.max_steps, 96)
        rewards = np.array([env.step(env.action_space.sample())[1] for _ in range(steps)])
        # what comes first is of empty servers
        rewards = rewards[steps // 3 :]
        total = np.zeros(rewards.shape[1:])
        sums = []
        for centred in rewards - rewards.mean():
            total = config.gamma * total + centred
            sums.append(total)
        scale = 1.0 / max(float(np.std(sums)), 1e-6)
        return _Facts(
            num_servers=env.num_servers,
            num_balancers=env.num_balancers,
            features=len(env.feature_columns),
            kind=ActionKind.of(env.agent_action_space, env.num_servers),
            scaling=(-scale * float(rewards.mean()), scale),
        )
    finally:
        env.close()


def _configs(config: BenchMARLConfig) -> tuple[Any, ExperimentConfig]:
    """BenchMARL's configurations of the algorithm and of the experiment."""
    kind = ALGORITHMS[config.algorithm]
    algorithm_config = kind.load().get_from_yaml()
    own = {f.name for f in fields(algorithm_config)} - {"lmbda"}
    options = {**kind.options, **config.options}
    for name in options:
        if name not in own and name not in _EXPERIMENT_OPTIONS:
            raise UnknownNameError("option", name, own | {*_EXPERIMENT_OPTIONS}, f"options of {config.algorithm!r}")
    algorithm_options = {name: value for name, value in options.items() if name in own}
    if kind.on_policy:
        algorithm_options["lmbda"] = config.gae_lambda
    frames = config.num_envs * config.num_steps
    experiment_config = replace(
        ExperimentConfig.get_from_yaml(),
        prefer_continuous_actions=config.action_type != "joint",
        gamma=config.gamma,
        lr=config.learning_rate,
        max_n_frames=None,
        on_policy_collected_frames_per_batch=frames,
        on_policy_n_envs_per_worker=config.num_envs,
        on_policy_n_minibatch_iters=config.epochs,
        on_policy_minibatch_size=max(1, frames // config.minibatches),
        off_policy_collected_frames_per_batch=frames,
        off_policy_n_envs_per_worker=config.num_envs,
        off_policy_n_optimizer_steps=config.optimizer_steps,
        off_policy_train_batch_size=config.batch_size,
        evaluation=False,
        render=False,
        # replicas of the environment for evaluations, which there are none of
        evaluation_episodes=1,
        loggers=[],
        create_json=False,
        **{name: value for name, value in options.items() if name not in own},
    )
    return replace(algorithm_config, **algorithm_options), experiment_config


def _experiment(
    config: BenchMARLConfig,
    algorithm_config: Any,
    experiment_config: ExperimentConfig,
    facts: _Facts,
    scaling: tuple[float, ...],
    watch: _Watch,
) -> _Experiment:
    loc, scale = scaling
    keys = {"sees_weights": config.sees_weights, "reward_loc": loc, "reward_scale": scale}
    model = LoadBalanceModelConfig(network=config.policy, num_servers=facts.num_servers, hidden=config.hidden)
    critic = replace(model)
    if not ALGORITHMS[config.algorithm].own_critic:
        critic = MlpConfig(num_cells=[2 * config.hidden] * 2, activation_class=nn.Tanh, layer_class=nn.Linear)
    with _quiet():
        return _Experiment(
            task=LoadBalanceTaskClass("TRAINING", config.environment_kwargs() | keys),
            algorithm_config=algorithm_config,
            model_config=model,
            critic_model_config=critic,
            seed=config.seed,
            config=experiment_config,
            callbacks=[watch],
        )


# Checkpoints


def _save(path: Path, config: BenchMARLConfig, experiment: _Experiment, facts: _Facts, watch: _Watch) -> None:
    """Write a checkpoint whose network computes what BenchMARL's policy does."""
    squash = not facts.kind.choices and any(
        getattr(experiment.algorithm_config, name, False) for name in ("use_tanh_normal", "use_tanh_mapping")
    )
    network, arguments, parameters = _actor(config, experiment, facts)
    _check_equal(experiment, network, arguments, parameters, squash)
    write_policy(
        path,
        config,
        algo=f"benchmarl-{config.algorithm}",
        network=network,
        arguments=arguments,
        parameters=parameters,
        kind=facts.kind,
        num_servers=facts.num_servers,
        features=facts.features,
        sees_weights=config.sees_weights,
        squash=squash,
        step=watch.step,
        seconds=watch.seconds,
        trainer={
            "num_balancers": facts.num_balancers,
            "scaling": list(watch.scaling),
            "losses": {k: v for k, v in experiment.losses[GROUP].state_dict().items() if isinstance(v, Tensor)},
            "optimizers": {name: o.state_dict() for name, o in experiment.optimizers[GROUP].items()},
        },
    )


def _actor(
    config: BenchMARLConfig, experiment: _Experiment, facts: _Facts
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The actor as a network of :mod:`lbgym.policies.networks`: name, arguments and parameters."""
    policy = experiment.algorithm.get_policy_for_loss(GROUP)
    model = next(module for module in policy.modules() if isinstance(module, LoadBalanceModel))
    parameters = {name: value.detach().clone() for name, value in model.network.state_dict().items()}
    n, choices, hidden = facts.num_servers, facts.kind.choices, config.hidden
    per_server = facts.features + config.sees_weights
    last: tuple[str, ...]
    arguments: dict[str, Any]
    if model.equivariant:
        last, outputs = ("head.weight", "head.bias"), 1
        arguments = facts.kind.actor_arguments(per_server, hidden)
    else:
        last, outputs = tuple(parameters)[-2:], n
        arguments = {"sizes": [n * (1 + per_server), hidden, hidden, choices**n if choices else n]}
    if model.parts > 1:
        # the standard deviations, which come after the means, have no part in acting
        parameters |= {name: parameters[name][:outputs].clone() for name in last}
    return config.policy, arguments, parameters


def _check_equal(
    experiment: _Experiment,
    name: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    squash: bool,
) -> None:
    """Hold the network of a checkpoint to the actions of BenchMARL's policy on random observations.

    Raises:
        CheckpointError: if there are others.
    """
    network = NETWORKS[name](**arguments)
    network.load_state_dict(parameters)
    generator = torch.Generator().manual_seed(0)
    observations = torch.rand((16, *experiment.observation_spec[GROUP, "observation"].shape), generator=generator)
    observed = TensorDict({"observation": observations}, observations.shape[:-1])
    told = TensorDict({GROUP: observed}, observations.shape[:1])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        wanted = experiment.algorithm.get_policy_for_loss(GROUP)(told)[GROUP, "action"]
        got = network(observations)
    if wanted.dtype == torch.int64:
        same = bool((got.argmax(-1) == wanted).all())
    else:
        same = torch.allclose(got.tanh() if squash else got, wanted, atol=1e-5)
    if not same:
        raise CheckpointError(
            f"the network {name!r} that was to be saved acts otherwise than BenchMARL's policy: options that change "
            "how it acts, such as use_tanh_mapping, must be left as they are"
        )


def _restore(experiment: _Experiment, saved: Mapping[str, Any], path: Path) -> None:
    """Give an experiment the parameters and optimisers of a checkpoint."""
    loss = experiment.losses[GROUP]
    trainer = saved["trainer"]
    try:
        loss.load_state_dict(loss.state_dict() | trainer["losses"])
        for name, optimizer in experiment.optimizers[GROUP].items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(trainer["optimizers"][name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} was trained with other options, action types or networks: {error}"
        ) from error


def _read(path: Path, config: BenchMARLConfig, facts: _Facts) -> dict[str, Any]:
    """A checkpoint that a configuration's training can go on with."""
    saved = read_checkpoint(path)
    _check_algorithm(path, saved, config.algorithm)
    for name in ("policy", "hidden", "sees_weights"):
        was, wanted = saved["config"][name], getattr(config, name)
        if was != wanted:
            raise CheckpointError(
                f"checkpoint {path} was trained with {name} {was!r}, but the configuration has {wanted!r}"
            )
    kind = facts.kind
    check_shapes(
        saved, path, features=facts.features, choices=kind.choices, joint=kind.joint, num_servers=facts.num_servers
    )
    if saved["trainer"]["num_balancers"] != facts.num_balancers:
        raise CheckpointError(
            f"checkpoint {path} was trained with {saved['trainer']['num_balancers']} balancers, but the environment to "
            f"train on has {facts.num_balancers}"
        )
    return saved


def _check_algorithm(path: Path, saved: Mapping[str, Any], wanted: str | None) -> None:
    found = str(saved["algo"])
    if found not in {f"benchmarl-{name}" for name in ALGORITHMS if wanted in (None, name)}:
        raise CheckpointError(
            f"checkpoint {path} was trained by recipe {found!r}, not by "
            f"{'one of BenchMARL' if wanted is None else repr(f'benchmarl-{wanted}')}"
        )


def config_of(path: str | os.PathLike[str], algorithm: str | None = None) -> BenchMARLConfig:
    """The configuration that a checkpoint was trained with.

    Args:
        path: the checkpoint.
        algorithm: the one it must be of; None: any.

    Raises:
        CheckpointError: if the file is no checkpoint of this recipe or of another algorithm, or its configuration had a
            part with no plain form.
    """
    path = Path(path)
    saved = read_checkpoint(path)
    _check_algorithm(path, saved, algorithm)
    return BenchMARLConfig(**saved_config(saved["config"], path))
