"""JSON as servers write it, which is not always JSON: a byte order mark, NaN, halves of letters, raw line breaks.

All of it is slower than the strict reader, and only taken for what that one has refused.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)

BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before anything: a byte order mark, too

_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_MOST = 1 << 53  # no count of ids is larger, and sums of them stay exact in a float
_DIGITS = 18  # of an integer that every reader takes
_NO_TEXT = ("thinking", "reasoning", "redacted_thinking")  # types of parts that are not what the model said


def json_of(content: bytes, *, mend: bool = True) -> Any:
    """The value in some JSON. Raises ValueError if it is none.

    NaN and Infinity become None; a byte that is no UTF-8, and half of a surrogate pair, become U+FFFD. The latter stays
    where `mend` is false: the other half may still come.

    >>> json_of(b'\\xef\\xbb\\xbf\\n {"a": NaN, "b": "\\\\ud83d", "c": "a\\nb", "d": "\\xff"}')
    {'a': None, 'b': '\ufffd', 'c': 'a\\nb', 'd': '\ufffd'}
    """
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):
        pass
    try:
        text = content.decode(json.detect_encoding(content), "replace").strip("\ufeff \t\r\n\0")
        value = _reader.decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return _mended(value) if mend and "\\u" in text else value


def mapping(content: bytes) -> dict[str, Any]:
    """The JSON object in some bytes, also if it stands in an array, as Google's errors do; empty if there is none."""
    try:
        found = json_of(content)
    except ValueError:
        return {}
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else {}


def whole_letters(text: str) -> str:
    """A text in which halves of surrogate pairs are joined, and U+FFFD stands for one that is alone.

    >>> whole_letters("\\ud83d" + "\\ude00") == "\\N{GRINNING FACE}", whole_letters("a\\ud83d")
    (True, 'a\ufffd')
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def usage_of(usage: Any) -> dict[str, Any]:
    """A server's usage with counts that can be counted with: what is none is left out.

    >>> usage_of({"prompt_tokens": "7", "completion_tokens": 9.0, "total_tokens": -1, "cost": 0.1})
    {'cost': 0.1, 'prompt_tokens': 7, 'completion_tokens': 9}
    >>> usage_of("16 tokens"), usage_of([7, 9]), usage_of(None)
    ({}, {}, {})
    """
    if type(usage) is not dict:
        return {}
    for name in _COUNTS:
        if name in usage:
            value = usage[name]
            if type(value) is not int or not 0 <= value <= _MOST:
                return {**{key: each for key, each in usage.items() if key not in _COUNTS}, **dict(_counts(usage))}
    return usage


def text_in(content: Any) -> str | None:
    """What a message says: its text, or its parts of text joined; None if it says nothing.

    >>> text_in([{"type": "thinking", "thinking": "..."}, {"type": "text", "text": "Pa"}, {"text": "ris"}, "!"])
    'Paris!'
    >>> text_in([]), text_in(None), text_in([{"type": "thinking", "thinking": "..."}])
    ('', None, None)
    """
    if isinstance(content, str) or content is None:
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [text for part in parts if (text := _text_of(part)) is not None]
    return "".join(texts) if texts or not parts else None


def thought_in(content: Any) -> str | None:
    """What a message's parts tell of thinking, joined; None if they tell nothing.

    >>> thought_in([{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "Paris"}])
    'hm'
    """
    parts = content if isinstance(content, list) else []
    thinking = [part for part in parts if isinstance(part, Mapping) and part.get("type") in _NO_TEXT]
    return "".join(text_in(part.get("thinking")) or "" for part in thinking) or None


def fitted(kind: type[S], given: Any, **ready: Any) -> S:
    """A struct of those fields of a mapping that fit it, and of what is `ready`; the others have their default."""
    found = dict(ready)
    for field in msgspec.structs.fields(kind):
        if isinstance(given, Mapping) and field.name not in ready and field.encode_name in given:
            try:
                found[field.name] = msgspec.convert(given[field.encode_name], field.type)
            except (ValueError, RecursionError):
                continue
    return kind(**found)


def word_of(reason: Any) -> Any:
    """A finish_reason, which some give as {"type": "stop", ...}."""
    return reason.get("type") if isinstance(reason, Mapping) else reason


def _text_of(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") in _NO_TEXT:
        return None
    text = part.get("refusal") if part.get("type") == "refusal" else part.get("text")
    return text if isinstance(text, str) else None


def _counts(usage: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name in _COUNTS:
        value = usage.get(name)
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
        except (ValueError, OverflowError):
            continue
        if 0 <= number <= _MOST:
            yield name, int(number)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return whole_letters(value)
    if isinstance(value, list):
        return list(map(_mended, value))
    if isinstance(value, dict):
        return {_mended(name): _mended(inner) for name, inner in value.items()}
    return value


def _integer(digits: str) -> int | float | None:
    if len(digits) <= _DIGITS:
        return int(digits)
    number = float(digits)
    return number if math.isfinite(number) else None


_reader = json.JSONDecoder(strict=False, parse_constant=lambda name: None, parse_int=_integer)
