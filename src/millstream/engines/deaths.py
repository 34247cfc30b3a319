"""What becomes of a unit whose worker dies again and again."""

from millstream.errors import WorkerDied

PATIENCE = 3
"""Deaths of the worker of one unit."""


def ended_by_itself(why: str, unit: str | None, hint: str = "", advice: str = "") -> WorkerDied:
    """The error that names the unit which did it, if there was one; what it is good to do then is for who knows what
    the unit is to say."""
    where = f" at {unit}" if unit else ""
    then = f". {advice}" if advice and unit else ""
    return WorkerDied(f"a worker process ended by itself ({why}), {PATIENCE} times{where}{hint}{then}")
