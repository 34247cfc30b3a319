"""Kill one process of a run at one step of it: the driver, or a worker alone.

Its processes load a `sitecustomize` that watches what they do, as Python does for whatever is on its path.
"""

import os

_SITE = """
import os, signal, sys
from fnmatch import fnmatch

who, what, wanted, left, done = os.environ["MILLSTREAM_TEST_STRIKE"].split("|")
left = int(left)


def strike():
    global left
    left -= 1
    if left == 0:
        try:
            os.close(os.open(done, os.O_CREAT | os.O_EXCL))
        except FileExistsError:  # another process was killed, or this one in an earlier life
            return
        os.kill(os.getpid(), signal.SIGKILL)


def watch(event, args):
    name = args[1] if event == "os.rename" else args[0] if event == "open" else None
    if event.endswith(what) and isinstance(name, str) and fnmatch(os.path.basename(name), wanted):
        strike()


def send(file, item, real):
    if type(item[-1]).__name__ == wanted:
        strike()
    real(file, item)


if ("engines.worker" in str(sys.orig_argv)) == (who == "worker"):
    if what == "answer":
        from functools import partial
        from millstream.engines import local
        local.send = partial(send, real=local.send)
    else:
        sys.addaudithook(watch)
"""


def struck(patch, folder, who, step, number=1):
    """From now on the first process that is a "worker", or the "driver", kills itself as it does a step for the time
    `number`: "open NAME", "rename NAME" (as it gives a file its name) or "answer TYPE". The file that tells that it was
    done."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE)
    what, wanted = step.split()
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    patch.setenv("MILLSTREAM_TEST_STRIKE", "|".join([who, what, wanted, str(number), str(folder / "done")]))
    return folder / "done"
