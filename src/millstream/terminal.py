"""Other people's words on somebody's terminal: nothing in them moves its cursor or turns the order of letters round.

Letters that its encoding lacks become ones that it has, instead of a traceback.
"""

import codecs
import io
import re
import sys

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text in which control characters, those of eight bits too, and Unicode's direction marks are seen, not done.

    >>> printable("a\\x1b[31mb\\tc\\x9b1m \\u202ecod.exe")
    'a␛[31mb\\tc<U+9B>1m <U+202E>cod.exe'
    """
    return _UNSEEN.sub(lambda found: _seen(found[0]), text)


def counted(number: int, what: str, many: str | None = None) -> str:
    """So many of something.

    >>> counted(1, "id"), counted(2_000, "id"), counted(0, "reply", "replies")
    ('1 id', '2,000 ids', '0 replies')
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def _seen(letter: str) -> str:
    if letter == "\x7f":
        return "␡"
    return chr(0x2400 + ord(letter)) if letter < " " else f"<U+{ord(letter):X}>"


_ALIKE = {
    **dict.fromkeys("─━", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
    "·": "-",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "◂": "<",
    "…": "...",
}
"""What our pictures and lines are made of; other letters are text, and are written as their numbers."""


def show_alike(error: UnicodeError) -> tuple[str, int]:
    """For `codecs.register_error`.

    >>> codecs.register_error("alike", show_alike)
    >>> "█ ≤ 水".encode("ascii", "alike")
    b'# <= \\\\u6c34'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ALIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


def show_what_can_be_shown() -> None:
    """Let standard output and standard error show any text, whatever their encoding is."""
    codecs.register_error("alike", show_alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="alike")
