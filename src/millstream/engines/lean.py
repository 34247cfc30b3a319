"""How a process that packs is set up: little is done for what it imports, and it keeps the memory that it frees."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def lean_start() -> Iterator[None]:
    """For the imports of a command that packs. NumPy's linear algebra, which nothing here uses, starts no threads, in
    workers neither; and Python looks for no garbage among what is there to stay, now or later."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    try:
        # First, while few frames are on the stack. Further down, Python 3.11 came to the end of a block of its stack in
        # numpy.typing, and mapped and unmapped the next one 3,000 times: as long as the rest of NumPy takes to load.
        import numpy  # noqa: F401

        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks for the next batch: giving them back and faulting them in again costs
    a tenth of the CPU time. So does Arrow, with an allocator of its own, unless it is told before it is loaded to use
    the C library's. For processes that do nothing else; glibc only, elsewhere nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
