"""Workers as actors of Ray. Nothing else of kvsuite imports Ray."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

from .hands import Lost
from .orders import CaseAnswer, Node, Order, Ready, Setup
from .worker import Worker

INSTALL = 'pip install "kvsuite[cluster]"'
_LOCAL = "local"
_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. Some common causes|$)")
_MOST_SAID = 300
_STORE_BYTES = 128 << 20
#: to wait for a connection: at the start, and at each look
_CONNECT_S = 10.0
_LOOK_S = 2.0
#: a head that is silent for longer is gone; after 60 s Ray ends this process
_SILENT_S = 30.0


def require_ray(address: str) -> None:
    """Refuse ``--kv-cluster`` where Ray is not installed.

    Raises
    ------
    UserError
        With the line that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"--kv-cluster={address}: Ray is not installed; {INSTALL}")


class RayCluster:
    """A cluster of Ray, its own or one that is there.

    Parameters
    ----------
    address
        ``local`` starts one on this host, ``auto`` and ``ray://host:port`` go to one.
    setup
        What workers are told.
    gpus
        GPUs of this host that a local cluster has; ``None`` for workers on cores.
    cores
        Cores that a worker owns where no GPU is wanted; ``None`` for all of its host.

    Raises
    ------
    UserError
        If there is no such cluster.
    """

    def __init__(self, address: str, setup: Setup, *, gpus: int | None, cores: int | None) -> None:
        # before Ray is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # of a local cluster; by default whatever else runs on a host comes before its workers
        os.environ.setdefault("RAY_worker_niceness", "0")
        with _handlers_kept():
            import ray

            self._ray = ray
            _without_chatter(ray)
            there = self._connect(address, gpus)
        self._wants_gpu, self._cores = gpus is not None, cores
        self._setup = ray.put(setup)
        self._actors: dict[int, Any] = {}
        self._homes: dict[int, Node] = {}
        #: what is waited for, by reference
        self._pending: dict[Any, int] = {}
        #: by worker, a call ahead of its order: without an answer to that the order has not begun
        self._asked: dict[int, Any] = {}
        self._number = 0
        self._head = _Head(there or str(ray.get_runtime_context().gcs_address))
        self._nodes: Sequence[Node] = ()

    def _running(self) -> str | None:
        # what ray.init("auto") would ask; no public function of Ray tells it
        with suppress(Exception):
            found: str | None = self._ray._private.services.get_ray_address_from_environment("auto", None)
            return found
        return None

    def _connect(self, address: str, gpus: int | None) -> str | None:
        """Connect, and tell ``host:port`` of a cluster that was there."""
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        mend = f"start one with ray start --head, or give --kv-cluster={_LOCAL}"
        there = _address(address, self._running)
        # Ray itself asks for minutes whether a cluster that is gone answers
        if there is not None and (silent := unreachable(there, _CONNECT_S)) is not None:
            raise UserError(f"--kv-cluster={address}: nothing answers at {there} ({silent}); {mend}")
        try:
            if address == _LOCAL:
                cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
                self._ray.init(
                    "local",
                    num_cpus=cores,
                    num_gpus=gpus or 0,
                    # by default a third of the memory that cases measure in; rows are small
                    object_store_memory=_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
            else:
                # a local cluster has this code
                shipped = {"py_modules": _code(), "excludes": ["**/__pycache__/**"]}
                self._ray.init(address, runtime_env=shipped, **quiet)
        except Exception as error:  # of many kinds, and not all are Ray's
            line = visible(str(error).strip().partition("\n")[0])
            raise UserError(f"--kv-cluster={address}: no cluster of Ray to be reached ({line}); {mend}") from error
        return there

    def nodes(self) -> Sequence[Node]:
        """The hosts that are there now, each with room for at least one worker; those of before while its head is silent.

        Raises
        ------
        UserError
            If its head is gone: Ray itself ends this process for it, without a report.
        """
        if not self._head.answers():
            return self._nodes
        found = []
        for one in self._ray.nodes():
            resources = one.get("Resources", {})
            cores = int(resources.get("CPU", 0))
            slots = int(resources.get("GPU", 0)) if self._wants_gpu else cores // (self._cores or max(cores, 1))
            if one["Alive"] and slots:
                found.append(Node(one["NodeID"], one["NodeManagerHostname"], one["NodeManagerAddress"], slots))
        self._nodes = sorted(found, key=lambda node: (node.name, node.ip, node.id))
        return self._nodes

    def start(self, node: Node) -> int:
        """Start a worker on a host; its first news is a `Ready`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = int(self._resources(node).get("CPU", 1))
        # beside a GPU its share of the cores: Ray lets torch use as many threads
        wanted: dict[str, Any] = {"num_cpus": self._cores or there}
        if self._wants_gpu:
            wanted = {"num_gpus": 1, "num_cpus": there // node.slots}
        actor = (
            self._ray.remote(Worker)
            .options(
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                **wanted,
            )
            .remote(self._setup)
        )
        self._number += 1
        self._actors[self._number], self._homes[self._number] = actor, node
        self._pending[actor.begin.remote()] = self._number
        return self._number

    def give(self, worker: int, order: Order) -> None:
        """Let a worker measure; its next news is a `CaseAnswer`."""
        self._asked[worker] = self._actors[worker].alive.remote()
        self._pending[self._actors[worker].measure.remote(order)] = worker

    def news(self, timeout_s: float) -> tuple[int, Ready | CaseAnswer | Lost] | None:
        """What a worker has to say, ``None`` if none has in so many seconds."""
        if not self._pending:
            threading.Event().wait(timeout_s)
            return None
        try:
            done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        except (ConnectionError, self._ray.exceptions.RaySystemError) as error:
            # of Ray's client
            raise UserError(_cut(error)) from error
        if not done:
            return None
        worker = self._pending.pop(done[0])
        try:
            found: Ready | CaseAnswer = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            lost = self._lost(worker, error)
            self.stop(worker)
            return worker, lost
        except ConnectionError as error:
            raise UserError(_cut(error)) from error
        return worker, found

    def stop(self, worker: int) -> None:
        """End a worker."""
        self._homes.pop(worker, None)
        self._asked.pop(worker, None)
        actor = self._actors.pop(worker, None)
        self._pending = {reference: number for reference, number in self._pending.items() if number != worker}
        if actor is not None:
            with suppress(Exception):  # it may be gone
                self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """End all workers, and a local cluster with them."""
        # a signal is heard by the handler that is kept, and ends the run behind this
        with suppress(SystemExit), _handlers_kept():
            for worker in list(self._actors):
                self.stop(worker)
            self._ray.shutdown()

    def _lost(self, worker: int, error: Exception) -> Lost:
        home = self._homes[worker]
        said = _said(error)
        if isinstance(error, self._ray.exceptions.RayTaskError):
            # the worker's own exception: its host is well
            return Lost(False, visible(str(error.cause)))
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            return Lost(False, f"Ray ended it because memory ran out on its node: {said}")
        away = isinstance(error, self._ray.exceptions.ActorUnavailableError)
        is_there = home.id in {node.id for node in self.nodes()}
        return Lost(not is_there, said, is_unbegun=self._is_unbegun(worker), is_out_of_reach=away)

    def _is_unbegun(self, worker: int) -> bool:
        """Whether a worker that is lost was so before it came to its order."""
        asked = self._asked.get(worker)
        if asked is None:
            return False
        try:
            self._ray.get(asked, timeout=_CONNECT_S)
        except self._ray.exceptions.GetTimeoutError:
            return False
        except self._ray.exceptions.RayError:
            return True
        return False

    def _resources(self, node: Node) -> dict[str, float]:
        return next((one["Resources"] for one in self._ray.nodes() if one["NodeID"] == node.id), {})


class _Head:
    """Whether the host that a cluster is managed from still answers.

    Parameters
    ----------
    address
        ``host:port`` of what manages the cluster, or of Ray's client server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._silent_since: float | None = None

    def answers(self) -> bool:
        """Whether it does now.

        Raises
        ------
        UserError
            If it has not for so long that it will not.
        """
        silent = unreachable(self._address, _LOOK_S)
        now = time.monotonic()
        if silent is None:
            self._silent_since = None
            return True
        if self._silent_since is None:
            self._silent_since = now
        if now - self._silent_since < _SILENT_S:
            return False
        raise UserError(
            f"--kv-cluster: the head of the cluster at {self._address} is gone ({silent}); start one and go on with "
            "--kv-resume=latest"
        )


def unreachable(address: str, timeout_s: float) -> str | None:
    """Why nobody takes a connection at ``host:port``; ``None`` if somebody does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _address(typed: str, running: Callable[[], str | None]) -> str | None:
    """``host:port`` that an address leads to, ``None`` where that is not known; ``running`` is what Ray finds on this host."""
    if typed == "auto":
        typed = os.environ.get("RAY_ADDRESS", "") or running() or ""
    found = typed.removeprefix("ray://").partition("/")[0]
    return found if re.fullmatch(r".+:[0-9]{1,5}", found) else None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray handles SIGTERM by itself from the moment in which it is imported; here kvsuite does."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def restore() -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    try:
        yield
    except SystemExit as error:
        # Ray's answer to the signal; its own handler was to have it
        restore()
        if error.code == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        restore()


def _cut(error: Exception) -> str:
    line = visible(str(error).strip().partition("\n")[0])
    return f"--kv-cluster: the connection to the cluster is gone ({line}); go on with --kv-resume=latest"


def _said(error: Exception) -> str:
    """What Ray says of a death, without its advice."""
    text = " ".join(str(error).split())
    detail = _DETAIL.search(text)
    return visible(f"Ray says: {detail[1] if detail else text[:_MOST_SAID]}")


def _without_chatter(ray: Any) -> None:
    """Keep Ray from printing twenty lines of its log for every worker and node that dies: kvsuite says it in one."""
    # no option of Ray does this (2.60)
    module = ray._private.worker
    if hasattr(module, "print_to_stdstream"):
        module.print_to_stdstream = lambda *_, **__: None


def _code() -> list[str]:
    """Folders that make kvsuite what it is: its code and, for the entry points, what its installation says of it."""
    package = Path(__file__).parents[1]
    told = importlib.metadata.distribution("kvsuite")
    metadata = next(
        (Path(str(told.locate_file(path))).parent for path in told.files or () if path.name == "METADATA"), None
    )
    return [str(package), *([str(metadata)] if metadata is not None else [])]
