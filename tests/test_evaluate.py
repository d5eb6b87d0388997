"""evaluate.py: the same numbers from the checkpoint alone, on any split and number of views."""

import json
import os
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint
from clips.corruptions import CORRUPTIONS
from clips.manifest import ClipRow, read_manifest
from dataset import ClipsDataset, collate
from evaluate import CorruptionName, main
from evaluation.calibration import Calibration, apply_temperature
from evaluation.predictions import Predictions
from training.engine import evaluate
from utils.errors import UserError

CLASSES = ("dark", "grey", "light")


class Brightness(nn.Module):
    """Logits from the mean brightness of the clip and of its first frame: known by hand."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = clips.float() / 255
        return torch.stack(
            (x.mean((1, 2, 3, 4)), x[:, 0].mean((1, 2, 3)), -x.amax((1, 2, 3, 4))), 1
        )


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A run folder of this file's own, because evaluate.py writes into it."""
    return Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("evaluated") / "run"))


def test_the_checkpoint_is_ready_for_whole_videos(run: Path) -> None:
    """predict.py finds the clips' frame rate in it (4 frames of 0.8 s), and the calibration."""
    state = load_checkpoint(run)
    assert state["frame_rate"] == pytest.approx(5.0)
    calibration = Calibration.from_state_dict(state["calibration"])
    assert calibration.target_error == 0.1
    assert calibration.with_target_error(1.0).min_confidence < calibration.min_confidence


def loader(data: Path, batch_size: int, views: int = 1) -> DataLoader:
    rows = read_manifest(data / "test.csv", classes=CLASSES)
    clips = ClipsDataset(rows, 4, 32, views=views)
    return DataLoader(clips, batch_size, collate_fn=collate)


def test_predictions_do_not_depend_on_the_batches(tiny_data: Path) -> None:
    """A short last batch weighs no more than its clips."""
    cpu = torch.device("cpu")
    one = evaluate(Brightness(), loader(tiny_data, 9), cpu)
    two = evaluate(Brightness(), loader(tiny_data, 4), cpu)
    assert one.rows == list(read_manifest(tiny_data / "test.csv", classes=CLASSES))
    assert np.allclose(one.probabilities, two.probabilities, atol=1e-7)
    assert one.loss == pytest.approx(two.loss)


