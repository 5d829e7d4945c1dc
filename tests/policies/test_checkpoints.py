"""The format of checkpoints, and files of older formats."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from lbgym.errors import CheckpointError, PolicyError  # noqa: E402
from lbgym.policies import TrainedPolicy, load_policy, read_checkpoint  # noqa: E402
from lbgym.training import PPOConfig, SACGRUConfig, train_ppo, train_sac_gru  # noqa: E402
from lbgym.training.recipes import config_of  # noqa: E402

#: Files that lbgym wrote when every recipe had a format of its own, and how their policies acted then.
OLDER = Path(__file__).parent / "older"
NAMES = ("ppo", "ppo-discrete", "sac-gru", "exported-mlp", "exported-equivariant")
RECIPES = ("ppo", "ppo", "sac-gru", "rllib-dqn", "benchmarl-maddpg")


def older(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pt"
    path.write_bytes(lzma.decompress((OLDER / f"{name}.pt.xz").read_bytes()))
    return path


def play(policy: TrainedPolicy, servers: int, features: int, steps: int = 6) -> NDArray[Any]:
    """Actions on random observations, with one server inactive; as when the files of ``older`` were written."""
    rng = np.random.default_rng(7)
    actions = []
    policy.reset()
    for t in range(steps):
        active = np.arange(servers) != (t // 2) % servers
        rows = rng.random((servers, features)).astype(np.float32) * active[:, None]
        flat = np.concatenate([active, rows.ravel()], dtype=np.float32)
        actions.append(policy.act(flat, {"weights": rng.uniform(0.2, 4.0, servers)}))
    return np.array(actions)


def tree_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(tree_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(tree_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("name", "recipe"), list(zip(NAMES, RECIPES, strict=True)))
def test_policies_of_older_files_act_as_they_did(name: str, recipe: str, tmp_path: Path) -> None:
    path = older(name, tmp_path)
    recorded = np.load(OLDER / "actions.npz")
    assert read_checkpoint(path)["algo"] == recipe
    features = 14 if name == "ppo-discrete" else 11
    for servers in (4, 7):
        key = f"{name}/{servers}"
        if key not in recorded:
            continue
        policy = load_policy(path)
        for one in (policy, policy.copy()):
            got = play(one, servers, features)
            assert got.dtype == recorded[key].dtype
            if got.dtype.kind == "i":
                np.testing.assert_array_equal(got, recorded[key])
            else:
                # They acted in torch, which adds up the same products in another order.
                np.testing.assert_allclose(got, recorded[key], rtol=1e-5, atol=1e-6)


def test_older_files_are_resumed_with_all_that_they_hold(tmp_path: Path) -> None:
    path = older("ppo", tmp_path)
    was = torch.load(path, weights_only=True)
    assert was["format"] == "lbgym-ppo"
    config = config_of(path)
    assert isinstance(config, PPOConfig)
    same = train_ppo(config, resume_from=path, out=tmp_path / "same.pt")
    assert same.history == []
    now = read_checkpoint(tmp_path / "same.pt")
    assert now["format"] == "lbgym-policy" and now["step"] == was["step"] == 48
    assert tree_equal(now["network"]["parameters"], was["network"])
    assert tree_equal(now["trainer"], {key: was[key] for key in now["trainer"]})
    more = train_ppo(replace(config, total_steps=64), resume_from=path)
    assert [p.step for p in more.history] == [64]


def test_older_files_of_sac_gru_are_resumed_with_all_that_they_hold(tmp_path: Path) -> None:
    path = older("sac-gru", tmp_path)
    was = torch.load(path, weights_only=True)
    train_sac_gru(resume_from=path, out=tmp_path / "same.pt")
    now = read_checkpoint(tmp_path / "same.pt")
    assert tree_equal(now["network"]["parameters"] | now["trainer"]["agent"], was["agent"])
    assert tree_equal(now["trainer"]["optimisers"], was["optimisers"])
    # The policy acts without what only the training needs.
    assert not any(name.startswith(("critics", "targets", "log_alpha")) for name in now["network"]["parameters"])


TINY: dict[str, Any] = {"scenario": "uniform", "num_envs": 4, "num_steps": 4, "total_steps": 16, "hidden": 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every recipe here: of this version, but for those that need another framework."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train_ppo(PPOConfig(**TINY, replicas_per_seed=2), out=folder / "ppo.pt")
    train_sac_gru(SACGRUConfig(**TINY, replay=8), out=folder / "sac-gru.pt")
    names = ("exported-mlp", "exported-equivariant")
    return {name: folder / f"{name}.pt" for name in ("ppo", "sac-gru")} | {name: older(name, folder) for name in names}


@pytest.mark.parametrize("name", ["ppo", "sac-gru", "exported-mlp", "exported-equivariant"])
def test_a_checkpoint_says_what_it_needs_to_act(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    saved = read_checkpoint(checkpoints[name])
    assert saved["format"] == "lbgym-policy" and saved["version"] == 1
    # Older files' networks are given the weights in force beside the observation.
    shown = {} if "exported" in name else {"observe_weights": True}
    assert saved["observation"] == {"observation": "flat", "normalize": True} | shown
    assert not (shown and saved["inputs"]["weights"])
    assert saved["action"]["action_type"] in ("normalized", "discrete", "joint")
    assert saved["environment"]["step_interval"] == 0.25
    # Without the section for resuming it acts the same.
    torch.save(saved | {"trainer": {}}, tmp_path / "acting.pt")
    whole, acting = load_policy(checkpoints[name]), load_policy(tmp_path / "acting.pt")
    np.testing.assert_array_equal(play(whole, 4, 11 + len(shown)), play(acting, 4, 11 + len(shown)))
    assert acting.path == tmp_path / "acting.pt" and acting.env_kwargs == whole.env_kwargs


@pytest.mark.parametrize("name", ["ppo-discrete", "sac-gru", "exported-mlp"])
def test_copies_draw_from_streams_of_their_own(name: str, tmp_path: Path) -> None:
    features = 14 if name == "ppo-discrete" else 11
    policy = load_policy(older(name, tmp_path), deterministic=False, seed=5)
    expected = play(policy, 4, features, steps=12)
    policy.reset()
    twin = policy.copy()
    flat, info = np.ones(4 * (1 + features), np.float32), {"weights": np.ones(4)}
    first = [np.asarray(policy.act(flat, info)) for _ in range(12)]
    # Drawn from one stream, the twin's actions would go on where the other's ended.
    second = [np.asarray(twin.act(flat, info)) for _ in range(12)]
    assert np.array_equal(first, second)
    np.testing.assert_array_equal(play(twin, 4, features, steps=12), expected)
    policy.reset(6)
    assert not np.array_equal([np.asarray(policy.act(flat, info)) for _ in range(12)], first)
    policy.reset(5)
    assert np.array_equal([np.asarray(policy.act(flat, info)) for _ in range(12)], first)


def test_draws_without_a_seed_differ(tmp_path: Path) -> None:
    path = older("exported-mlp", tmp_path)
    one = load_policy(path, deterministic=False)
    actions = [play(policy, 4, 11, steps=24) for policy in (one, one.copy(), load_policy(path, deterministic=False))]
    assert len({tuple(each.tolist()) for each in actions}) == 3
    with pytest.raises(PolicyError, match="deterministic must be true or false, got 'false'"):
        load_policy(path, deterministic="false")  # type: ignore[arg-type]


def test_dense_layers_serve_only_their_own_number_of_servers(tmp_path: Path) -> None:
    policy = load_policy(older("exported-mlp", tmp_path))
    assert policy.num_servers == 4
    with pytest.raises(PolicyError, match="was trained on 4 servers and cannot act for 7"):
        policy.codecs(7)
    with pytest.raises(CheckpointError, match="trained on 4 servers and cannot act for 7"):
        policy.act(np.zeros(84, np.float32), {"weights": np.ones(7)})


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is empty"),
    "cut off": (lambda content: content[: len(content) // 2], "cannot be read: it is damaged"),
    "text": (lambda content: b"hello", "cannot be read: it is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("read", [load_policy, read_checkpoint, config_of])
def test_damaged_files_are_refused_in_one_sentence(
    read: Callable[[Path], object], damage: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    spoil, message = DAMAGE[damage]
    path = tmp_path / "agent.pt"
    path.write_bytes(spoil(checkpoints["ppo"].read_bytes()))
    with pytest.raises(CheckpointError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_other_files_are_refused_in_one_sentence(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    saved = read_checkpoint(checkpoints["ppo"])
    path = tmp_path / "agent.pt"

    def refused(content: Any, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message) as raised:
            load_policy(path)
        assert "\n" not in str(raised.value)

    refused([1, 2], "is not an lbgym checkpoint: its format is list")
    refused({"weights": 1}, "is not an lbgym checkpoint: its format is None")
    refused(saved | {"version": 99, "lbgym": "9.9"}, r"format version 99, written by lbgym 9\.9; this lbgym reads vers")
    refused({key: value for key, value in saved.items() if key != "network"}, "is damaged: it has no 'network'")
    refused(saved | {"network": saved["network"] | {"name": "transformer"}}, "unknown network 'transformer'; known: m")
    refused({"format": "lbgym-ppo", "version": 1, "shapes": {}}, "is damaged: it has no 'config'")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_checkpoint(tmp_path)
    with pytest.raises(PolicyError, match=r"missing\.pt.*does not exist"):
        load_policy(tmp_path / "missing.pt")
