"""The documentation: commands have existing flags, links lead somewhere, Python blocks run."""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from helpers import ROOT

from config import RECIPES
from evaluation.ablation import ABLATIONS, BASELINE, POST_HOC
from evaluation.metrics import MORE_SCORES
from models import MODELS
from training.losses import LOSSES
from utils.files import read_json

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The settings of each script and module, by what stands after `python` or `python -m`.
SETTINGS = {
    "train.py": "config.TrainConfig",
    "pretrain.py": "pretraining.settings.PretrainConfig",
    "cross_validate.py": "cross_validate.CrossValidateConfig",
    "ablate.py": "ablate.AblateConfig",
    "evaluate.py": "evaluate.EvaluateConfig",
    "evaluate.py timeline": "evaluate.TimelineConfig",
    "predict.py": "predict.PredictConfig",
    "compare.py": "compare.CompareConfig",
    "explain.py": "explain.ExplainConfig",
    "export.py": "export.ExportConfig",
    "report.py": "report.ReportConfig",
    "prepare_data.py audit": "clips.audit.AuditConfig",
    "prepare_data.py check": "prepare_data.CheckConfig",
    "prepare_data.py split": "clips.split.SplitConfig",
    "prepare_data.py cache": "clips.build_cache.CacheConfig",
    "prepare_data.py clips": "clips.cut.CutConfig",
    "benchmark_latency.py": "benchmark_latency.BenchmarkConfig",
    "benchmarks.data": "benchmarks.data.BenchmarkConfig",
    "benchmarks.novelty": "benchmarks.novelty.NoveltyConfig",
    "benchmarks.models": "benchmarks.models.ModelsConfig",
    "benchmarks.pretraining": "benchmarks.pretraining.PretrainingConfig",
    "benchmarks.intervals": "benchmarks.intervals.IntervalConfig",
    "benchmarks.explanations": "benchmarks.explanations.ExplanationsConfig",
    "benchmarks.shards": "benchmarks.shards.ShardsConfig",
    "benchmarks.scale": "benchmarks.scale.ScaleConfig",
    "demo.evidence": "demo.evidence.EvidenceConfig",
    "demo.operation": "demo.operation.OperationConfig",
    "demo.figures": "demo.figures.FigureConfig",
    "demo.data": "",  # without flags
    "folds.py": "",  # printed in docs/results/ablation.md
}


NO_SETTING = {"help", "list_encoders", "recipe"}  # flags that are no field
# The values of flags that are no Literal.
REGISTRIES = {"ablations": ABLATIONS, "model_name": MODELS, "loss": LOSSES, "recipe": RECIPES}


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    return [code for name, code in found if name == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page that start Python, as words, from blocks and inline code."""
    lines = [" ".join(code.split()) for code in re.findall(r"`([^`]*)`", prose(page))]
    for block in blocks(page):
        block = block.replace("\\\n", " ")
        variables = re.findall(r'^ *(\w+)="(.*)"$', block, re.M)
        for name, value in variables:
            block = block.replace(f"${name}", value)
        lines += block.splitlines()
    for line in lines:
        if not re.match(r"(.*[ |])?(python|torchrun) ", line):
            continue
        words = shlex.split(line.replace("|", " | "), comments=True)
        if "python" in words:
            start = words.index("python") + 1
        else:  # torchrun has flags of its own
            start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        ends = [i for i, word in enumerate(words) if word in ("|", "&&") and i > start]
        yield words[start : min(ends, default=len(words))]


def settings_of(words: list[str]) -> tuple[type | None, list[str]]:
    """The dataclass of a command, and the arguments after the script or module."""
    words = words[1:] if words[0] == "-m" else words
    name = words[0]
    if " ".join(words[:2]) in SETTINGS:
        name, words = " ".join(words[:2]), words[1:]
    assert name in SETTINGS, f"no such script: {name}"
    if not SETTINGS[name]:
        return None, words[1:]
    module, kind = SETTINGS[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), kind), words[1:]


def choices(hint: Any) -> tuple:
    """The values of a Literal, also inside of a tuple or an Optional; none for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for inner in get_args(hint) for value in choices(inner))