def test_more_batches_than_a_process_may_open_files(tiny_data: Path) -> None:
    """A batch of a worker shares its memory through an open file, which must not outlive it."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of open files")
    rows = read_manifest(tiny_data / "test.csv", classes=CLASSES) * 15
    clips = ClipsDataset(rows, 4, 32)
    batches = DataLoader(clips, 1, collate_fn=collate, num_workers=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 60, limits[1]))
        predictions = evaluate(Brightness(), batches, torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(predictions) == 135


def test_features_are_in_the_order_of_the_rows(tiny_data: Path) -> None:
    """One feature per clip, the mean over its views, whatever the batches are."""

    class Means(Brightness):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(clips))

    rows = read_manifest(tiny_data / "test.csv", classes=CLASSES)
    clips = ClipsDataset(rows, 4, 32, views=3)
    slow = [Brightness()(clips[i][0]).mean(0).tolist() for i in range(9)]
    found = evaluate(
        Means(), loader(tiny_data, 2, views=3), torch.device("cpu"), with_features=True
    )
    assert np.allclose(found.features, slow, atol=1e-6)
    assert evaluate(Means(), loader(tiny_data, 4), torch.device("cpu")).features is None


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
    assert predictions.y_pred.tolist() == [0, 1]


def test_model_is_left_in_eval_mode_without_gradients(tiny_data: Path) -> None:
    class Watch(nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.zeros(len(clips), 3)

    evaluate(Watch().train(), loader(tiny_data, 4), torch.device("cpu"))


def test_evaluating_again_gives_the_numbers_of_training(run: Path, tmp_path, run_main) -> None:
    trained = json.loads((run / "test_metrics.json").read_text())
    more = ("--num-workers", 0, "--output", tmp_path / "a")
    for checkpoint in (run, run / "best.pt"):  # a run folder and a checkpoint file mean the same
        run_main(main, checkpoint, *more, cwd=tmp_path)
        evaluated = json.loads((tmp_path / "a/test_metrics.json").read_text())
        for key in ("accuracy", "macro_f1", "balanced_accuracy", "clips", "per_class"):
            assert evaluated[key] == trained[key]
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {
        "environment.json",
        "test_metrics.json",
        "predictions.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "precision_recall.png",
        "embedding.csv",
        "embedding.png",
    }


def test_other_splits_views_and_shuffled_frames(
    run: Path, tmp_path: Path, run_main, no_figures
) -> None:
    arguments = [main, run, "--num-workers", 0]
    done = run_main(*arguments, "--split", "val", "--views", 2, "--shuffle-frames", cwd=tmp_path)
    folder = run / "evaluate_val_views2_shuffled"
    assert str(folder) in done.stdout
    facts = json.loads((folder / "test_metrics.json").read_text())
    assert (facts["split"], facts["views"], facts["shuffle_frames"]) == ("val", 2, True)
    run_main(*arguments, "--split", "train", cwd=tmp_path)
    assert len(pd.read_csv(run / "evaluate_train/predictions.csv")) == 18


def test_own_csv_in_another_place(
    run: Path, tiny_data: Path, tmp_path: Path, run_main, no_figures
) -> None:
    shutil.copytree(tiny_data / "clips", tmp_path / "moved" / "clips")
    table = pd.read_csv(tiny_data / "val.csv").iloc[[0, 4, 8]]
    table.to_csv(tmp_path / "moved" / "three.csv", index=False)
    csv = tmp_path / "moved" / "three.csv"
    run_main(main, run, "--csv", csv, "--num-workers", 0, cwd=tmp_path)
    predictions = pd.read_csv(run / "evaluate_three/predictions.csv")
    assert [Path(path).is_relative_to(tmp_path) for path in predictions["path"]] == [True] * 3
    moved = tmp_path / "moved"
    for split in ("train", "val", "test"):
        shutil.copy(tiny_data / f"{split}.csv", moved)
    run_main(main, run, "--data-root", moved, "--num-workers", 0, cwd=tmp_path)


def test_corruptions_and_another_target_error(
    run: Path, tmp_path: Path, run_main, no_figures
) -> None:
    arguments = [main, run, "--num-workers", 0, "--target-error", 0.5, "--output", "hard"]
    done = run_main(*arguments, "--corruptions", "low_light", "frame_drop", cwd=tmp_path)
    assert "mean corruption accuracy" in done.stdout
    found = json.loads((tmp_path / "hard/robustness.json").read_text())
    tested = json.loads((tmp_path / "hard/test_metrics.json").read_text())
    assert found["clean_accuracy"] == pytest.approx(tested["accuracy"])
    assert set(found["corruptions"]) == {"low_light", "frame_drop", "all"}
    table = pd.read_csv(tmp_path / "hard/robustness.csv")
    assert table[["corruption", "severity"]].duplicated().sum() == 0
    assert len(table) == 10
    fitted = Calibration.from_state_dict(load_checkpoint(run)["calibration"])
    expected = fitted.with_target_error(0.5)
    assert tested["selective"]["threshold"] == expected.threshold
    assert tested["calibration"]["temperature"] == fitted.temperature != 1
    answers = pd.read_csv(tmp_path / "hard/predictions.csv")
    confidence = answers[["p_dark", "p_grey", "p_light"]].max(axis=1)
    assert ((answers["decision"] == "uncertain") == (confidence < expected.min_confidence)).all()
    session = json.loads((tmp_path / "hard/environment.json").read_text())["sessions"][0]
    assert session["command"].startswith("python evaluate.py")
    assert "--target-error 0.5" in session["command"]


def test_probabilities_are_tempered_and_the_raw_ones_kept(tiny_data: Path) -> None:
    cpu = torch.device("cpu")
    plain = evaluate(Brightness(), loader(tiny_data, 4), cpu)
    cool = evaluate(Brightness(), loader(tiny_data, 4), cpu, temperature=0.5)
    assert np.allclose(cool.probabilities, apply_temperature(plain.probabilities, 0.5), atol=1e-7)
    assert np.allclose(cool.uncalibrated, plain.probabilities)
    # Views are tempered one by one, before they are averaged.
    rows = read_manifest(tiny_data / "test.csv", classes=CLASSES)
    clips = ClipsDataset(rows, 4, 32, views=3)
    slow = [(Brightness()(clips[i][0]) / 0.5).softmax(1).mean(0).tolist() for i in range(9)]
    views = evaluate(Brightness(), loader(tiny_data, 2, views=3), cpu, temperature=0.5)
    assert np.allclose(views.probabilities, slow, atol=1e-6)


def test_patients_of_the_training_in_another_manifest_are_told(
    run, tiny_data, tmp_path, run_main, no_figures
) -> None:
    table = pd.read_csv(tiny_data / "test.csv")
    table["patient"] = ["train0" if n % 3 else "new" for n in range(len(table))]
    table.to_csv(tmp_path / "seen.csv", index=False)
    arguments = [main, run, "--csv", tmp_path / "seen.csv", "--data-root", tiny_data]
    arguments += ["--num-workers", 0]
    done = run_main(*arguments, "--output", tmp_path / "seen", cwd=tmp_path)
    assert "LEAKAGE: 1 of 2 patients of seen are also in the training's train" in done.stdout
    assert "train0" not in done.stdout
    table.drop(columns="patient").to_csv(tmp_path / "unknown.csv", index=False)
    arguments[3] = tmp_path / "unknown.csv"
    done = run_main(*arguments, "--output", tmp_path / "unknown", cwd=tmp_path)
    message = "the patients of 9 of 9 clips of unknown are unknown and were not compared"
    assert message in done.stdout
    (warning,) = json.loads((tmp_path / "unknown/test_metrics.json").read_text())["warnings"]
    assert warning["text"].startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--target-error", "2"], "target_error = 2.0: must be from 0 to 1"),
        (["nowhere"], "nowhere: no such checkpoint"),
        (["{csv}"], "it is damaged, or not a file of torch.save"),
        (["{foreign}"], "not a checkpoint of this project"),
        (["{future}"], "written by a newer version"),
        (["{run}", "--views", "0"], "views and batch_size must be at least 1"),
        (["{run}", "--csv", "nowhere.csv"], "nowhere.csv: no such manifest"),
        (["{run}", "--data-root", "elsewhere"], "elsewhere: no such folder: give --data-root"),
    ],
)
def test_mistakes_are_one_line(run: Path, tiny_data, tmp_path, arguments, message, mistake) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "foreign.pt")
    torch.save({"format_version": 99}, tmp_path / "future.pt")
    names = {
        "run": run,
        "csv": tiny_data / "test.csv",
        "foreign": tmp_path / "foreign.pt",
        "future": tmp_path / "future.pt",
    }
    filled = [argument.format(**names) for argument in arguments]
    code, stderr = mistake(main, *filled, cwd=tmp_path)
    assert code == 2
    assert message in stderr


def test_malicious_checkpoint_runs_nothing(tmp_path: Path, mistake) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"format_version": 1, "model": Bomb()}, tmp_path / "bomb.pt")
    code, _ = mistake(main, tmp_path / "bomb.pt", cwd=tmp_path)
    assert code == 2
    assert not (tmp_path / "boom").exists()


def test_nothing_readable_is_an_error(tmp_path: Path, tiny_data: Path) -> None:
    rows = [
        row._replace(path=tmp_path / "none.mp4")
        for row in read_manifest(tiny_data / "test.csv", classes=CLASSES)
    ]
    clips = ClipsDataset(rows, 4, 32)
    broken = DataLoader(clips, 4, collate_fn=collate)
    with pytest.raises(UserError, match="9 test clips cannot be read"):
        evaluate(Brightness(), broken, torch.device("cpu"))
    with pytest.raises(UserError, match="none of the test clips"):
        evaluate(Brightness(), broken, torch.device("cpu"), skip_unreadable=True)


def test_corruptions_of_the_command_line_are_those_that_exist() -> None:
    assert get_args(CorruptionName) == tuple(CORRUPTIONS)


def test_timelines_are_evaluated_without_a_model(tmp_path: Path, run_main, mistake) -> None:
    (tmp_path / "truth.csv").write_text("start,end,label\n0,10,cut\n10,20,suture\n")
    (tmp_path / "said.csv").write_text("start,end,label\n0,12,cut\n12,20,suture\n")
    arguments = ["timeline", tmp_path / "truth.csv", tmp_path / "said.csv"]
    done = run_main(main, *arguments, "--relaxed", 3, "--output", "scores", cwd=tmp_path)
    assert "boundaries relaxed by 3 s" in done.stdout
    results = json.loads((tmp_path / "scores/timeline_metrics.json").read_text())
    assert results["pooled"]["accuracy"] == pytest.approx(0.9)
    assert results["pooled"]["relaxed_accuracy"] == pytest.approx(1.0)
    _, stderr = mistake(main, "--timeline", "a.csv", "b.csv", cwd=tmp_path)
    assert "python evaluate.py timeline TRUTH PREDICTION" in stderr


def test_an_earlier_flag_names_the_new_one(tmp_path: Path, mistake) -> None:
    _, stderr = mistake(main, "run", "--adjust", "1", cwd=tmp_path)
    assert stderr == "error: --adjust is now called --logit-adjust-tau\n"
