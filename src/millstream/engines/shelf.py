"""What the workers of a cluster have put, as their driver knows it."""

from collections.abc import Iterable
from typing import Any

from millstream.engines.cluster import Cluster


class Shelf:
    """What workers have put, by name: references, and the nodes where it lies."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._refs: dict[str, tuple[Any, str]] = {}

    def put(self, name: str, data: Any) -> None:
        self.add(name, self._cluster.put({name: data}), "")

    def add(self, name: str, ref: Any, node: str) -> None:
        self._refs[name] = ref, node

    def get(self, name: str) -> Any:
        return self._cluster.fetched(self.refs((name,))).get(name)

    def has(self, name: str) -> bool:
        return name in self._refs

    def drop(self, name: str) -> None:
        self._refs.pop(name, None)

    def refs(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self._refs[name][0] for name in names if name in self._refs}

    def lost(self, node: str) -> None:
        """All that lay on a node is gone."""
        for name in [name for name, (_, place) in self._refs.items() if place == node]:
            del self._refs[name]

    def __reduce__(self) -> tuple[Any, ...]:
        from millstream.engines.called import own_shelf

        return own_shelf, ()
