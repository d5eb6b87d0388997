"""Worker processes that are started afresh, as on macOS, on Windows and by Python 3.14.

What they get is pickled then. Linux forked them up to Python 3.13, so the other tests do not show
that everything can be pickled.
"""

import ast
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from helpers import ROOT, only_run, same_tensors, tiny_config, train_flags

import evaluate
import predict
import prepare_data
import train
from checkpoint import load_checkpoint
from clips.corruptions import CORRUPTIONS, Corrupt, ShuffleFrames
from training.loaders import build_dataloaders, eval_loader

METHODS = [
    method
    for method in ("spawn", "forkserver")
    if method in multiprocessing.get_all_start_methods()
]


@pytest.fixture(params=METHODS)
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    # A forkserver imports PyTorch once, and not each of its workers.
    multiprocessing.set_forkserver_preload(["dataset"])
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("no_figures")
def test_all_scripts_with_workers(
    start_method: str, trained, tiny_data: Path, tmp_path: Path, run_main: Callable, monkeypatch
) -> None:
    """The same weights and predictions as without worker processes."""
    monkeypatch.setattr("train.final_test", lambda *_: None)  # evaluate.py reads the same clips
    cache = ["cache", tiny_data, "--output", tmp_path / "cache", "--image-size", 32]
    done = run_main(prepare_data.main, *cache, "--n-frames", 4, "--num-workers", 1, cwd=tmp_path)
    assert "36 clips" in done.stdout
    flags = train_flags(tiny_data, "--no-check-clips", "--num-workers", 1)
    run_main(train.main, *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    assert same_tensors(*(load_checkpoint(folder)["model"] for folder in (trained[0], run)))
    run_main(evaluate.main, run, "--num-workers", 1, cwd=tmp_path)
    tables = [trained[0] / "predictions.csv", run / "evaluate_test" / "predictions.csv"]
    assert pd.read_csv(tables[0]).equals(pd.read_csv(tables[1]))
    video = tiny_data / "clips" / "test" / "0_0.mp4"
    run_main(predict.main, run, video, "--output", tmp_path / "out", cwd=tmp_path)
    assert (tmp_path / "out" / "0_0.mp4.timeline" / "timeline.csv").is_file()


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_a_worker_that_imports_a_script_does_not_run_it(script: str) -> None:
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    starts = [node for node in body if isinstance(node, ast.If)]
    calls = [
        node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert not calls
    defines_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
    names = [ast.unparse(node.test) for node in starts if "TYPE_CHECKING" not in ast.unparse(node)]
    assert names == ["__name__ == '__main__'"] * defines_main


def test_everything_that_workers_get_can_be_pickled(tiny_data: Path) -> None:
    """With each option that changes what is read or how."""
    settings = (
        tiny_config(tiny_data, rand_augment=2, random_erase=0.5),
        tiny_config(tiny_data, model_name="tsm_resnet", modality="rgb+mv"),
    )
    for config in settings:
        *loaders, _ = build_dataloaders(config)
        perturbations = [ShuffleFrames()]
        if config.modality == "rgb":
            perturbations += [Corrupt(name, 3) for name in CORRUPTIONS]
        rows = loaders[2].dataset.rows
        loaders.append(eval_loader(rows, config, views=2, crops=3, perturbations=perturbations))
        for loader in loaders:
            again = pickle.loads(pickle.dumps(loader.dataset))
            assert len(again[0, 1][0]) == len(loader.dataset[0, 1][0])
            pickle.dumps((loader.collate_fn, loader.worker_init_fn))
