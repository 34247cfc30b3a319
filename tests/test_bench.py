"""The benchmarks: all of them can be started. What they measure is for `make bench`."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from bench.measure import LINUX
from helpers import TEXTS, rows, write_jsonl
from runs import PATIENCE

BENCH = Path(__file__).parent.parent / "bench"
MODULES = sorted(BENCH.rglob("*.py"))
OURS = ("bench", "millstream")


def taken(module, name):
    """What a module has by this name, or the module below it that is called so; None if there is none."""
    try:
        holder = importlib.import_module(module)
        if hasattr(holder, name) or not hasattr(holder, "__path__"):
            return getattr(holder, name, None)
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] in OURS:
            return None
        # It stands on what this environment lacks, such as PyTorch.
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
        return next((node for node in tree.body if getattr(node, "name", None) == name), None)


def missing(tree):
    """What a module takes from ours that is not there: anywhere in it, by `from`, or with a dot from a module or class
    that it has so."""
    have, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            for alias in node.names:
                thing = have[alias.asname or alias.name] = taken(node.module, alias.name)
                if thing is None:
                    found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            thing = have.get(node.value.id)
            if isinstance(thing, type | types.ModuleType) and not hasattr(thing, node.attr):
                found.add(f"{thing.__name__}.{node.attr}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(BENCH).as_posix())
def test_what_a_benchmark_takes_from_others_is_there(path):
    assert not missing(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("def late():\n    from bench.ways import bucket_server", "bench.ways.bucket_server"),
        ("from bench.nowhere import some", "bench.nowhere.some"),
        ("from bench import driving\ndriving.commands", "bench.driving.commands"),
        ("from millstream.runs.pack.turns import PartsInTurn\nPartsInTurn._none = 1", "PartsInTurn._none"),
        ("from millstream.torch import Nothing", "millstream.torch.Nothing"),
    ],
)
def test_what_is_not_there_is_found(code, lacks):
    assert any(name.endswith(lacks) for name in missing(ast.parse(code)))


@pytest.mark.parametrize("how", [["-m", "bench"], ["bench/on_bucket.py"], ["bench/on_ray.py"]], ids=" ".join)
def test_it_says_how_it_is_used(how):
    done = subprocess.run([sys.executable, *how, "--help"], cwd=BENCH.parent, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"usage:" in done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", rows(TEXTS * 20))


@pytest.mark.parametrize(
    ("program", "tells"),
    [
        ("driver.py concat no 3 0", "ids"),
        ("driver.py best-fit yes 3 0 50 FOLDER", "tasks"),
        ("leader.py pack CORPUS --out FOLDER --workers 1", "seconds"),
        ("lengths.py assign 100 2048 0", "documents"),
        *([("on_ray.py --one CORPUS FOLDER local 0", "driver")] if LINUX else []),
        ("streams.py pack CORPUS 16 1", "sha256"),
        ("unpacking.py CORPUS FOLDER", "seconds"),
    ],
)
def test_a_program_of_it_measures_a_little(program, tells, corpus, tmp_path):
    words = [{"CORPUS": str(corpus), "FOLDER": str(tmp_path / "folder")}.get(word, word) for word in program.split()]
    done = subprocess.run(
        [sys.executable, BENCH / words[0], *words[1:]], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert tells in json.loads(done.stdout.splitlines()[-1])
