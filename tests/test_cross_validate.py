"""cross_validate.py: every clip tested once by a model that did not see its patient; resumable."""

import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY_FLAGS, start_script

from checkpoint import load_checkpoint
from clips.split import SplitConfig, split
from cross_validate import SCORES, fold_folders, fold_table, main
from evaluation.calibration import Calibration
from evaluation.metrics import confusion_matrix, scores
from utils.errors import UserError

CLASSES = ["dark", "grey", "light"]


@pytest.fixture(scope="module")
def folds(tiny_data: Path, tmp_path_factory) -> Path:
    """The tiny data's six patients in three folds, in a folder of their own."""
    folder = tmp_path_factory.mktemp("folds")
    parts = [pd.read_csv(tiny_data / f"{name}.csv") for name in ("train", "val", "test")]
    pd.concat(parts).to_csv(folder / "all.csv", index=False)
    split(SplitConfig(str(folder / "all.csv"), str(folder / "folds"), folds=3))
    return folder / "folds"


def flags(folds: Path, data: Path) -> list[str]:
    return ["--folds", str(folds), "--data-root", str(data), *TINY_FLAGS, "--epochs", "2"]


@pytest.fixture(scope="module")
def finished(folds: Path, tiny_data: Path, tmp_path_factory) -> tuple[Path, str]:
    """A cross-validation that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    process = start_script("cross_validate.py", *flags(folds, tiny_data), cwd=folder)
    process.join()
    output = (folder / "out.txt").read_text()
    assert process.exitcode == 0, output
    (run,) = (folder / "runs").iterdir()
    return run, output


def test_every_clip_is_tested_once_by_its_fold(finished, folds: Path) -> None:
    run, _ = finished
    assert run.name.endswith("_cv_vivit")
    table = pd.read_csv(run / "predictions.csv")
    assert len(table) == 36
    assert table["path"].is_unique
    for name in ("fold1", "fold2", "fold3"):
        mine = table[table["fold"] == name]
        listed = pd.read_csv(folds / name / "test.csv")
        assert {Path(path).name for path in mine["path"]} == {
            Path(path).name for path in listed["path"]
        }
        trained = pd.read_csv(folds / name / "train.csv")
        assert not set(mine["patient"]) & set(trained["patient"])
        own = pd.read_csv(run / name / "predictions.csv")
        columns = [f"p_{name}" for name in CLASSES]
        assert np.allclose(mine[columns], own[columns], rtol=1e-6)


def test_pooled_numbers_are_those_of_all_predictions(finished) -> None:
    run, said = finished
    table = pd.read_csv(run / "predictions.csv")
    labels, predicted = (
        table[name].map(CLASSES.index).to_numpy() for name in ("label", "prediction")
    )
    found = json.loads((run / "test_metrics.json").read_text())
    expected = scores(confusion_matrix(labels, predicted, 3))
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value))
    assert found["patients"] == 6
    assert found["split"] == "out of 3 folds"
    thresholds = {
        name: Calibration.from_state_dict(load_checkpoint(run / name)["calibration"]).min_confidence
        for name in ("fold1", "fold2", "fold3")
    }
    confidence = table[[f"p_{name}" for name in CLASSES]].max(axis=1)
    answered = confidence >= table["fold"].map(thresholds)
    assert ((table["decision"] != "uncertain") == answered).all()
    assert found["selective"]["coverage"] == pytest.approx(answered.mean())
    assert "all clips, each tested by the model that did not see it" in said


def test_table_of_folds(finished) -> None:
    run, said = finished
    table = pd.read_csv(run / "cross_validation.csv", index_col=0)
    rows = ["fold1", "fold2", "fold3", "mean", "std", "all clips", "95 % low", "95 % high"]
    assert table.index.tolist() == rows
    accuracies = [
        json.loads((run / f"fold{k}/test_metrics.json").read_text())["accuracy"] for k in (1, 2, 3)
    ]
    assert table["accuracy"].iloc[:3].tolist() == pytest.approx(accuracies, rel=1e-5)
    assert table.loc["mean", "accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-5)
    assert table.loc["std", "accuracy"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-5)
    low, high = json.loads((run / "test_metrics.json").read_text())["intervals"]["accuracy"][
        "patients"
    ]
    assert table.loc["95 % low", "accuracy"] == pytest.approx(low, rel=1e-5, abs=1e-9)
    assert table.loc["95 % high", "accuracy"] == pytest.approx(high, rel=1e-5)
    assert "95 % high" in said


def test_table_without_intervals() -> None:
    """One patient in all: no interval, but a table."""
    row = {"clips": 3, "patients": 1, "epoch": 1, "unreadable_clips": 0}
    row |= dict.fromkeys(SCORES, 0.5)
    pooled = {"calibration": dict.fromkeys(("ece", "brier", "nll"), 0.1), "intervals": {}}
    pooled |= dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), 0.4)
    table = fold_table([{"fold": "fold1", **row}, {"fold": "fold2", **row}], pooled)
    assert table.loc["all clips", "accuracy"] == 0.4
    assert np.isnan(table.loc["95 % low", "accuracy"])


def test_killed_and_interrupted_it_goes_on_with_the_same_result(
    finished, folds: Path, tiny_data: Path, tmp_path: Path, run_main
) -> None:
    """SIGKILL in the second fold, SIGINT in the third; finished folds are not trained again."""

    def wait_for(process: BaseProcess, name: str) -> Path:
        deadline = time.monotonic() + 120
        while not (found := list((tmp_path / "runs").glob(f"*/{name}"))):
            assert process.exitcode is None, (tmp_path / "out.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return found[0]

    process = start_script("cross_validate.py", *flags(folds, tiny_data), cwd=tmp_path)
    run = wait_for(process, "fold2/last.pt").parent.parent
    process.kill()
    process.join()
    kept = (run / "fold1/test_metrics.json").stat().st_mtime_ns
    assert not (run / "predictions.csv").exists()
    process = start_script("cross_validate.py", "--resume", run, cwd=tmp_path)
    wait_for(process, "fold3/last.pt")
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT
    said = (tmp_path / "out.txt").read_text()
    assert f"python cross_validate.py --resume {run}" in said
    run_main(main, "--resume", run, cwd=tmp_path)
    assert (run / "fold1/test_metrics.json").stat().st_mtime_ns == kept
    undisturbed = pd.read_csv(finished[0] / "predictions.csv")
    pd.testing.assert_frame_equal(pd.read_csv(run / "predictions.csv"), undisturbed)


def test_folds_are_taken_in_order(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"fold{number}").mkdir()
        for name in ("train", "val", "test"):
            (tmp_path / f"fold{number}/{name}.csv").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "fold²").mkdir()
    assert [path.name for path in fold_folders(str(tmp_path))] == ["fold1", "fold2", "fold10"]
    (tmp_path / "fold2/val.csv").unlink()
    with pytest.raises(UserError, match=r"fold2/val.csv: no such manifest"):
        fold_folders(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-root", "."], "folds = '': holds no fold1"),
        (["--folds", "nowhere", "--data-root", "."], "folds = 'nowhere': holds no fold1"),
        (["--folds", "{folds}"], "data_root: name the folder of the clips"),
        (["--folds", "{folds}", "--data-root", "."], "fold1: the manifests have problems"),
        (["--folds", "{folds}", "--data-root", "{data}", "--epochs", "0"], "epochs = 0"),
        (
            ["--folds", "{folds}", "--data-root", "{data}", "--classes", "dark", "uncertain"],
            "no class may be called 'uncertain'",
        ),
        (["--resume", "nowhere"], "nowhere/config.json: no such file"),
        (["--resume", "{run}", "--epochs", "7"], "epochs is 2, not 7"),
    ],
)
def test_mistakes_are_one_line(
    arguments, message, finished, folds: Path, tiny_data: Path, tmp_path: Path, mistake
) -> None:
    names = {"folds": folds, "data": tiny_data, "run": finished[0]}
    filled = [argument.format(**names) for argument in arguments]
    code, stderr = mistake(main, *filled, cwd=tmp_path)
    assert code == 2
    assert message in stderr
    assert not (tmp_path / "runs").exists()
