"""Runs as tasks of a Ray cluster: :func:`run_jobs_on_ray`."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import LbgymError, MissingExtraError, WorkerLostError

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ModuleNotFoundError as error:
    raise MissingExtraError("ray", "rllib", "evaluation on a Ray cluster") from error

from ..ray_cluster import connected
from .pool import Job, Setting, simulate_job
from .results import Run


def run_jobs_on_ray(
    settings: Sequence[Setting], jobs: Sequence[Job], address: str | None = None
) -> Iterator[tuple[Job, Run]]:
    """Make runs on a Ray cluster, in the order in which they end.

    A task takes one CPU. One that is lost with its node is begun again on another. Trained models travel with their
    tasks, so that the nodes need lbgym and the model's framework, but no files.

    Args:
        settings: what the jobs refer to; each node gets them once.
        jobs: in the order in which they are begun.
        address: of the cluster; see :func:`lbgym.ray_cluster.connected`.

    Raises:
        ClusterError: if there is no cluster at that address.
        WorkerLostError: if a run was lost several times.
        LbgymError: what a run raised, as it is.
    """
    with connected(address):
        shared = ray.put(list(settings))
        paths = {job.contender.path for job in jobs if job.contender.path is not None}
        models = {path: ray.put(Path(path).read_bytes()) for path in paths}
        task = ray.remote(_run).options(num_cpus=1, max_retries=3)
        left = iter(jobs)
        running: dict[Any, Job] = {}
        try:
            while True:
                room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
                for job in itertools.islice(left, max(0, room)):
                    model = None if job.contender.path is None else models[job.contender.path]
                    running[task.remote(shared, job, model)] = job
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    yield running.pop(reference), _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference)


def _result(reference: Any) -> Run:
    try:
        run: Run = ray.get(reference)
        return run
    except RayTaskError as error:
        # The run's own exception, without the traceback of another machine in its text.
        if isinstance(error.cause, LbgymError):
            raise error.cause from None
        raise
    except RayError as error:
        raise WorkerLostError(f"a run on the Ray cluster was lost more often than it is begun again: {error}") from None


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """This worker's own folder of models, which nobody else can write to: models of Stable-Baselines3 hold code."""
    return tempfile.TemporaryDirectory(prefix="lbgym-")


def _run(settings: list[Setting], job: Job, model: bytes | None) -> Run:
    """A run, on some node."""
    if model is not None:
        assert job.contender.path is not None
        path = Path(_folder().name, f"{hashlib.sha256(model).hexdigest()}{Path(job.contender.path).suffix}")
        if not path.exists():
            path.write_bytes(model)
        job = replace(job, contender=replace(job.contender, path=str(path)))
    run = simulate_job(settings, job)
    assert run is not None
    return run
