"""The floor plan: imports point down only, and stages never import one another."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

import millstream

ROOT = Path(millstream.__file__).parent
GROUND = {"records", "samples", "errors", "options", "bridge", "store"}
BELOW: dict[str, set[str]] = {
    "corpus": set(),
    "folder": {"corpus"},
    "exports": {"folder"},
    "stream": set(),
    "engines": set(),
    "sampling": set(),
    "aio": set(),
    "llm": set(),
    "client": {"aio", "llm"},
}
"""The stages, and those of them that each stands on."""
STAGES = set(BELOW)
RUNS: dict[str, set[str]] = {"pack": set(), "plan": {"pack"}, "ask": set(), "batch": {"ask"}}
"""The rooms of `runs`, and those of them that each stands on."""
ASYNC = {"aio", "llm", "client", "bridge"}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def imports_of(path: Path) -> set[str]:
    """The dotted names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    own = floor_of(path)
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("millstream.")}
    if own in GROUND:
        allowed = {"samples": {"records", "errors"}, "store": {"store", "errors"}}.get(own, set())
    elif own in STAGES:
        allowed = GROUND | BELOW[own] | {own}
    elif own == "runs":
        allowed = GROUND | STAGES | {own}
        others = {"pack", "plan", "ask", "batch"} - RUNS.get(path.parent.name, set()) - {path.parent.name}
        assert not any(name.startswith(f"millstream.runs.{other}.") for name in imports_of(path) for other in others)
    elif own == "streams":
        allowed = GROUND | STAGES | {"runs", own}
    else:
        allowed = (
            GROUND
            | STAGES
            | {"runs", "streams", "report", "integrity", "view", "planview", "terminal"}
            | ({"cli"} & {own})
        )
    assert ours <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_event_loop_in_the_pack_half(path):
    assert "asyncio" not in imports_of(path) or floor_of(path) in ASYNC or path.parent == ROOT / "runs" / "ask"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ask_half_knows_no_arrays(path):
    assert floor_of(path) not in {"aio", "llm", "client"} or not imports_of(path) & {"numpy", "pyarrow"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_file_knows_torch(path):
    heads = {name.split(".")[0] for name in imports_of(path)}
    assert path == ROOT / "torch.py" or not heads & {"torch", "transformers"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_file_knows_ray(path):
    assert path == ROOT / "engines" / "cluster.py" or "ray" not in {name.split(".")[0] for name in imports_of(path)}


def test_no_module_needs_itself():
    """Neither directly nor through others, nor where it imports them only when it is called."""
    paths = {name_of(path): path for path in ROOT.rglob("*.py")}
    needs = {}
    for name, path in paths.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = imports_of(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        needs[name] = (found & set(paths)) - {name}
    sorter = graphlib.TopologicalSorter(needs)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" needs ".join(reversed(error.args[1])))


# --- files ------------------------------------------------------------------

_OS = "open replace rename link listdir scandir walk stat lstat access unlink remove rmdir truncate makedirs mkdir"
_PATH = "getsize getmtime exists lexists isdir isfile islink samefile realpath"
_PATHLIB = "read_text read_bytes write_text write_bytes iterdir rglob touch is_file is_dir"
OPENS = {
    "open",
    *(f"os.{name}" for name in _OS.split()),
    *(f"os.path.{name}" for name in _PATH.split()),
    *(f"{module}.open" for module in ("io", "builtins", "gzip", "codecs")),
    *("np.load", "np.memmap", "np.save", "np.fromfile", "np.savez"),
}
"""Calls that open, replace or list a file, by the names that they have in our code."""
MODULES_OF_FILES = ("shutil.", "tempfile.", "fcntl.", "mmap.")
PARQUET = {"ParquetFile", "ParquetWriter", "read_table", "read_schema", "read_metadata"}
"""What may be given a file, but no path."""
FILES_GIVEN = {"file", "open"}
"""How a file is called where it is given to one of these: by this name, or as what a call of it returns."""


def files_opened(path: Path) -> int:
    """How many calls in a module open, replace, lock or list files themselves, rather than ask the store."""
    return sum(opens(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def opens(call: ast.Call) -> bool:
    """Whether a call does so."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last in PARQUET:
        given = call.args[0] if call.args else call
        given = given.func if isinstance(given, ast.Call) else given
        return ast.unparse(given).rpartition(".")[2] not in FILES_GIVEN
    return name in OPENS or name.startswith(MODULES_OF_FILES) or last in _PATHLIB.split()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("open(path)", True),
        ("os.path.isfile(path)", True),
        ("shutil.rmtree(path)", True),
        ("Path(path).read_text()", True),
        ("pq.ParquetFile(path)", True),
        ("pq.read_table(source=path)", True),
        ("store.open(name)", False),
        ("text.replace(old, new)", False),
        ("pq.ParquetFile(file)", False),
        ("read_table(store.open(name))", False),
    ],
)
def test_what_opens_a_file(call, told):
    assert opens(ast.parse(call).body[0].value) == told


def test_files_are_opened_in_the_store_alone():
    found = {path.relative_to(ROOT).as_posix(): files_opened(path) for path in ROOT.rglob("*.py")}
    outside = {name: count for name, count in found.items() if count and not name.startswith("store/")}
    assert not outside, "open these files with millstream.store"
    assert sum(found.values()) > 20


def test_there_are_modules_to_look_at():
    assert {floor_of(path) for path in MODULES} >= GROUND | STAGES | {"runs", "streams", "cli"}


# --- sizes ------------------------------------------------------------------

MOST_LINES, MOST_POSITIONAL = 50, 6


def long_functions(tree: ast.AST) -> set[str]:
    """The names of functions that have more lines than one sitting takes, without their docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[ast.get_docstring(node) is not None :]
            lines = node.body[0].lineno - node.lineno + (node.end_lineno - first[0].lineno + 1 if first else 0)
            if lines > MOST_LINES:
                found.add(node.name)
    return found


def unnamed_calls(tree: ast.AST) -> int:
    """Calls with so many positional arguments that nobody knows which is which."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sum(sum(not isinstance(arg, ast.Starred) for arg in call.args) > MOST_POSITIONAL for call in calls)


def test_what_is_too_long_is_found():
    short, long = "def short():\n" + "    a()\n" * 49, "def long():\n" + "    a()\n" * 50
    assert long_functions(ast.parse(short + long)) == {"long"}
    assert (
        unnamed_calls(ast.parse("f(1, 2, 3, 4, 5, 6)\nf(1, 2, 3, 4, 5, 6, 7)\nf(1, 2, 3, 4, 5, 6, *more, last=7)")) == 1
    )


def test_functions_are_short_and_arguments_have_names():
    """But for functions that were there before there was a limit: the list only gets shorter."""
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    long = {f"{name}:{function}" for name, tree in trees.items() for function in long_functions(tree)}
    assert long <= STILL_LONG, "let these functions fall apart into what they do"
    unnamed = {name for name, tree in trees.items() if unnamed_calls(tree)}
    assert not unnamed, "give these arguments by name"


def test_a_class_has_its_name_alone():
    """One word, one meaning."""
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    twice = {name for name, count in names.items() if count > 1 and not name.startswith("_")}
    assert not twice, "find a name that nothing else has"


STILL_LONG = {
    "cli/asking.py:ask",
    "client/client.py:__init__",
    "report.py:pack_summary",
    "runs/ask/asking.py:ask_to",
    "runs/plan/plan.py:_plan",
}
