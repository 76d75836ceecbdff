"""Independent work on many machines, by Ray: so data sets are rendered, and many pictures turned into meshes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


class ClusterError(ValueError):
    """Ray is missing or cannot be reached; the text says what to do."""


def run_on_ray(
    function: Callable[..., Any],
    work: Mapping[Key, tuple],
    *,
    address: str | None = None,
    local_cpus: int | None = None,
    cpus: int = 1,
    use_gpu: bool = False,
    retries: int = 3,
    died: Callable[[Key, Exception], Any] | None = None,
) -> Iterator[tuple[Key, Any]]:
    """Yields (key, `function(*work[key])`) in the order in which Ray's workers finish.

    Workers are those of the cluster at `address` ("auto": the one this machine belongs to), else processes on
    `local_cpus` (None: all) of this machine. Each call claims `cpus`, and with `use_gpu` a GPU where the cluster has
    any; a call whose worker or machine dies is made again `retries` times. What then still fails becomes `died(key,
    error)`, or is raised. Files must be on a file system that all machines see. Raises `ClusterError`.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--runner=ray needs Ray: pip install 'hi3d_jax[ray]'") from error
    own = not ray.is_initialized()
    if own:
        local = {} if address else {"num_cpus": local_cpus, "include_dashboard": False}
        try:
            ray.init(address=address, logging_level="warning", log_to_driver=False, **local)
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({error}); start one with: ray start --head"
            ) from error
    try:
        gpus = 1 if use_gpu and ray.cluster_resources().get("GPU", 0) >= 1 else 0
        most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if cpus > most:
            raise ClusterError(
                f"each call is to claim {cpus} CPUs, and no machine of the cluster has more than {most:g}"
            )
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(function)
        running = {task.remote(*arguments): key for key, arguments in work.items()}
        while running:
            for reference in ray.wait(list(running), num_returns=1)[0]:
                key = running.pop(reference)
                try:
                    made = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if died is None:
                        raise
                    made = died(key, error)
                yield key, made
    finally:
        if own:
            ray.shutdown()
