"""The pretrained policy ``adaptive``: what each of its parts is worth, how long it takes, and its file and card.

python -m benchmarks.pretraining                       # parts switched off in the trained policy, and its speed
python -m benchmarks.pretraining --train 12 --seeds 3 --draws 8  # trained again without each part
python -m benchmarks.pretraining --publish out/pretrain/seed*.pt  # their mean or the best of them, into the package
python -m benchmarks.pretraining --suite out/pretrain/suite       # its scores on the suite, for its card
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from lbgym.checks import whole
from lbgym.errors import LbgymError
from lbgym.evaluation import mean_interval
from lbgym.policies import load_policy
from lbgym.policies.estimator import CONSTANTS, IndexEstimator, initial_parameters
from lbgym.policies.neural import EstimatorPolicy
from lbgym.policies.pretrained import pretrained_file
from lbgym.training.pretraining import VALIDATION, draw_scenarios, measure

#: Microseconds that a decision for 64 servers may take.
MOST_MICROSECONDS = 100.0
#: Constants without a part of the policy.
WITHOUT: dict[str, dict[str, float]] = {
    "field estimate": {"log_field": -30.0},
    "index action (weights only)": {"log_field": -30.0, "rest": -30.0, "log_linear": -30.0},
    "memory": {"log_smoothing": -3.0, "log_slow": -3.0, "log_fast": -3.0, "log_long": -3.0},
    "shrinkage to what is configured": {"log_noise": -30.0},
    "speed estimates": {"log_noise": 30.0},
}
#: Conditions that the policy is measured under beside its own.
CONDITIONS: dict[str, dict[str, Any]] = {
    "actions up to 0.4 s late, each balancer's on its own": {"delay": 0.4},
    "under the rule whittle": {"dispatch": "whittle"},
}
NAME = "adaptive"
COLUMNS = ["policy", "mean FCT / SED's", "p99 FCT / SED's", "worst mean / SED's", "minimised"]
#: How much more it counts to be worse than SED, as in training.
PENALTY = 1.0


def measured(
    parameters: Sequence[Mapping[str, Any]], quick: bool, draws: int, **conditions: Any
) -> list[tuple[float, float, float, float]]:
    """Measure parameters on scenarios that no training sees.

    Args:
        parameters: of each policy.
        quick: little of everything.
        draws: of the scenarios.
        conditions: keywords of :func:`measure`.

    Returns:
        Of each the mean and p99 FCT over those of SED, geometric means, the worst mean over SED's, and what training
        minimises.
    """
    stacked = {name: np.stack([np.asarray(p[name], np.float64) for p in parameters]) for name in parameters[0]}
    means, tails, totals = [], [], []
    for draw in range(draws):
        rng = np.random.default_rng([draw, 0x61626C])
        for shape in VALIDATION:
            if quick:
                shape = replace(shape, servers=min(shape.servers, 8), count=1)
            scenarios = draw_scenarios(shape, rng)
            seeds = [int(s) for s in rng.integers(2**31, size=len(scenarios))]
            duration = 12.0 if quick else 60.0
            score = measure(
                stacked, scenarios, seeds, servers=shape.servers, duration=duration, warmup=duration / 4, **conditions
            )
            means.append(score.fct_mean)
            tails.append(score.fct_p99)
            totals.append(score.total(PENALTY) * len(scenarios))
    mean, tail = np.concatenate(means, axis=1), np.concatenate(tails, axis=1)
    total = np.sum(totals, axis=0) / mean.shape[1]
    return [
        (float(np.exp(a.mean())), float(np.exp(b.mean())), float(np.exp(a.max())), float(c))
        for a, b, c in zip(mean, tail, total, strict=True)
    ]


def changed(parameters: Mapping[str, Any], constants: Mapping[str, float], network: bool = True) -> dict[str, Any]:
    """Parameters with other constants, or with a network whose outputs are 0."""
    values = np.array(parameters["constants"], np.float64)
    for name, value in constants.items():
        values[list(CONSTANTS).index(name)] = value
    others = {k: v if network else np.zeros_like(v) for k, v in parameters.items() if k != "constants"}
    return {"constants": values} | others


def knock_outs(policy: EstimatorPolicy) -> dict[str, dict[str, Any]]:
    """The policy, the policy without each part, and what its training began with."""
    whole = policy.parameters
    rows = {"all": changed(whole, {})}
    rows |= {f"without {name}": changed(whole, constants) for name, constants in WITHOUT.items()}
    if "head.weight" in whole:
        rows["without the network"] = changed(whole, {}, network=False)
    first = changed(whole, {}, network=False) | {"constants": initial_parameters(0)["constants"]}
    return rows | {"before training": first}


#: What is trained again. Without estimates of speeds most of the constants do nothing.
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    **{f"without {name}": {"fixed": constants} for name, constants in WITHOUT.items() if name != "speed estimates"},
    "trained on random-clusters alone": {"scenario": "random-clusters"},
}


def train(name: str, seed: int, generations: int, quick: bool, file: Path) -> None:
    """Train a variant for so many generations of nine scenarios, without the residual network.

    Nothing is done if the file is there; a training that was killed goes on.
    """
    from lbgym.training.cma_es import CMAESConfig, Search, train_cma_es

    if file.exists():
        return
    small: dict[str, Any] = {"num_envs": 4, "max_steps": 16, "warmup": 1.0} if quick else {}
    config = CMAESConfig(seed=seed, scenarios=1, hidden=0, threads=1, total_steps=1, **small, **VARIANTS[name])
    config.total_steps = generations * Search(config).steps
    unfinished = file.with_name(f"unfinished-{file.name}")
    train_cma_es(config, out=unfinished, resume_from=unfinished if unfinished.exists() else None)
    unfinished.rename(file)


def train_again(generations: int, seeds: int, quick: bool, folder: Path, draws: int) -> list[list[Any]]:
    """Train every variant with every seed, one process per core: rows of the table, each over the seeds.

    Each leaves a file in ``folder``, and what is there is not trained again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        (name, seed): folder / f"{name.replace(' ', '-')}-{seed}.pt"
        for seed in range(1, seeds + 1)
        for name in VARIANTS
    }
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(train, *key, generations, quick, file) for key, file in files.items()]
        for job in jobs:
            job.result()
    results = measured([trained_policy(file).parameters for file in files.values()], quick, draws)
    found = dict(zip(files, results, strict=True))
    rows = []
    for name in VARIANTS:
        each = np.array([found[name, seed] for seed in range(1, seeds + 1)])
        over = [mean_interval(column) for column in each.T]
        rows.append([name, *(f"{x.mean:.3f} ±{x.half_width:.3f}" if seeds > 1 else f"{x.mean:.3f}" for x in over)])
    return rows


