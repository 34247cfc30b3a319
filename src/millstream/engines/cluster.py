"""A Ray cluster as the engine sees it: connected to or started, its nodes looked at, workers started on them."""

import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from typing import Any, NamedTuple

from millstream.engines.called import CalledWorker
from millstream.errors import RequestError, setting
from millstream.store import file_at

_KNOCK = 10.0  # seconds for an address to answer at all: Ray itself waits for minutes
_LOOKING = 300.0  # seconds for a node to start a process and look at a few files
SAME = ("millstream", "fastokens", "pyarrow")
"""What has to be of one version on all nodes, as it decides bytes."""


class Node(NamedTuple):
    """A node of the cluster: what people call it, its CPUs and bytes of memory, as Ray has them."""

    id: str
    name: str
    cores: int
    memory: int


class Sight(NamedTuple):
    """What was found on a node: a `problem`, in words that follow its name; how many cores and how much memory there
    are, as far as that is known."""

    problem: str | None = None
    cores: int | None = None
    memory: int | None = None


class Cluster:
    """The Ray cluster at an `address` (host:port or ray://host:port); without one, that of RAY_ADDRESS, or the one that
    runs on this machine, or one that is `own`: started here with so many `cores`, and ended with `close`. Raises
    RequestError."""

    def __init__(self, address: str | None = None, cores: int | None = None) -> None:
        try:
            import ray
            import ray.exceptions
        except ImportError as error:
            raise RequestError(f"{setting('on', 'ray')} needs Ray ({error}): pip install 'millstream[ray]'") from error
        self._ray = ray
        self.gone: tuple[type[Exception], ...] = _deaths(ray.exceptions)
        self.own, self._connected = False, False
        if ray.is_initialized():
            there = ray.get_runtime_context().gcs_address
            if address not in (None, there) and "://" not in str(address):
                raise RequestError(f"this process works on the Ray cluster at {there}: ray.shutdown() comes first")
            self.where = f" at {there}"
            return
        address = address or os.environ.get("RAY_ADDRESS") or _running()
        self.where = f" at {address}" if address else ""
        self._connect(address, cores)

    def _connect(self, address: str | None, cores: int | None) -> None:
        if address:
            _knock(address)
        self.own = address is None
        if self.own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked whether Ray may call home
        how = {"num_cpus": cores, "include_dashboard": False} if self.own else {}
        try:
            with _own_signals(), _quietly(), _loopback() if self.own else nullcontext():
                self._ray.init(address=address or "local", log_to_driver=False, logging_level="error", **how)
        except Exception as error:  # a cluster of another version is a RuntimeError, what is missing an ImportError
            told = " ".join(str(error).split())
            raise RequestError(f"cannot work on the Ray cluster{self.where}: {told[:400]}") from error
        self._connected = True

    def close(self) -> None:
        if self._connected:
            self._connected = False
            self._ray.shutdown()

    # Objects and workers --------------------------------------------------------------------------------------------

    def put(self, something: Any) -> Any:
        return self._ray.put(something)

    def get(self, ref: Any) -> Any:
        return self._ray.get(ref)

    def fetched(self, refs: dict[str, Any]) -> dict[str, Any]:
        return fetched(refs)

    def wait(self, refs: Sequence[Any], seconds: float, *, all_of_them: bool = False) -> list[Any]:
        """Those that are there; waits for one, but no longer."""
        if not refs:
            threading.Event().wait(seconds)
            return []
        wanted = len(refs) if all_of_them else 1
        ready, rest = self._ray.wait(list(refs), num_returns=wanted, timeout=seconds)
        if ready and rest and not all_of_them:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return list(ready)

    def hand(self, node: Node) -> Any:
        """A new worker on a node."""
        made = self._ray.remote(RayWorker)
        how = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": _on(node)}
        return made.options(**how).remote(os.getcwd())

    def end(self, hand: Any) -> None:
        with suppress(Exception):  # it has ended, or the cluster has
            self._ray.kill(hand)

    def words_of(self, error: Exception) -> str:
        """Why a worker died, in a few words."""
        told = str(error)
        if "memory" in told and "OOM" in told.replace("Out of memory", "OOM"):
            return "out of memory"
        if "unavailable" in told:
            return "it cannot be reached"
        detail = told.rpartition("Worker exit detail:")[2].strip() or type(error).__name__
        return detail.partition(". ")[0].strip().replace("\n", " ")[:200] or "killed"

    # Nodes ----------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """The nodes that are alive and have CPUs."""
        return [
            Node(
                node["NodeID"],
                _called(node),
                int(node["Resources"]["CPU"]),
                int(node["Resources"].get("memory", 0)),
            )
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]

    def has(self, node: Node) -> bool:
        """Whether a node is still there, as far as Ray knows."""
        return node.id in {each.id for each in self.nodes()}

    def probe(self, node: Node, check: Callable[[], Sight]) -> Any:
        """Have a node looked at: `check` is called there, if it has the versions that are here."""
        look = self._ray.remote(_look()).options(num_cpus=0, max_retries=2, scheduling_strategy=_on(node))
        return look.remote({name: version(name) for name in SAME}, pickle.dumps(check))

    def seen(self, probe: Any) -> Sight:
        """What a probe found; waits for it."""
        try:
            others, found = self._ray.get(probe, timeout=_LOOKING)
        except Exception as error:  # it cannot even begin
            told = str(error).strip().splitlines() or [type(error).__name__]
            return Sight(f"cannot work for millstream ({told[-1].strip()}): install the same there as here")
        if others:
            return Sight(
                f"has {_listed(others)}, and this machine {_listed({name: version(name) for name in others})}: "
                "install the same versions on all nodes"
            )
        return found  # type: ignore[no-any-return]


