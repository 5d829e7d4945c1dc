"""Rewards by the import path of the documentation; they live in :mod:`lbgym.env.rewards`."""

from .env.rewards import REWARDS, RewardInfo, fairness, make_reward, reward_table

__all__ = ["REWARDS", "RewardInfo", "fairness", "make_reward", "reward_table"]
