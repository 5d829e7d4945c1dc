from __future__ import annotations

import pickle

import pytest

from lbgym.errors import DataPlaneTimeout, LbgymError, MissingExtraError, PolicyError, ResetNeeded, UnknownNameError


@pytest.mark.parametrize(
    "error",
    [
        UnknownNameError("policy", "latenzy", ["latency", "cores"], where="a test"),
        MissingExtraError("torch", "train", "training"),
        PolicyError("no such model"),
        ResetNeeded("call reset()"),
        DataPlaneTimeout("late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_whole(error: LbgymError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
