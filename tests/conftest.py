"""The tests see nothing of what the machine that runs them is set up for: no proxy, account, server, rank or colour;
and they are interrupted as at a keyboard. Nor does it matter how quick it is.

As it is here, what tests share can be imported in the folders below too.
"""

import os
import signal

from hypothesis import settings

_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
_OTHERS = (*_PROXIES, "COLUMNS", "FORCE_COLOR", "LINES", "LOCAL_RANK", "NO_COLOR", "RANK", "WORLD_SIZE")
_FRONTS = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "HUGGING", "MILLSTREAM_", "OPENAI_", "RAY_", "TIKTOKEN_", "TTY_")

for name in list(os.environ):
    if name.upper() in _OTHERS or name.startswith(_FRONTS):
        del os.environ[name]

# Whoever starts the tests in the background, or with nohup, may have these ignored, and that is inherited.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# How long an example takes tells how busy the machine is, and nothing of us.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