def microseconds(policy: EstimatorPolicy, balancers: int, servers: int = 64, repeats: int = 2000) -> float:
    """Time of a decision, the least of many, microseconds."""
    rng = np.random.default_rng(0)
    network = IndexEstimator(policy.parameters, 0.25)
    stats = rng.gamma(2.0, 1.0, (servers, 11)).astype(np.float32)
    inputs = stats, np.ones(servers, np.bool_), np.zeros(servers), np.zeros(servers), np.log([float(balancers)])
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        network(*inputs)
        times.append(time.perf_counter() - began)
    return 1e6 * min(times)


def trained_policy(path: Path) -> EstimatorPolicy:
    """The policy of a file."""
    policy = load_policy(path)
    assert isinstance(policy, EstimatorPolicy)
    return policy


def learned(policy: EstimatorPolicy) -> dict[str, Any]:
    """The policy's parameters, but for a network that has learned nothing yet and would only take time."""
    parameters = dict(policy.parameters)
    if "head.weight" in parameters and not any(np.any(parameters[name]) for name in ("head.weight", "head.bias")):
        return {"constants": parameters["constants"]}
    return parameters


def soup(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several trainings' constants, whose noise it averages out (Wortsman et al., "Model soups", 2022)."""
    return {"constants": np.mean([np.asarray(each["constants"], np.float64) for each in trainings], axis=0)}


def publish(files: Sequence[Path], name: str, parameters: Mapping[str, Any], chosen: int | None) -> Path:
    """Put trained parameters, without what resuming needs, into the package, and write their card.

    Args:
        files: the policies of all trainings.
        name: of the policy.
        parameters: of one of them, or the mean of all.
        chosen: which of them; None: the mean of all.
    """
    import torch

    from lbgym.policies.checkpoints import read_checkpoint
    from lbgym.policies.pretrained import card, pretrained_names
    from lbgym.policies.pretrained.cards import FOLDER
    from lbgym.training.cma_es import CMAESConfig
    from lbgym.training.runs import write_torch

    trainings = [read_checkpoint(file, "cma-es") for file in files]
    saved = trainings[chosen or 0]
    saved["trainer"] = {}
    seeds = ", ".join(str(each["config"]["seed"]) for each in trainings)
    if chosen is None:
        saved["step"], saved["seconds"] = (sum(each[key] for each in trainings) for key in ("step", "seconds"))
        which = f"the mean of trainings from seeds {seeds}"
    else:
        which = f"seed {saved['config']['seed']}, the best of trainings from seeds {seeds}"
    saved["network"]["parameters"] = {
        key: torch.from_numpy(np.asarray(value, np.float32)) for key, value in parameters.items()
    }
    # Neither the search's threads nor how often it was saved changes anything.
    saved["config"] = {**saved["config"], "threads": None, "checkpoint_every": CMAESConfig().checkpoint_every}
    path = FOLDER / f"{name}.pt"
    write_torch(path, saved)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    last = card(name) if name in pretrained_names() else None
    version = 1 if last is None else last.version + (last.sha256 != digest)
    entry = {
        "file": path.name,
        "sha256": digest,
        "version": version,
        "description": "speeds and background loads of any number of servers, one balancer or several, for marginal",
        "trained_on": (
            "random clusters of 2 to 64 servers behind 1 to 8 balancers, configured rightly and wrongly; steady, "
            "bursty and swinging arrivals; light- to heavy-tailed demands; brownouts, failures, drains, flash crowds; "
            "queues in order; actions up to 0.4 s late (lbgym.training.pretraining)"
        ),
        "training": (
            f"CMA-ES, {which}, by scenarios that no training sees, {saved['step']:,} environment steps in "
            f"{saved['seconds'] / 60:.0f} minutes"
        ),
        "command": "make pretrain",
        "suite": {"summary": "not measured"},
        "limits": [
            "it needs to know the cores and the number of balancers, and takes the balancers to be alike",
            "steps of 0.25 s; larger and smaller ones were not tried",
            "clusters of more than 64 servers were not trained on; the suite has 100 and 256",
            "on a data plane that takes weights only it sets estimated capacities, and the other balancers' flows are "
            "left out",
        ],
    }
    write_card(name, entry)
    return path


def write_card(name: str, entry: Mapping[str, Any]) -> None:
    """Write a policy's card, which is the only one."""
    import tomli_w

    from lbgym.policies.pretrained.cards import FOLDER, FORMAT

    (FOLDER / "index.toml").write_text(tomli_w.dumps({"format": FORMAT, name: dict(entry)}), "utf-8")


def write_scores(suite: Path) -> None:
    """Write the scores in a folder of suite results into the card."""
    from lbgym.evaluation.suite import read_result
    from lbgym.policies.pretrained import card

    known = card(NAME)
    if read_result(suite / f"{NAME}.json").entry.sha256 != known.sha256:
        raise SystemExit(f"{suite / f'{NAME}.json'} is of another file than {known.file}: run the suite again")
    entry = {item.name: getattr(known, item.name) for item in fields(known) if item.name != "name"}
    write_card(NAME, {**entry, "limits": list(known.limits), "suite": suite_summary(suite)})


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--train", type=int, default=0, help="generations to train every variant for")
    options.add_argument("--seeds", type=int, default=1, help="seeds of the training, with --train")
    options.add_argument("--folder", type=Path, default=Path("out/ablations"), help="its files, with --train")
    options.add_argument("--draws", type=int, default=24, help="draws of the unseen scenarios, 17 each")
    options.add_argument(
        "--publish", type=Path, nargs="+", help="put the best of these, or their mean, into the package"
    )
    options.add_argument("--suite", type=Path, default=None, help="folder of suite results, for the card")
    given = options.parse_args(arguments)
    for name, low in (("train", 0), ("seeds", 1), ("draws", 1)):
        whole(f"--{name}", getattr(given, name), low=low)
    draws = 1 if given.quick else given.draws
    rows: list[list[Any]] = []
    if given.suite is not None:
        write_scores(given.suite)
        return
    if given.publish is not None:
        policies = [trained_policy(path) for path in given.publish]
        candidates: list[Mapping[str, Any]] = [learned(policy) for policy in policies]
        names = [str(path) for path in given.publish]
        if any(list(each) != ["constants"] for each in candidates):
            # Networks have no mean, as their hidden units come in any order; and all are measured with theirs.
            candidates = [policy.parameters for policy in policies]
        elif len(candidates) > 1:
            candidates.append(soup(candidates))
            names.append("their mean")
        results = measured(candidates, given.quick, draws)
        print(common.markdown([[name, *found] for name, found in zip(names, results, strict=True)], COLUMNS))
        best = int(np.argmin([found[-1] for found in results]))
        chosen = best if best < len(policies) else None
        parameters = candidates[best] if chosen is None else learned(policies[best])
        print(publish(given.publish, NAME, parameters, chosen))
        return
    policy = trained_policy(pretrained_file(NAME))
    if given.train:
        rows = train_again(given.train, given.seeds, given.quick, given.folder, draws)
    else:
        variants = knock_outs(policy)
        results = measured(list(variants.values()), given.quick, draws)
        rows = [[name, *found] for name, found in zip(variants, results, strict=True)]
        for name, condition in CONDITIONS.items():
            rows.append([name, *measured([variants["all"]], given.quick, draws, **condition)[0]])
    took = {str(balancers): microseconds(policy, balancers) for balancers in (1, 8)}
    text = (
        f"{common.markdown(rows, COLUMNS)}\n\nA decision for 64 servers takes {took['1']:.0f} microseconds, behind 8 "
        f"balancers {took['8']:.0f} (to reach: {MOST_MICROSECONDS:.0f})."
    )
    common.report("pretraining", given, text, {"columns": COLUMNS, "rows": rows, "microseconds": took})


def suite_summary(folder: Path) -> dict[str, Any]:
    """The scores in a folder of suite results, as the card has them."""
    from lbgym.evaluation.suite import Scores, protocol_of, read_result

    results = [read_result(path) for path in sorted(folder.glob("*.json"))]
    scores = Scores(protocol_of(results[0].protocol), results)

    def shown(metric: str, versus: str | None = None) -> str:
        found = scores.geometric_mean(NAME, metric, versus=versus)
        return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"

    summary = {
        "summary": (
            f"{scores.protocol.version}, {len(scores.seeds)} seeds: mean FCT {shown('fct_mean')} and p99 "
            f"{shown('fct_p99')} of LSQ's"
        )
    }
    for label in scores.labels:
        if label not in (NAME, scores.protocol.baseline):
            summary[f"over {label}"] = f"mean {shown('fct_mean', label)}, p99 {shown('fct_p99', label)}"
    if "sed" in scores.labels:
        for metric, what in (("fct_mean", "mean"), ("fct_p99", "p99")):
            ratios = scores.case_means(NAME, metric) / scores.case_means("sed", metric)
            worst = int(ratios.argmax())
            summary[f"worst {what} over sed"] = f"{ratios[worst]:.3f}, {scores.protocol.names[worst]}"
    return summary


if __name__ == "__main__":
    try:
        main()
    except (LbgymError, OSError) as error:
        sys.exit(str(error))
