"""The floors of the project: imports go downwards only, without circles."""

import ast
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

# From the ground up. What stands on one floor may not import its neighbours.
FLOORS = [
    {"utils"},
    {"video"},
    {"modeling"},
    {"clips", "tsm_resnet", "cnn_lstm", "r2plus1d_resnet", "vivit"},
    {"models", "config", "dataset"},
    {"checkpoint"},
    {"evaluation"},
    {"timeline"},
    {"web", "demo"},
    {"training"},
    {"benchmarks"},
    {"train", "evaluate", "predict", "benchmark_latency", "prepare_data", "compare", "report"},
    {"cross_validate"},
    {"ablate"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# A name that people import from where they expect it, although it is defined above.
ALLOWED = {("dataset", "training.loaders")}
# Scripts may call train.train, and nothing else of another script.
SCRIPTS = set().union(*FLOORS[-3:])


def modules() -> dict[str, Path]:
    paths = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in FLOOR_OF]
    paths += ROOT.glob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return {name for name in found if name.split(".")[0] in FLOOR_OF}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == FLOOR_OF.keys()
    assert len(MODULES) > 90


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name: str) -> None:
    top = name.split(".")[0]
    for other in IMPORTS[name] - {b for a, b in ALLOWED if a == name}:
        below = other.split(".")[0]
        assert below == top or FLOOR_OF[below] < FLOOR_OF[top], f"{name} imports {other}"


def test_no_script_imports_a_script_but_to_train() -> None:
    crossing = {(a, b) for a in SCRIPTS for b in IMPORTS[a] & SCRIPTS}
    assert crossing == {
        ("cross_validate", "train"),
        ("ablate", "train"),
        ("ablate", "cross_validate"),
    }


def test_there_are_no_circles() -> None:
    def reached(name: str, seen: set[str]) -> set[str]:
        for other in IMPORTS.get(name, ()):
            if other not in seen and (name, other) not in ALLOWED:
                seen.add(other)
                reached(other, seen)
        return seen

    assert not [name for name in MODULES if name in reached(name, set())]


def test_the_root_can_be_taken_in_at_a_look() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert len(entries) <= 40
    assert len([name for name in entries if name.endswith(".py")]) <= 20
