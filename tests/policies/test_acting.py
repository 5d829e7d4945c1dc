"""Acting in NumPy: equal to the torch networks, readable without torch, and drawn as the logits say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.stats import chisquare

torch = pytest.importorskip("torch")

from lbgym.policies import acting, networks  # noqa: E402
from lbgym.policies.neural import ExportedPolicy, PPOPolicy  # noqa: E402
from lbgym.policies.torch_files import load_arrays  # noqa: E402
from tests.policies.test_checkpoints import older  # noqa: E402

ACTIVE = np.array([[True] * 5, [True, False, True, True, False]])


def pair(name: str, seed: int = 0, **arguments: Any) -> tuple[Any, Any]:
    """A torch network with random parameters, and its twin in NumPy."""
    torch.manual_seed(seed)
    network = networks.NETWORKS[name](**arguments)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.is_floating_point() and value.dtype == torch.float32:
                value.copy_(torch.rand_like(value) + 0.2 if key.endswith("var") else 0.5 * torch.randn_like(value))
    parameters = {key: value.numpy() for key, value in network.state_dict().items()}
    return network.requires_grad_(False), acting.ACTING[name](parameters, **arguments)


def close(got: NDArray[Any], wanted: Any) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-5, atol=2e-5)


def flat(features: int, seed: int = 1) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(*ACTIVE.shape, features)) * ACTIVE[..., None]
    return np.concatenate([ACTIVE, rows.reshape(len(ACTIVE), -1)], -1).astype(np.float32)


@pytest.mark.parametrize("activation", ["relu", "tanh", "linear"])
def test_dense_layers(activation: str) -> None:
    theirs, ours = pair("mlp", sizes=[60, 16, 8, 5], activation=activation)
    x = flat(11)
    before = x.copy()
    close(ours(x), theirs(torch.from_numpy(x)))
    assert np.array_equal(x, before)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_equivariant_network(joint: bool, centered: bool) -> None:
    theirs, ours = pair("equivariant", features=11, hidden=16, outputs=3, joint=joint, centered=centered)
    close(ours(flat(11)), theirs(torch.from_numpy(flat(11))))


@pytest.mark.parametrize(("choices", "numbers"), [(0, 1), (0, 2), (3, 1)])
def test_actor_of_ppo(choices: int, numbers: int) -> None:
    theirs, ours = pair("actor-critic", features=7, hidden=16, choices=choices, numbers=numbers)
    inputs, active = acting.server_inputs(30 * flat(7), 7)
    out, _ = theirs(theirs.scale(torch.from_numpy(inputs), torch.from_numpy(active)), torch.from_numpy(active))
    close(ours(inputs, active)[active], out[torch.from_numpy(active)])
    assert ours.std == pytest.approx(float(theirs.log_std.exp()))


def test_recurrent_actor() -> None:
    theirs, ours = pair("recurrent", features=7, hidden=16, choices=3)
    mine = its = None
    for t in range(5):
        inputs, active = acting.server_inputs(flat(7, seed=t), 7)
        logits, mine = ours(inputs, active, mine)
        wanted, its = theirs.logits(torch.from_numpy(inputs), torch.from_numpy(active), its)
        close(logits[active], wanted[torch.from_numpy(active)])
        assert mine is not None
        close(mine[active], its[torch.from_numpy(active)])


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5)
    | hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def as_torch(tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree.copy())
    if isinstance(tree, dict):
        return {key: as_torch(value) for key, value in tree.items()}
    return [as_torch(value) for value in tree] if isinstance(tree, list) else tree


def check_equal(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            check_equal(got[key], wanted[key])
    elif isinstance(wanted, list):
        for one, other in zip(got, wanted, strict=True):
            check_equal(one, other)
    else:
        assert got == wanted


@given(tree=TREES)
def test_files_of_torch_are_read_with_numpy(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.pt"
    torch.save(as_torch(tree), path)
    check_equal(load_arrays(path.read_bytes()), tree)


def test_views_are_read_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"turned": whole.T, "part": whole[1:3, ::2], "row": whole[2]}, tmp_path / "views.pt")
    got = load_arrays((tmp_path / "views.pt").read_bytes())
    for name, wanted in {"turned": whole.T, "part": whole[1:3, ::2], "row": whole[2]}.items():
        np.testing.assert_array_equal(got[name], wanted.numpy())


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    "content", [Harmful(), {"a": torch.nn.Linear(1, 1)}, {"a": torch.zeros(1, dtype=torch.bfloat16)}]
)
def test_nothing_else_is_unpickled(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="a file of tensors and plain data needs no"):
        load_arrays((tmp_path / "other.pt").read_bytes())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "sac-gru", "exported-equivariant"])
def test_acts_where_there_is_no_torch(name: str, tmp_path: Path) -> None:
    path = older(name, tmp_path)
    script = """
