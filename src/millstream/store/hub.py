"""Datasets on the Hugging Face hub, which are only read: ``hf://datasets/ORG/NAME@REVISION/folder``.

`huggingface_hub` is the client, with its HF_TOKEN, HF_ENDPOINT and the rest. It is there, as tokenizers needs it.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from millstream.errors import RequestError, RunError
from millstream.store.contract import HUB, Entry, Listed, State
from millstream.store.ranges import opened, without_secrets

_PLACE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/convert/[^/]+|refs/pr/\d+|[^/]+))?(?:/(.*))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_TIMES, _FIRST_WAIT, _LONGEST_WAIT = 7, 0.25, 16.0
"""How often a request is made again, and how long before: half a minute in all."""
_PASSING = (408, 429, 500, 502, 503, 504)
_PATIENCE = 60.0  # seconds for an answer
_LONGEST_TOLD = 300.0


class _Place(NamedTuple):
    """A file or folder of a dataset; `revision` is a branch, a tag or a commit."""

    dataset: str
    revision: str | None
    path: str

    @property
    def root(self) -> str:
        """The address of the dataset as a whole."""
        revision = "@" + quote(self.revision, safe="") if self.revision else ""
        return f"{HUB}datasets/{self.dataset}{revision}"

    @property
    def url(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")


def _place_of(url: str) -> _Place:
    """What an address means.

    >>> _place_of("hf://datasets/org/name@refs/pr/1/a/b.jsonl")
    _Place(dataset='org/name', revision='refs/pr/1', path='a/b.jsonl')
    """
    found = _PLACE.fullmatch(url)
    if not found:
        raise RequestError(
            f"{url} is no address of a dataset: that is hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION, "
            "and then a file, a folder or a glob of it"
        )
    dataset, revision, path = found.groups()
    return _Place(dataset, unquote(revision) if revision else None, (path or "").strip("/"))


def root_and_path(url: str) -> tuple[str, str]:
    """(address of the dataset, what follows) of an address."""
    place = _place_of(url)
    return place.root, place.path


def pinned(url: str) -> str:
    """An address whose content stays the same: with the commit in it that its revision is now.

    Raises RequestError if there is no such dataset or revision, RunError if the hub cannot be reached.
    """
    place = _place_of(url)
    if place.revision is None or not _COMMIT.fullmatch(place.revision):
        client, timeout = _client(), _PATIENCE
        info = _asked(place, lambda: client.dataset_info(place.dataset, revision=place.revision, timeout=timeout), 2)
        place = place._replace(revision=info.sha)
    return place.url


@dataclass(frozen=True)
class Hub:
    """A folder of a dataset, as `millstream.store.contract.Readable` says."""

    url: str

    def _place(self, name: str) -> _Place:
        place = _place_of(self.url)
        return place._replace(path=f"{place.path}/{name}".strip("/"))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        size = self.size(name)
        stop = size if stop is None else min(stop, size)
        return _Ranges(self._place(name))(start, stop) if start < stop else b""

    def open(self, name: str, buffer: int = -1, *, until: int | None = None, known: State | None = None) -> BinaryIO:
        return opened(_Ranges(self._place(name)), known or self.state(name), buffer, until)

    def map(self, name: str) -> memoryview:
        return memoryview(self.read(name))

    def list(self, prefix: str = "") -> Sequence[str]:
        return [found.name for found in self.found(prefix)]

    def found(self, prefix: str = "") -> Sequence[Listed]:
        place, own = self._place(prefix), self._place("").path
        files = [item for item in _tree(place, recursive=True) if hasattr(item, "size")]
        return sorted(Listed(item.path[len(own) :].lstrip("/"), _state(place, item)) for item in files)

    def entries(self, name: str = "") -> Sequence[Entry]:
        place = self._place(name)
        return sorted(Entry(item.path.rpartition("/")[2], False) for item in _tree(place, recursive=False))

    def state(self, name: str, *, follow: bool = True) -> State:
        place = self._place(name)
        if not place.path:
            return _folder(place)
        found = _asked(
            place,
            lambda: _client().get_paths_info(place.dataset, [place.path], revision=place.revision, repo_type="dataset"),
        )
        if not found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place.url)
        return _state(place, found[0])

    def size(self, name: str) -> int:
        return self.state(name).size

    def exists(self, name: str) -> bool:
        try:
            return bool(self.state(name))
        except OSError:
            return False

    def below(self, name: str) -> "Hub":
        return Hub(f"{self.url}/{name}")


def _client() -> Any:
    import huggingface_hub

    # Asked for each time: huggingface_hub looks at HF_ENDPOINT once, when anybody imports it.
    return huggingface_hub.HfApi(endpoint=_endpoint(), library_name="millstream")


def _utils() -> Any:
    import huggingface_hub.utils

    return huggingface_hub.utils


def _endpoint() -> str:
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _tree(place: _Place, *, recursive: bool) -> list[Any]:
    """What is in a folder. Raises FileNotFoundError."""
    ask = partial(_client().list_repo_tree, place.dataset, place.path or None, revision=place.revision)
    found: list[Any] = _asked(place, lambda: list(ask(recursive=recursive, repo_type="dataset")))
    return found


def _state(place: _Place, item: Any) -> State:
    """That of what the hub lists: a file by its path and the hash of its content."""
    if not hasattr(item, "size"):
        return _folder(place)
    return State("file", item.size, 0, 0, (_number(f"{place.dataset}/{item.path}"), _number(item.blob_id)))


def _folder(place: _Place) -> State:
    return State("folder", 0, 0, 0, (_number(place.dataset), _number(place.path)))


def _number(what: str) -> int:
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class _Ranges:
    """Ranges of a file, which is that of one commit and so stays the same."""

    place: _Place

    def __call__(self, start: int, stop: int) -> bytes:
        data = b""
        while len(data) < stop - start:
            more = self._some(start + len(data), stop)
            if not more:
                raise RunError(f"{self.place.url} became shorter while it was read")
            data = data + more if data else more
        return data

    def _some(self, start: int, stop: int) -> bytes:
        """A range, or what the hub gives of it."""
        import huggingface_hub

        place, utils = self.place, _utils()
        url = huggingface_hub.hf_hub_url(
            place.dataset, place.path, repo_type="dataset", revision=place.revision, endpoint=_endpoint()
        )
        headers = {**utils.build_hf_headers(library_name="millstream"), "Range": f"bytes={start}-{stop - 1}"}

        def ask() -> Any:
            answer = utils.get_session().request("GET", url, headers=headers, timeout=_PATIENCE)
            utils.hf_raise_for_status(answer)
            return answer

        try:
            answer = _asked(place, ask)
        except FileNotFoundError as error:
            raise RunError(
                f"{place.url} is not there any more, since it was listed: run the same command again"
            ) from error
        content: bytes = answer.content
        return content[: stop - start] if answer.status_code == 206 else content[start:stop]


def _asked(place: _Place, ask: Callable[[], Any], times: int = _TIMES) -> Any:
    """What the hub answers; it is asked again where that may help.

    Raises RequestError where the address or the login is wrong, RunError where the hub or the network is down.
    """
    from huggingface_hub.errors import HfHubHTTPError

    its_client: Any = HfHubHTTPError.__bases__[0]  # all errors of the HTTP client that this version has
    failures = (OSError, ValueError, its_client)
    wait = _FIRST_WAIT
    while True:
        try:
            return ask()
        except failures as error:
            times -= 1
            if times < 0 or not _may_pass(error):
                raise _as_ours(place, error) from error
            time.sleep(max(wait, _told_to_wait(error)))
            wait = min(2 * wait, _LONGEST_WAIT)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return not isinstance(error, OfflineModeIsEnabled | ValueError) if status is None else status in _PASSING


def _told_to_wait(error: Exception) -> float:
    told = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(told), _LONGEST_TOLD) if told.isdecimal() else 0.0


def _as_ours(place: _Place, error: Exception) -> Exception:
    """What a person can do about it."""
    from huggingface_hub import errors

    name, hub, status = place.dataset, without_secrets(_endpoint()), _status(error)
    log_in = "log in with 'hf auth login', or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return RequestError(f"{name} is a gated dataset: ask for access at {hub}/datasets/{name}, and {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"the dataset {name} has no revision {place.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(f"there is no dataset {name} at {hub}, or it is private: then {log_in}")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place.url)
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{place.url} is no address of a dataset: {error}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RequestError(f"{place.url} cannot be read, as HF_HUB_OFFLINE is set: unset it, or name a local copy")
    if status in (401, 403):
        return RequestError(f"{hub} refuses to give {place.url} ({status}): {log_in} of an account that may read it")
    told = f"it answers {status}" if status else without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
    return RunError(f"{place.url} cannot be read from {hub} ({told}): run the same command again to go on")
