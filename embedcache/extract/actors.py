"""Workers on a Ray cluster: one actor for each GPU, or for each node without one.

An actor is one worker behind an executor, as a process is. Ray restarts and retries nothing: who takes a lost one's
place, and what is done again, is decided where units are handed out.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import replace
from typing import Any

from embedcache.errors import BackboneError, MissingExtraError, SpecError
from embedcache.extract.worker import Job
from embedcache.wording import counted


class Worker:
    """What an actor is: it does one thing after the other, and gives back what came of it, or the error."""

    def do(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
        """Call a function."""
        try:
            return function(*arguments), None
        except Exception as error:
            return None, error


class Actor(Executor):
    """An actor as an executor of one worker; when it is no more, its futures raise ``BrokenExecutor``.

    ``placed`` is done once the actor has found a node.
    """

    def __init__(self, **resources: Any) -> None:
        import ray

        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD", **resources}
        self.handle = ray.remote(**options)(Worker).remote()
        self.placed = self.submit(socket.gethostname)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Have the actor call a function, after what it was handed before."""
        future: Future[Any] = Future()

        def done(inner: Future[Any]) -> None:
            if not future.set_running_or_notify_cancel():
                return
            outcome, error = _result(inner)
            if error is None:
                future.set_result(outcome)
            else:
                future.set_exception(error)

        self.handle.do.remote(function, *arguments, **named).future().add_done_callback(done)
        return future


def _result(future: Future[Any]) -> tuple[Any, BaseException | None]:
    """Return what an actor gave or met with; whatever else Ray raises is the loss of the actor, or of what it gave."""
    from ray.exceptions import RayError, RayTaskError

    try:
        outcome: tuple[Any, BaseException | None] = future.result()
    except RayTaskError as error:
        return None, error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:
        return None, BrokenExecutor(_in_a_line(error))
    return outcome


def _in_a_line(error: BaseException) -> str:
    """Return the first line, and the last one where the cause stands behind a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1][:200]}"


def _refuse_silent(address: str) -> None:
    """Raise ``OSError`` where nobody listens at host:port: Ray tries for more than a minute, and ends the process."""
    host, colon, port = address.rpartition(":")
    if colon and host and port.isdecimal() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _is_ours() -> bool:
    """Whether this process has started the Ray that it is connected to, which only Ray's own record of its node says.

    Of a version of Ray that keeps it elsewhere, nothing is known, and ``local`` is refused.
    """
    node = getattr(sys.modules.get("ray._private.worker"), "_global_node", None)
    return node is not None and bool(node.is_head())


def _refuse_other(address: str) -> None:
    """Raise ``BackboneError`` where this process is connected to another cluster than that at an address."""
    import ray

    connected = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    there, _, known = connected.rpartition(":")
    try:
        machines = {socket.gethostbyname(host)} if host and "://" not in host else set()
    except OSError:
        machines = set()
    if any(machine.startswith("127.") for machine in machines):
        machines.add(ray.util.get_node_ip_address())
    same = address == "auto" or (address == "local" and _is_ours()) or (port == known and there in machines | {host})
    if not same:
        raise BackboneError(
            f"this process is connected to the Ray at {connected}, and cannot be to the one at {address} too: leave "
            "the address out to use it, or call ray.shutdown() first"
        )


class Actors:
    """Actors on the cluster at ``address``: ``auto`` is the one that runs here or that ``RAY_ADDRESS`` names.

    Where this process is connected to a cluster, it is that one, and ``BackboneError`` is raised for any other.
    ``local`` starts one on this machine, or is the one that this process has started. There are ``workers`` of them,
    None for one for each GPU, or for each node where there is none; on a CPU they have a node's cores, or their share
    of them, and ``threads`` of those.
    """

    ahead, ours = 2, True

    def __init__(self, address: str, workers: int | None = None, threads: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise SpecError(f"workers is {workers}: expected at least 1")
        try:
            import ray
        except ImportError:
            raise MissingExtraError("extract --ray", "ray", "ray") from None
        self._connected = not ray.is_initialized()
        if not self._connected:
            _refuse_other(address)
        else:
            try:
                _refuse_silent(address)
                ray.init(address=address, logging_level="warning", log_to_driver=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise BackboneError(
                    f"there is no Ray at {address} ({_in_a_line(error)}): expected host:port, auto for the cluster "
                    "that runs here (ray start makes one), or local"
                ) from None
        self._ray, self._workers, self._threads = ray, workers, threads
        self._nodes: list[dict[str, float]] = [
            node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
        ]
        self._gpus = int(sum(node.get("GPU", 0) for node in self._nodes))
        self._on_gpus = bool(self._gpus)
        self._actors: dict[int, Actor] = {}

    @property
    def size(self) -> int:
        """How many actors there are."""
        return self._workers or (self._gpus if self._on_gpus else len(self._nodes)) or 1

    def device(self, asked: str) -> str:
        """Return ``cuda`` where the cluster has GPUs, unless something else is asked for."""
        self._on_gpus = bool(self._gpus) if asked == "auto" else asked.startswith("cuda")
        return "cuda" if self._on_gpus else "cpu" if asked == "auto" else asked

    @property
    def _resources(self) -> dict[str, int]:
        """What an actor takes of its node: all nodes are counted as the smallest."""
        if self._on_gpus:
            shares = [node.get("CPU", 1) // node["GPU"] for node in self._nodes if node.get("GPU")]
            return {"num_gpus": 1, "num_cpus": max(1, int(min(shares, default=1)))}
        each = -(-self.size // max(1, len(self._nodes)))
        return {"num_cpus": max(1, int(min((node["CPU"] for node in self._nodes), default=1) // each))}

    def start(self, number: int) -> Executor:
        """Start an actor, on whichever node has room for it, now or later."""
        if number not in self._actors:
            self._actors[number] = Actor(**self._resources)
        return self._actors[number]

    def job(self, job: Job, number: int) -> Job:
        """Give an actor as many threads as it has cores."""
        return replace(job, threads=self._threads or self._resources["num_cpus"])

    def losses(self, error: BaseException) -> int:
        """Whether an actor is no more."""
        return int(isinstance(error, BrokenExecutor))

    def waits(self) -> str:
        """Say how much room the cluster has, where processes of actors have not begun."""
        placed = sum(actor.placed.done() for actor in self._actors.values())
        if placed == len(self._actors):
            return ""
        begun = f"{placed} have begun, and " if placed else ""
        what = "GPU" if self._on_gpus else "CPU"
        takes = self._resources[f"num_{what.lower()}s"]
        room = int(sum(node.get(what, 0) // takes for node in self._nodes))
        if room < self.size:
            return (
                f"{begun}the Ray cluster has room for {room}, as each takes {counted(takes, what)}: ask for fewer "
                "(--workers N), or add machines"
            )
        free = self._ray.available_resources().get(what, 0)
        return (
            f"{begun}others begin, or wait for what else runs on the Ray cluster ({free:.0f} of "
            f"{counted(int(self._ray.cluster_resources().get(what, 0)), what)} are free): see ray status"
        )

    def end(self, number: int) -> None:
        """Kill an actor."""
        self._ray.kill(self._actors.pop(number).handle)

    def close(self) -> None:
        """Leave the cluster, if it was joined for this."""
        if self._connected:
            self._ray.shutdown()
