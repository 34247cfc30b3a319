"""What earlier runs of a journal were asked for and got, beside what this one wants: in another order, with another
limit of ids, or ended otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from millstream.client.bodies import (
    CAPS,
    Body,
    canonical,
    caps_of,
    in_order,
    key_again,
    key_with_caps,
    with_caps,
)
from millstream.client.requests import Request
from millstream.errors import RequestError
from millstream.runs.ask.answer_lines import Header
from millstream.runs.ask.answers import AnswerJournal
from millstream.runs.ask.endings import checked_endings, ending_of


def refuse_other_order(journal: AnswerJournal, now: Header) -> None:
    """Raise RequestError if the run before this one gave the same parameters with properties in another order.

    Keys don't tell the two apart, but a constrained model does: it writes properties as a schema has them. Only the
    order within a parameter matters. Before journals had headers, bodies were sent with all properties sorted.
    """
    alike = [each for each in journal.headers if _same(each, now) or (now.retry_finish and _same_but_caps(each, now))]
    if alike:
        shared = [name for name, value in alike[-1].params.items() if name in now.params and name not in CAPS]
        earlier = {name: in_order(alike[-1].params[name]) for name in shared}
    elif len(journal) and not journal.headers:
        earlier = {name: canonical(value) for name, value in now.params.items()}
    else:
        return
    for name, value in now.params.items():
        if name in earlier and earlier[name] != in_order(value):
            raise RequestError(
                f"{name}: an earlier run gave its properties in another order ({_differing(earlier[name], value)}), and"
                " replies may depend on it: --reuse takes its answers as they are, another --journal asks anew"
            )


def other_caps(journal: AnswerJournal, now: Header) -> list[dict[str, Any]]:
    """The limits of ids under which this run, too, finds what is answered, the latest first.

    They are those of earlier runs that were alike in all else, if this run asks some replies again, or does as one that
    did: then the same prompts have the keys of the limits that they were first asked with.
    """
    alike = [each for each in journal.headers if _same_but_caps(each, now)]
    own = caps_of(now.params)
    if not now.retry_finish and not any(each.retry_finish and caps_of(each.params) == own for each in alike):
        return []
    found: list[dict[str, Any]] = []
    for header in reversed(alike):
        caps = caps_of(header.params)
        if caps != own and caps not in found:
            found.append(caps)
    return found


class Again:
    """Which earlier outcomes are asked again, and under which keys they are found.

    Faults are with `faults`; with `endings`, replies that ended so, and faults of the same name. Their keys stay as
    they are, whatever limit of ids they are asked with now.
    """

    def __init__(self, journal: AnswerJournal, now: Header, *, faults: bool) -> None:
        self._journal, self._now, self._faults = journal, now, faults
        self._endings = checked_endings(now.retry_finish)
        self._caps, self._own = other_caps(journal, now), caps_of(now.params)

    def find(self, requests: Sequence[Request]) -> list[int]:
        """The places of their earlier outcomes, -1 where there is none."""
        places: list[int] = self._journal.find_many([request.key for request in requests]).tolist()
        for caps in self._caps:
            missing = [at for at, place in enumerate(places) if place < 0 and not requests[at].fault]
            keys = [_other_key(requests[at], caps) for at in missing]
            for at, key, place in zip(missing, keys, self._journal.find_many(keys).tolist(), strict=True):
                if place >= 0:
                    places[at], requests[at].key = place, key
        return places

    def wants(self, row: bytes, fault: bool) -> bool:
        """Whether the request of an earlier outcome, which is a fault or not, is asked again."""
        if fault and self._faults:
            return True
        return bool(self._endings) and (_kind_of(row) if fault else ending_of(row)) in self._endings

    def prepare(self, request: Request) -> None:
        """A request that is asked again gets the limits of now, also where its row has one."""
        if self._endings and self._own:
            request.data = with_caps(request.data, self._own)

    def refuse_strangers(self, requests: Sequence[Request]) -> None:
        """Raise RequestError if replies are to be asked again, but with these settings all prompts would be.

        A journal from before headers does not tell its settings: there it shows in the first requests.
        """
        headers, now = self._journal.headers, self._now
        if not self._endings or not len(self._journal):
            return
        if headers and not any(_same_but_caps(each, now) for each in headers):
            raise RequestError(
                f"--retry-finish: no earlier run had these settings (the last, another {_unlike(headers[-1], now)});"
                " only the limit of ids may differ"
            )
        good = [request for request in requests if not request.fault]
        if not headers and good and max(self.find(good)) < 0:
            raise RequestError(
                "--retry-finish: nothing of this journal was asked with these settings, and it is too old to tell its"
                " own: give them once, with the limit of ids of then and without --retry-finish"
            )


class _FaultOf(msgspec.Struct):
    kind: str = ""


class _FaultRow(msgspec.Struct):
    fault: _FaultOf


_decode_fault = msgspec.json.Decoder(_FaultRow).decode


def _kind_of(row: bytes) -> str:
    return _decode_fault(row).fault.kind


def _other_key(request: Request, caps: Mapping[str, Any]) -> bytes:
    """The key that the same request has with other limits of ids."""
    body = Body(request.data, None, request.path, request.twin)
    return key_again(key_with_caps(body, request.id, caps), request.before)


def _same(one: Header, other: Header) -> bool:
    return _unlike(one, other, caps=True) is None


def _same_but_caps(one: Header, other: Header) -> bool:
    return _unlike(one, other) is None


def _unlike(one: Header, other: Header, *, caps: bool = False) -> str | None:
    """What the two were given that differs, whatever the order; None if it is the same. Limits of ids: if `caps`."""
    for name in ("model", "system", "template"):
        if getattr(one, name) != getattr(other, name):
            return name
    if set(one.row_params) != set(other.row_params):
        return "set of row params"
    for name in {**one.params, **other.params}:
        given = [each.params.get(name, msgspec.UNSET) for each in (one, other)]
        if (caps or name not in CAPS) and (msgspec.UNSET in given or canonical(given[0]) != canonical(given[1])):
            return name
    return None


def _differing(earlier: bytes, now: Any) -> str:
    """The first places where the two differ."""
    later = in_order(now)
    at = next((at for at, (one, other) in enumerate(zip(earlier, later, strict=False)) if one != other), 0)
    start = max(earlier.rfind(b'"', 0, at), 0)
    return f"{_cut(earlier[start:])} then, {_cut(later[start:])} now"


def _cut(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text if len(text) <= 40 else text[:37] + "..."