import sys
sys.modules["torch"] = None
import numpy as np
from lbgym.policies import load_policy
from lbgym.policies.trained import TrainedPolicy
rng = np.random.default_rng(0)
flat = np.concatenate([np.ones(4), rng.random(44)]).astype(np.float32)
print(load_policy(sys.argv[1]).act(flat, {"weights": np.ones(4)}).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert not done.stderr and done.returncode == 0
    assert len(eval(done.stdout)) == 4


def state(name: str, network: Any, arguments: dict[str, Any], choices: int, num_servers: int) -> dict[str, Any]:
    from lbgym.policies.checkpoints import contents

    return contents(
        algo="test", config={}, env_kwargs={"observation": "flat"}, network=name, arguments=arguments,
        shapes={"features": 11, "choices": choices, "joint": False, "num_servers": num_servers},
        parameters=network.state_dict(), memory=0.5, step=0, seconds=0.0,
    )  # fmt: skip


def test_draws_have_the_probabilities_of_the_logits() -> None:
    arguments = {"features": 11, "hidden": 8, "outputs": 3}
    network, _ = pair("equivariant", **arguments)
    with torch.no_grad():
        network.head.weight.mul_(0.05)
        network.head.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    policy = ExportedPolicy(state("equivariant", network, arguments, 3, 2), deterministic=False, seed=1)
    one = np.concatenate([np.ones(2), np.random.default_rng(3).normal(size=22)]).astype(np.float32)
    drawn = policy.act(np.tile(one, (20_000, 1)), {"weights": np.ones((20_000, 2))})
    shares = network(torch.from_numpy(one)).reshape(2, 3).softmax(-1).numpy().astype(float)
    for server in range(2):
        counts = np.bincount(drawn[:, server], minlength=3)
        assert chisquare(counts, 20_000 * shares[server] / shares[server].sum()).pvalue > 1e-3


def test_continuous_draws_have_the_trained_deviation() -> None:
    arguments = {"features": 22, "hidden": 8, "choices": 0}
    network, _ = pair("actor-critic", **arguments)
    with torch.no_grad():
        network.log_std.fill_(-3.0)
        network.head.weight.mul_(0.01)
        network.head.bias.fill_(0.1)
    policies = [
        PPOPolicy(state("actor-critic", network, arguments, 0, 2), deterministic=d, seed=1) for d in (True, False)
    ]
    flat = np.tile(np.concatenate([np.ones(2), np.full(22, 0.5)]).astype(np.float32), (20_000, 1))
    mode, drawn = (policy.act(flat, {"weights": np.ones((20_000, 2))}) for policy in policies)
    assert np.abs(mode).max() < 0.8
    assert (drawn - mode).std() == pytest.approx(np.exp(-3.0), rel=0.02)
    # A server that is not there has no part in the noise.
    flat[:, 1] = 0.0
    mode, drawn = (policy.act(flat, {"weights": np.ones((20_000, 2))}) for policy in policies)
    assert (drawn[:, 0] != mode[:, 0]).all() and (drawn[:, 1] == mode[:, 1]).all()
