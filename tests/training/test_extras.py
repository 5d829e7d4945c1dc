"""What is said when torch or Stable-Baselines3 is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {module!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("torch", "train_ppo", "training with PPO needs 'torch', which is not installed: pip install 'lbgym[train]'"),
        (
            "stable_baselines3",
            "SB3VecEnv",
            "training with Stable-Baselines3 needs 'stable_baselines3', which is not installed: "
            "pip install 'lbgym[sb3]'",
        ),
    ],
)
def test_a_missing_module_is_named_with_its_extra(module: str, name: str, message: str) -> None:
    code = HIDE.format(module=module) + (
        "import lbgym.training\n"
        "from lbgym.errors import MissingExtraError\n"
        f"try:\n    lbgym.training.{name}\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == message


def test_importing_the_package_loads_neither() -> None:
    code = (
        "import sys, lbgym.training\n"
        "assert 'PPOConfig' in dir(lbgym.training)\n"
        "print([m for m in ('torch', 'stable_baselines3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lbgym.training

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lbgym.training.nothing
