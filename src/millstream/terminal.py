"""Other people's words on somebody's terminal: nothing in them moves its cursor or turns the order of letters round."""

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text in which control characters, those of eight bits too, and Unicode's direction marks are seen, not done.

    >>> printable("a\\x1b[31mb\\tc\\x9b1m \\u202ecod.exe")
    'a␛[31mb\\tc<U+9B>1m <U+202E>cod.exe'
    """
    return _UNSEEN.sub(lambda found: _seen(found[0]), text)


def _seen(letter: str) -> str:
    if letter == "\x7f":
        return "␡"
    return chr(0x2400 + ord(letter)) if letter < " " else f"<U+{ord(letter):X}>"
