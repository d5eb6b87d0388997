"""The floors of the project: imports go downwards, without circles, and `--help` imports little."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# From the bottom up. The modules and folders of one floor do not import each other.
FLOORS = [
    {"utils"},
    {"video"},
    {"modeling"},
    {
        *("tsm_resnet", "cnn_lstm", "r2plus1d_resnet", "vivit"),
        *("timesformer", "video_swin", "mvit", "clips"),
    },
    {"config", "dataset"},
    {"models"},
    {"checkpoint"},
    {"evaluation"},
    {"deployment"},
    {"explanation"},
    {"timeline"},
    {"web", "demo"},
    {"training"},
    {"pretraining"},
    {"benchmarks"},
    {
        *("train", "pretrain", "evaluate", "predict", "benchmark_latency", "prepare_data"),
        *("compare", "report", "explain", "export"),
    },
    {"cross_validate"},
    {"ablate"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# A name that people import from where they expect it, although a higher floor defines it.
ALLOWED = {("dataset", "training.loaders")}
# Scripts may call train.train and pretrain.pretrain, and nothing else of another script.
SCRIPTS = set().union(*FLOORS[-3:])


def modules() -> dict[str, Path]:
    paths = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in FLOOR_OF]
    paths += ROOT.glob("*.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    names_found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names_found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            names_found |= names & MODULES.keys() or {node.module}
    return {name for name in names_found if name.split(".")[0] in FLOOR_OF}


IMPORTS = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == FLOOR_OF.keys()
    assert len(MODULES) > 90


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name: str) -> None:
    top = name.split(".")[0]
    for other in IMPORTS[name] - {b for a, b in ALLOWED if a == name}:
        below = other.split(".")[0]
        assert below == top or FLOOR_OF[below] < FLOOR_OF[top], f"{name} imports {other}"


def test_no_script_imports_a_script_but_to_train_and_pretrain() -> None:
    crossing = {(a, b) for a in SCRIPTS for b in IMPORTS[a] & SCRIPTS}
    assert crossing == {
        ("cross_validate", "train"),
        ("cross_validate", "pretrain"),
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


def test_the_root_has_few_entries() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    entries = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert len(entries) <= 47
    assert len([name for name in entries if name.endswith(".py")]) <= 23


# What no script needs for `--help`; those that train or predict may import torch.
HEAVY = ("torchvision", "matplotlib", "scipy", "sklearn", "aiohttp", "pandas", "jinja2", "timm")
LIGHT_SCRIPTS = (
    "prepare_data", "compare", "report", "evaluate", "predict", "cross_validate", "ablate",
    "benchmark_latency", "explain", "export",
)  # fmt: skip
OTHER_SCRIPTS = ("train", "pretrain")  # their recipes need torch in sight

# Each script runs in a fork of one process, which has imported tyro alone.
HELP = """
import contextlib, importlib, io, json, os, sys
import tyro
root, *scripts = sys.argv[1:]
sys.path.insert(0, root)
for script in scripts:
    if os.fork():
        os.wait()
        continue
    sys.argv = [f"{script}.py", "--help"]
    code, text = "no exit", io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            importlib.import_module(script).main()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = repr(error)
    names = sorted({name.split(".")[0] for name in sys.modules})
    code = code or ("" if f"{script}.py" in text.getvalue() else "no help")
    print(json.dumps([script, code, names]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def help_imports() -> dict[str, set[str]]:
    """The top-level modules that each script has imported when it has printed its help."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, str(ROOT), *LIGHT_SCRIPTS, *OTHER_SCRIPTS],
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    failed = {script: {f"failed: {code}"} for script, code, *_ in results if code}
    return {script: set(names) for script, _, names in results} | failed


@pytest.mark.parametrize("script", [*LIGHT_SCRIPTS, *OTHER_SCRIPTS])
def test_help_imports_no_heavy_library(script: str, help_imports: dict[str, set[str]]) -> None:
    names = help_imports[script]
    assert len(names) > 10, names  # otherwise it failed
    assert names & set(HEAVY) == set()


@pytest.mark.parametrize("script", LIGHT_SCRIPTS)
def test_scripts_that_compute_without_torch_start_without(
    script: str, help_imports: dict[str, set[str]]
) -> None:
    assert help_imports[script] & {"torch", "PIL"} == set()