def problems(words: list[str]) -> list[str]:
    """What is wrong with a command line: unknown flags, and values that are not allowed."""
    kind, arguments = settings_of(words)
    fields = {field.name for field in dataclasses.fields(kind)} if kind else set()
    hints = get_type_hints(kind) if kind else {}
    wrong, name = [], ""
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].replace("-", "_")
            if name not in NO_SETTING and name not in fields | {"no_" + n for n in fields}:
                wrong.append(f"{argument} is no flag")
        elif name and "..." not in argument and not argument.startswith("$"):
            allowed = [str(value) for value in choices(hints.get(name))]
            allowed = list(REGISTRIES.get(name, allowed))
            if allowed and argument not in allowed:
                wrong.append(f"--{name} {argument}: choose from {allowed}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_existing_flags(page: Path) -> None:
    for words in commands(page):
        assert not problems(words), f"{page.name}: {shlex.join(words)}"


def test_commands_are_found() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_in_the_text_exist(page: Path) -> None:
    kinds = [settings_of([name])[0] for name in SETTINGS if SETTINGS[name]]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)} | NO_SETTING
    inline = " ".join(re.findall(r"`([^`]*)`", prose(page)))
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9-]*)", inline)}
    assert not {flag for flag in flags - known if flag.removeprefix("no_") not in known}


def test_every_script_is_in_the_documentation() -> None:
    started = {" ".join(words).removeprefix("-m ") for page in PAGES for words in commands(page)}
    for name in SETTINGS:
        assert any(command.startswith(name) for command in started), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_all_files_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"\b([\w/]+/\w+\.py|requirements[\w-]*\.txt)\b", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_pages_stay_short() -> None:
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(readme) <= 160
    assert len((ROOT / "RESULTS.md").read_text("utf-8").splitlines()) <= 80
    assert len([line for line in readme if line.endswith("&& pytest")]) == 1  # for .ci/run


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (ROOT / "README.md", ROOT / "RESULTS.md")
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8"))
    }
    assert not [page.name for page in PAGES[1:] if page not in linked]


def test_ablations_have_the_names_of_the_table() -> None:
    table = (ROOT / "docs" / "results" / "ablation.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| \d\.\d{3} \+- \d\.\d{3} \(", table, re.M)
    assert len(rows) == 95
    assert set(rows) - {BASELINE} <= ABLATIONS.keys() | POST_HOC.keys()


def test_the_python_of_the_results_imports_what_exists() -> None:
    for page in (ROOT / "docs" / "results").glob("*.md"):
        for code in blocks(page, "python"):
            for node in ast.parse(code).body:
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert not [a.name for a in node.names if not hasattr(module, a.name)]


EXTENDING = ROOT / "docs" / "extending.md"


def test_the_snippets_of_extending_are_short() -> None:
    snippets = blocks(EXTENDING, "python")
    assert len(snippets) >= 9
    assert [code for code in snippets if len(code.splitlines()) >= 16] == []
    for code in snippets:
        assert len([line for line in code.splitlines() if line.strip()]) < 15, code


def test_the_python_of_extending_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None
) -> None:
    """Every block, from top to bottom; what the snippets add to the project is taken out again."""
    monkeypatch.chdir(tmp_path)
    added = {"frame_mean": MODELS, "poly1": LOSSES, "kappa": MORE_SCORES}
    for name, registry in added.items():
        monkeypatch.setitem(registry, name, None)
        monkeypatch.delitem(registry, name)
    namespace: dict[str, Any] = {"__name__": "extending"}
    for number, code in enumerate(blocks(EXTENDING, "python"), 1):
        exec(compile(code, f"extending.md, snippet {number}", "exec"), namespace)
    assert all(name in registry for name, registry in added.items())
    assert namespace["probabilities"].shape == (1, 7)
    assert read_json(namespace["run"] / "config.json")["loss"] == "poly1"
    assert (namespace["run"] / "predictions.csv").exists()
    assert namespace["features"].shape == (14, 16)
    assert len(namespace["rows"]) == 28
    assert namespace["clip"].shape == (4, 3, 64, 64)
    assert namespace["low"] <= namespace["high"]
