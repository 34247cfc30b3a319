"""The floor plan: imports point down only, and stages never import one another."""

import ast
import graphlib
from pathlib import Path

import pytest

import millstream

ROOT = Path(millstream.__file__).parent
GROUND = {"records", "samples", "errors", "bridge"}
STAGES = {"stream", "formats", "engines", "aio", "llm"}
ASYNC = {"aio", "llm", "bridge"}
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
        allowed = {"records", "errors"} if own == "samples" else set()
    elif own in STAGES:
        allowed = GROUND | {own}
    elif own == "runs":
        allowed = GROUND | STAGES | {own}
        other = {"pack": "ask", "ask": "pack"}.get(path.parent.name)
        assert not any(name.startswith(f"millstream.runs.{other}.") for name in imports_of(path))
    else:
        allowed = GROUND | STAGES | {"runs", "report", "integrity", "view", "planview", "terminal"} | ({"cli"} & {own})
    assert ours <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_event_loop_in_the_pack_half(path):
    assert "asyncio" not in imports_of(path) or floor_of(path) in ASYNC or path.parent == ROOT / "runs" / "ask"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ask_half_knows_no_arrays(path):
    assert floor_of(path) not in {"aio", "llm"} or not imports_of(path) & {"numpy", "pyarrow"}


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


def test_there_are_modules_to_look_at():
    assert {floor_of(path) for path in MODULES} >= GROUND | STAGES | {"runs", "cli"}
