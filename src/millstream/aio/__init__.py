"""Many calls of any async function at once: `gather`, `as_completed`, `ordered`, `race`. It knows no LLM."""

from millstream.aio.calls import as_completed, gather, ordered, race
from millstream.aio.flow import Flow
from millstream.aio.outcomes import Fault, Outcome, Returned

__all__ = ["Fault", "Flow", "Outcome", "Returned", "as_completed", "gather", "ordered", "race"]
