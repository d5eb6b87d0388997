"""evaluate.py: the same numbers from the checkpoint alone, on any split and number of views."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_FLAGS, run_script
from torch import nn
from torch.utils.data import DataLoader

from dataset import ClipsDataset, ReportingDataset, collate
from errors import UserError
from evaluate import evaluate
from manifest import ClipRow, read_manifest
from predictions import Predictions

CLASSES = ("dark", "grey", "light")


class Brightness(nn.Module):
    """Logits from the mean brightness of the clip and of its first frame: known by hand."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.float() / 255
        return torch.stack(
            (x.mean((1, 2, 3, 4)), x[:, 0].mean((1, 2, 3)), -x.amax((1, 2, 3, 4))), 1
        )


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run_script("train.py", "--data-root", tiny_data, *TINY_FLAGS, "--epochs", 2, cwd=folder)
    return next((folder / "runs").iterdir())


def loader(data: Path, batch_size: int, views: int = 1) -> DataLoader:
    rows = read_manifest(data / "test.csv", classes=CLASSES)
    clips = ReportingDataset(ClipsDataset(rows, 4, 32, views=views))
    return DataLoader(clips, batch_size, collate_fn=collate)


def test_predictions_do_not_depend_on_the_batches(tiny_data: Path) -> None:
    """A short last batch weighs no more than its clips."""
    cpu = torch.device("cpu")
    one = evaluate(Brightness(), loader(tiny_data, 9), cpu)
    two = evaluate(Brightness(), loader(tiny_data, 4), cpu)
    assert one.rows == list(read_manifest(tiny_data / "test.csv", classes=CLASSES))
    assert np.allclose(one.probabilities, two.probabilities, atol=1e-7)
    assert one.loss == pytest.approx(two.loss)


def test_views_are_averaged_in_probability(tiny_data: Path) -> None:
    rows = read_manifest(tiny_data / "test.csv", classes=CLASSES)
    clips = ClipsDataset(rows, 4, 32, views=3)
    slow = [Brightness()(clips[i][0]).softmax(1).mean(0).tolist() for i in range(9)]
    fast = evaluate(Brightness(), loader(tiny_data, 2, views=3), torch.device("cpu"))
    assert np.allclose(fast.probabilities, slow, atol=1e-6)


def test_loss_is_the_mean_negative_log_likelihood() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75]])
    rows = [ClipRow(Path("a"), 0), ClipRow(Path("b"), 1)]
    predictions = Predictions(rows, probabilities)
    assert predictions.loss == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert predictions.predicted.tolist() == [0, 1]


def test_model_is_left_in_eval_mode_without_gradients(tiny_data: Path) -> None:
    class Watch(nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.zeros(len(clips), 3)

    evaluate(Watch().train(), loader(tiny_data, 4), torch.device("cpu"))


def test_evaluating_again_gives_the_numbers_of_training(run: Path, tmp_path: Path) -> None:
    trained = json.loads((run / "test_metrics.json").read_text())
    for name in (run, run / "best.pt"):  # a run folder and a checkpoint file mean the same
        run_script("evaluate.py", name, "--workers", 0, "--output", tmp_path / "a", cwd=tmp_path)
        evaluated = json.loads((tmp_path / "a/test_metrics.json").read_text())
        for key in ("accuracy", "macro_f1", "balanced_accuracy", "clips", "per_class"):
            assert evaluated[key] == trained[key]
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "test_metrics.json",
        "predictions.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
    }


def test_other_splits_views_and_shuffled_frames(run: Path, tmp_path: Path) -> None:
    arguments = ["evaluate.py", run, "--workers", 0]
    done = run_script(*arguments, "--split", "val", "--views", 2, "--shuffle-frames", cwd=tmp_path)
    folder = run / "evaluate_val_views2_shuffled"
    assert str(folder) in done.stdout
    facts = json.loads((folder / "test_metrics.json").read_text())
    assert (facts["split"], facts["views"], facts["shuffle_frames"]) == ("val", 2, True)
    run_script(*arguments, "--split", "train", cwd=tmp_path)
    assert len(pd.read_csv(run / "evaluate_train/predictions.csv")) == 18


def test_own_csv_in_another_place(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data / "clips", tmp_path / "moved" / "clips")
    table = pd.read_csv(tiny_data / "val.csv").iloc[[0, 4, 8]]
    table.to_csv(tmp_path / "moved" / "three.csv", index=False)
    csv = tmp_path / "moved" / "three.csv"
    run_script("evaluate.py", run, "--csv", csv, "--workers", 0, cwd=tmp_path)
    predictions = pd.read_csv(run / "evaluate_three/predictions.csv")
    assert [Path(path).is_relative_to(tmp_path) for path in predictions["path"]] == [True] * 3
    moved = tmp_path / "moved"
    for split in ("train", "val", "test"):
        shutil.copy(tiny_data / f"{split}.csv", moved)
    run_script("evaluate.py", run, "--data-root", moved, "--workers", 0, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such checkpoint"),
        (["{csv}"], "is damaged or holds no weights"),
        (["{foreign}"], "not a checkpoint of this project"),
        (["{future}"], "written by a newer version"),
        (["{run}", "--views", "0"], "views and batch_size must be at least 1"),
        (["{run}", "--csv", "nowhere.csv"], "nowhere.csv: no such manifest"),
        (["{run}", "--data-root", "elsewhere"], "elsewhere/train.csv: no such manifest"),
    ],
)
def test_mistakes_are_one_line(run: Path, tiny_data, tmp_path, arguments, message) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "foreign.pt")
    torch.save({"format_version": 99}, tmp_path / "future.pt")
    names = {
        "run": run,
        "csv": tiny_data / "test.csv",
        "foreign": tmp_path / "foreign.pt",
        "future": tmp_path / "future.pt",
    }
    filled = [argument.format(**names) for argument in arguments]
    done = run_script("evaluate.py", *filled, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_malicious_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"format_version": 1, "model": Bomb()}, tmp_path / "bomb.pt")
    done = run_script("evaluate.py", tmp_path / "bomb.pt", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert not (tmp_path / "boom").exists()


def test_nothing_readable_is_an_error(tmp_path: Path, tiny_data: Path) -> None:
    rows = [
        row._replace(path=tmp_path / "none.mp4")
        for row in read_manifest(tiny_data / "test.csv", classes=CLASSES)
    ]
    clips = ReportingDataset(ClipsDataset(rows, 4, 32))
    broken = DataLoader(clips, 4, collate_fn=collate)
    with pytest.raises(UserError, match="9 test clips cannot be read"):
        evaluate(Brightness(), broken, torch.device("cpu"))
    with pytest.raises(UserError, match="none of the test clips"):
        evaluate(Brightness(), broken, torch.device("cpu"), skip_unreadable=True)
