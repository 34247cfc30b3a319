"""The door between synchronous and asynchronous code, where signals come in the midst of a loop."""

import asyncio
import os
import signal

import pytest

from millstream.bridge import run


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP])
def number(request):
    """A signal that is a Ctrl-C, as for commands."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


async def struck(number, seen):
    """One that gets a signal while it works, and another one beside it."""

    async def beside():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            seen.append("beside")

    other = asyncio.create_task(beside())
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    seen.append("after")  # no exception in the midst of it
    try:
        await other
    finally:
        seen.append("end")


@pytest.mark.parametrize("at_the_keyboard", [signal.default_int_handler, signal.SIG_IGN])
def test_a_signal_that_is_a_ctrl_c_cancels_and_loses_no_step(number, at_the_keyboard):
    before, seen = signal.signal(signal.SIGINT, at_the_keyboard), []  # ignored: as in the background of a script
    try:
        with pytest.raises(KeyboardInterrupt):
            run(struck(number, seen))
        assert signal.getsignal(signal.SIGINT) is at_the_keyboard
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["after", "beside", "end"]
    assert signal.getsignal(number) is signal.default_int_handler


def test_what_is_cancelled_by_itself_is_no_interrupt(number):
    async def ends():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(ends())


def test_signals_that_are_somebodys_stay_theirs():
    came, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        seen = run(asyncio.wait_for(answered(came), 60))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (came, seen) == ([1], "done")


async def answered(came):
    os.kill(os.getpid(), signal.SIGTERM)
    while not came:
        await asyncio.sleep(0)
    return "done"
