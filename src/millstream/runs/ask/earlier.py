"""What earlier runs of a journal were asked for, beside this one: the same in another order, or with other limits."""

from collections.abc import Mapping, Sequence
from typing import Any

from millstream.errors import RequestError
from millstream.runs.ask.answers import AnswerJournal, Header
from millstream.runs.ask.bodies import Body, canonical, caps_of, in_order, key_again, key_with_caps, without_caps
from millstream.runs.ask.requests import Request


def refuse_other_order(journal: AnswerJournal, now: Header) -> None:
    """Raise RequestError if the run before this one gave the same parameters with properties in another order.

    Keys don't tell the two apart, but a constrained model does: it writes properties as a schema has them. Only the
    order within a parameter matters. Before journals had headers, bodies were sent with all properties sorted.
    """
    alike = [each for each in journal.headers if _same(each, now)]
    if alike:
        earlier = {name: in_order(value) for name, value in alike[-1].params.items()}
    elif len(journal) and not journal.headers:
        earlier = {name: canonical(value) for name, value in now.params.items()}
    else:
        return
    for name, value in now.params.items():
        if earlier.get(name, b"") != in_order(value) and name in earlier:
            raise RequestError(
                f"{name}: an earlier run gave its properties in another order ({_differing(earlier[name], value)}), and"
                " replies may depend on it: --reuse takes its answers as they are, another --journal asks anew"
            )


def other_caps(journal: AnswerJournal, now: Header) -> list[dict[str, Any]]:
    """The limits of ids under which this run, too, finds what is answered, the latest first.

    They are those of earlier runs that were alike in all else, if this run asks some replies again, or does as one that
    did: then the same prompts have the keys of the limits that they were first asked with.
    """
    alike = [each for each in journal.headers if each.model == now.model and _same_but_caps(each.params, now.params)]
    own = caps_of(now.params)
    if not now.retry_finish and not any(each.retry_finish and caps_of(each.params) == own for each in alike):
        return []
    found: list[dict[str, Any]] = []
    for header in reversed(alike):
        caps = caps_of(header.params)
        if caps != own and caps not in found:
            found.append(caps)
    return found


def other_keys(request: Request, caps: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The keys that the same request has with other limits of ids."""
    body = Body(request.data, None, request.path, request.twin)
    return [key_again(key_with_caps(body, request.id, each), request.before) for each in caps]


def _same(one: Header, other: Header) -> bool:
    return one.model == other.model and canonical(one.params) == canonical(other.params)


def _same_but_caps(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return canonical(without_caps(one)) == canonical(without_caps(other))


def _differing(earlier: bytes, now: Any) -> str:
    """The first places where the two differ."""
    later = in_order(now)
    at = next((at for at, (one, other) in enumerate(zip(earlier, later, strict=False)) if one != other), 0)
    start = max(earlier.rfind(b'"', 0, at), 0)
    return f"{_cut(earlier[start:])} then, {_cut(later[start:])} now"


def _cut(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text if len(text) <= 40 else text[:37] + "..."
