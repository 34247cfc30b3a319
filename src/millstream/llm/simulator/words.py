"""What the simulator says, and how many ids that is."""

from collections.abc import Iterator
from typing import Any

LETTERS_PER_ID = 4
_CAPITALS = {"france": "France is Paris", "germany": "Germany is Berlin", "italy": "Italy is Rome"}
_FILLING = ("the", "wheel", "turns", "and", "grain", "becomes", "flour", "as", "water", "runs", "over", "stone")


def letters_in(text: str) -> int:
    """The length of a text in quarters of an id: a letter of ASCII is one, a byte of any other is a whole id.

    >>> letters_in("Paris"), letters_in("\N{SNOWMAN}")
    (5, 12)
    """
    if text.isascii():
        return len(text)
    plain = len(text.encode("ascii", "ignore"))
    return plain + LETTERS_PER_ID * (len(text.encode("utf-8", "surrogatepass")) - plain)


def count_ids(letters: int) -> int:
    """The simulator's idea of token ids: one for 4 letters begun.

    >>> count_ids(0), count_ids(1), count_ids(4), count_ids(5)
    (0, 1, 1, 2)
    """
    return -(-letters // LETTERS_PER_ID)


def begin_of(text: str, letters: int) -> str:
    """As much of a text as has at most so many letters.

    >>> begin_of("Paris", 4), begin_of("\N{SNOWMAN}\N{SNOWMAN}", 20)
    ('Pari', '\N{SNOWMAN}')
    """
    if text.isascii():
        return text[:letters]
    for at, letter in enumerate(text):
        letters -= letters_in(letter)
        if letters < 0:
            return text[:at]
    return text


def pieces_of(text: str) -> Iterator[str]:
    """
    >>> list(pieces_of("Paris."))
    ['Pari', 's.']
    """
    return (text[start : start + LETTERS_PER_ID] for start in range(0, len(text), LETTERS_PER_ID))


def reply_to(message: str, reply_ids: int | None = None, turn: int = 0, choice: int = 0) -> str:
    """The text that answers a message; `turn` chooses the words that fill it up to `reply_ids` ids of 4 letters.

    Further choices, with numbers from 1, say the same in other words.

    >>> reply_to("What is the capital of France?")
    'The capital of France is Paris.'
    >>> reply_to("Why?"), reply_to("x" * 61)[-7:]
    ('reply to: Why?', 'xxx ...')
    >>> reply_to("Why?", reply_ids=6), reply_to("Why?", reply_ids=2)
    ('reply to: Why? the whee.', 'reply t.')
    """
    lowered = message[:200].lower()
    if "capital of " in lowered:
        for country, answer in _CAPITALS.items():
            if f"capital of {country}" in lowered:
                return f"The capital of {answer}." if not choice else f"Answer {choice + 1}: the capital of {answer}."
    text = f"reply {choice + 1} to:" if choice else "reply to:"
    text += f" {message[:60]}" + " ..." * (len(message) > 60)
    if reply_ids is None:
        return text
    room = reply_ids * LETTERS_PER_ID - 1
    text = begin_of(text, room)
    room -= letters_in(text)
    turn %= len(_FILLING)
    filling = " " + " ".join(_FILLING[turn:] + _FILLING[:turn])
    return text + (filling * -(-room // len(filling)))[:room] + "."


def fitting(schema: dict[str, Any], text: str) -> Any:
    """A value that fits a simple JSON schema, with `text` for free strings; null for what it does not know.

    >>> fitting({"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"},
    ...     "rivers": {"type": "array", "items": {"enum": ["Seine", "Marne"]}}, "big": {"type": "boolean"}}}, "Paris")
    {'city': 'Paris', 'people': 1, 'rivers': ['Seine'], 'big': True}
    >>> fitting({"type": ["number", "null"], "minimum": 2.5}, "")
    2.5
    """
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "object":
        return {name: fitting(item, text) for name, item in schema.get("properties", {}).items()}
    if kind == "array":
        return [fitting(schema.get("items", {}), text)] * max(1, schema.get("minItems", 1))
    if kind in ("integer", "number"):
        return schema.get("minimum", min(1, schema.get("maximum", 1)))
    return {"string": text, "boolean": True}.get(kind or "")