class RayWorker(CalledWorker):
    """A worker that is given references, and fetches what they lead to."""

    def begin(self, number: int, which: int, unit: Any, given: dict[str, Any], *, step: bool = True) -> Any:
        return super().begin(number, which, unit, fetched(given), step=step)


def fetched(refs: dict[str, Any]) -> dict[str, Any]:
    """What references lead to, by name; what is lost is not there."""
    import ray
    from ray.exceptions import ObjectLostError

    trays, found = dict.fromkeys(refs.values()), {}
    with suppress(ObjectLostError):
        trays = dict(zip(trays, ray.get(list(trays)), strict=True))
    for name, ref in refs.items():
        with suppress(ObjectLostError):
            found[name] = (trays[ref] or ray.get(ref))[name]
    return found


def _look() -> Callable[..., Any]:
    # A function in a function is sent as it is, for nodes where millstream is missing, or another one.
    def look(wanted: dict[str, str], check: bytes) -> Any:
        import pickle
        from importlib.metadata import PackageNotFoundError, version

        others = {}
        for name, here in wanted.items():
            try:
                there = version(name)
            except PackageNotFoundError:
                there = None
            if there != here:
                others[name] = there
        return (others, None) if others else (None, pickle.loads(check)())

    return look


def _listed(versions: dict[str, str | None]) -> str:
    return " and ".join(f"{name} {found}" if found else f"no {name}" for name, found in versions.items())


def _on(node: Node) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.id, soft=False)


def _called(node: dict[str, Any]) -> str:
    host, address = node.get("NodeManagerHostname"), node["NodeManagerAddress"]
    return f"{host} ({address})" if host and host != address else str(address)


def _deaths(exceptions: Any) -> tuple[type[Exception], ...]:
    """What says that a worker is gone, or an answer with its node."""
    names = "RayActorError ObjectLostError WorkerCrashedError NodeDiedError OutOfMemoryError LocalRayletDiedError"
    return tuple(getattr(exceptions, name) for name in names.split() if hasattr(exceptions, name))


def _running() -> str | None:
    """The address of the cluster that runs on this machine, as Ray has written it down; none that does not answer."""
    folders = ["RAY_TMPDIR", "TMPDIR"] if sys.platform == "linux" else ["RAY_TMPDIR"]
    folder = next((os.environ[name] for name in folders if name in os.environ), "/tmp")
    name = os.path.join(folder, "ray", "ray_current_cluster")
    try:
        address = file_at(name).text().strip()
        _knock(address)
    except (OSError, ValueError, RequestError):
        return None
    return address


def _knock(address: str) -> None:
    """Raises RequestError if nothing answers at an address."""
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        if "://" in address or address in ("auto", "local"):
            return  # Ray knows more kinds of addresses
        raise RequestError(f"{setting('on', address)} does not work: give local, ray, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"no Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}): "
            f"see what ray status says there, or give {setting('on', 'ray')} for one on this machine"
        ) from error


@contextmanager
def _own_signals() -> Generator[None]:
    """Ray answers SIGTERM by itself; this process had its own answer before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quietly() -> Generator[None]:
    """Ray prints pages of what becomes of its processes on standard output, where a report goes as JSON; what matters
    of it is in the journal."""
    from ray._private import worker

    before = getattr(worker, "listen_error_messages", None)
    worker.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        worker.listen_error_messages = before


@contextmanager
def _loopback() -> Generator[None]:
    """A cluster of this machine alone: who reaches its ports runs what he likes, so nobody else's machine does."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
