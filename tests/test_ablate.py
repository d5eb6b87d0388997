"""ablate.py: what it trains, that it goes on where it stopped, and where its table goes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import TINY_FLAGS
from sklearn.metrics import f1_score

import ablate
import evaluate
from ablate import AblateConfig
from checkpoint import load_checkpoint
from clips.split import draw_patients
from clips.splits import SPLITS
from config import TrainConfig
from cross_validate import CrossValidateConfig
from evaluation.ablation import ABLATIONS, POST_HOC
from evaluation.predictions import read_predictions
from training.checks import resolve
from training.loaders import load_splits
from utils.errors import UserError

FLAGS = [
    *TINY_FLAGS, "--model-name", "cnnlstm", "--lstm-hidden", 4, "--freeze-until", "layer4",
    "--epochs", 1, "--seeds", 0, 1, "--sampler-tau", 0,
]  # fmt: skip


def flags(data: Path, folder: Path, *more: object) -> list[object]:
    store = folder / "features"
    return [
        *FLAGS,
        "--data-root",
        data,
        "--feature-cache",
        store,
        "--output",
        folder / "study",
        *more,
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.plots.plot_curves", lambda *_: None)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_can_work(ablation: str) -> None:
    model = "vivit" if "drop_path" in ABLATIONS[ablation] else "cnnlstm"
    base = TrainConfig(model_name=model)
    resolve(dataclasses.replace(base, **ABLATIONS[ablation]))
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(ABLATIONS[ablation]) <= known


@pytest.mark.usefixtures("quick")
def test_trains_what_is_left_and_writes_the_table(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    chosen = ["--ablations", "label smoothing"]
    run_main(ablate.main, *flags(tiny_data, tmp_path, *chosen), cwd=tmp_path)
    study = tmp_path / "study"
    runs = sorted(path.parent for path in study.glob("*/*/test_metrics.json"))
    assert [str(run.relative_to(study)) for run in runs] == [
        "baseline/seed0", "baseline/seed1", "label_smoothing/seed0", "label_smoothing/seed1",
    ]  # fmt: skip
    seeds = [load_checkpoint(run)["config"]["seed"] for run in runs]
    assert seeds == [0, 1, 0, 1]
    table = pd.read_csv(study / "study.csv")
    assert table["ablation"].tolist() == ["baseline", "label smoothing", *POST_HOC]
    scores = [read_predictions(run / "predictions.csv")[0].scores["macro_f1"] for run in runs[:2]]
    assert table["macro_f1"][0] == pytest.approx(np.mean(scores))
    # Balanced classes: adjusting changes nothing.
    assert table["macro_f1 delta"][2:].tolist() == [0, 0]
    text = (study / "study.md").read_text()
    assert f"| baseline | {table['accuracy'][0]:.3f} +-" in text
    assert (study / "study.png").stat().st_size > 10_000

    before = {run: (run / "best.pt").stat().st_mtime_ns for run in runs}
    (runs[0] / "test_metrics.json").unlink()  # as if it had been killed in its test
    run_main(ablate.main, *flags(tiny_data, tmp_path, *chosen), cwd=tmp_path)
    after = {run: (run / "best.pt").stat().st_mtime_ns for run in runs}
    assert {run for run in runs if after[run] != before[run]} <= {runs[0]}
    assert (runs[0] / "test_metrics.json").exists()
    assert (study / "study.md").read_text() == text


@pytest.mark.usefixtures("quick")
def test_adjusting_afterwards_is_evaluates(
    tiny_data: Path, tmp_path: Path, run_main: Callable
) -> None:
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    for split in ("train", "val", "test"):
        table = pd.read_csv(tiny_data / f"{split}.csv")
        if split == "train":
            table = table[(table["label"] == "dark") | table["path"].str.endswith("_0.mp4")]
        table["path"] = [str(tiny_data / "clips" / path) for path in table["path"]]
        table.to_csv(uneven / f"{split}.csv", index=False)
    run_main(
        ablate.main, *flags(uneven, tmp_path, "--ablations", "baseline", "--seeds", 0), cwd=tmp_path
    )
    run = tmp_path / "study" / "baseline" / "seed0"
    run_main(evaluate.main, run, "--logit-adjust-tau", 1, "--num-workers", 0, cwd=tmp_path)
    wanted, *_ = read_predictions(run / "evaluate_test_adjusted1" / "predictions.csv")
    found = ablate._adjusted(run, 1.0)
    assert [row.path for row in found.rows] == [row.path for row in wanted.rows]
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, atol=1e-3)
    plain, *_ = read_predictions(run / "predictions.csv")
    assert abs(plain.probabilities - wanted.probabilities).max() > 0.01


@pytest.mark.usefixtures("quick")
def test_label_fractions(
    tiny_data: Path, tmp_path: Path, run_main: Callable, mistake: Callable
) -> None:
    """The table holds what the files of the runs say, and nothing is trained twice."""
    arguments = flags(tiny_data, tmp_path, "--label-fractions", 1, 0.4, 0.5)
    done = run_main(ablate.main, *arguments, cwd=tmp_path)
    assert "label fraction 0.5: draws the same patients as 0.4, left out" in done.stdout
    study = tmp_path / "study"
    runs = [study / f"labels_{fraction}" / f"seed{k}" for fraction in ("0_4", 1) for k in (0, 1)]
    assert sorted(path.parent for path in study.glob("*/*/test_metrics.json")) == runs
    manifests = [pd.read_csv(run / "train.csv") for run in runs]
    assert [len(manifest) for manifest in manifests] == [9, 9, 18, 18]
    assert [set(m["patient"]) for m in manifests[2:]] == [{"train0", "train1"}] * 2
    assert manifests[0]["patient"].nunique() == 1
    for run, manifest in zip(runs, manifests, strict=True):
        assert set(manifest["label"]) == {"dark", "grey", "light"}
        counts = load_checkpoint(run)["class_counts"]
        assert counts == [len(manifest) // 3] * 3  # it was trained on them

    tested = [pd.read_csv(run / "predictions.csv") for run in runs]
    assert all((t["path"] == tested[0]["path"]).all() for t in tested)
    accuracy = np.array([(t["label"] == t["prediction"]).mean() for t in tested]).reshape(2, 2)
    f1 = [f1_score(t["label"], t["prediction"], average="macro", zero_division=0) for t in tested]
    table = pd.read_csv(study / "label_efficiency.csv")
    assert table["fraction"].tolist() == [0.4, 1]
    assert table["share"].tolist() == [0.5, 1]
    assert table["patients"].tolist() == [1, 2]
    assert table["clips"].tolist() == [9, 18]
    assert table["accuracy"].tolist() == pytest.approx(accuracy.mean(axis=1).tolist())
    assert table["accuracy sd"].tolist() == pytest.approx(accuracy.std(axis=1, ddof=1).tolist())
    assert table["macro_f1"].tolist() == pytest.approx(np.reshape(f1, (2, 2)).mean(axis=1).tolist())
    single = pd.read_csv(study / "label_efficiency_runs.csv")
    assert single["macro_f1"].tolist() == pytest.approx(f1)
    assert single["seed"].tolist() == [0, 1, 0, 1]
    text = (study / "label_efficiency.md").read_text()
    assert f"| 0.4 | 50.0% | 1 | 9 | {table['accuracy'][0]:.3f} +- " in text
    assert "always the largest class: accuracy 0.333, macro-F1 0.167" in text
    assert (study / "label_efficiency.png").stat().st_size > 10_000
    assert "<svg" in (study / "label_efficiency.svg").read_text()

    before = {run: (run / "last.pt").stat().st_mtime_ns for run in runs}
    (runs[1] / "test_metrics.json").unlink()  # as if it had been killed in its test
    done = run_main(ablate.main, *arguments, cwd=tmp_path)
    assert done.stdout.count("##### label fraction") == 1
    assert "##### label fraction 0.4, seed 1" in done.stdout
    after = {run: (run / "last.pt").stat().st_mtime_ns for run in runs}
    assert {run for run in runs if after[run] != before[run]} <= {runs[1]}
    assert (study / "label_efficiency.md").read_text() == text

    manifests[0][1:].to_csv(runs[0] / "train.csv", index=False)
    said = mistake(ablate.main, *arguments, cwd=tmp_path).stderr
    assert f"{runs[0].relative_to(tmp_path)}: its train clips were others" in said.replace(
        f"{tmp_path}/", ""
    )


@pytest.mark.parametrize("layout", ["manifests", "table", "classes", "demo"])
def test_a_subset_is_trained_on_whatever_the_data_look_like(
    layout: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifests in the run folder list the subset, the same validation and the same test."""
    data, settings = tiny_data, {}
    if layout == "table":
        tables = [pd.read_csv(tiny_data / f"{s}.csv").assign(split=s) for s in SPLITS]
        pd.concat(tables).to_csv(tmp_path / "all.csv", index=False)
        settings["csv"] = str(tmp_path / "all.csv")
    elif layout == "classes":
        data = tmp_path / "folders"
        for split in SPLITS:
            for _, row in pd.read_csv(tiny_data / f"{split}.csv").iterrows():
                name = row["path"].replace("/", "_")
                target = data / row["label"] / f"{row['patient']}-{name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tiny_data / "clips" / row["path"], target)
        settings["patient_pattern"] = "/([a-z]+[0-9])-"
    elif layout == "demo":
        data = ""
        monkeypatch.setattr("training.loaders.DEMO_ROOT", tiny_data)
        monkeypatch.setattr("training.loaders.render_demo", lambda _: None)
    classes = ("dark", "grey", "light")
    options = {"classes": classes, "model_name": "vivit", "device": "cpu"}
    config = resolve(CrossValidateConfig(data_root=str(data), **options, **settings))
    splits = load_splits(config)
    subset = draw_patients(splits["train"], 0.3, 1)
    assert 0 < len({row.patient for row in subset}) < len({r.patient for r in splits["train"]})

    kept = ablate.keep_subset(config, {**splits, "train": subset}, tmp_path / "run")
    found = load_splits(resolve(kept))
    assert found == {**splits, "train": subset}
    assert resolve(kept).n_frames == config.n_frames
    assert ablate.keep_subset(config, {**splits, "train": subset}, tmp_path / "run") == kept
    with pytest.raises(UserError, match="its train clips were others"):
        ablate.keep_subset(config, splits, tmp_path / "run")


def test_mistakes_are_told_before_any_training(
    tiny_data: Path, tmp_path: Path, mistake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*more: object) -> str:
        code, stderr = mistake(ablate.main, *flags(tiny_data, tmp_path, *more), cwd=tmp_path)
        assert code == 2
        return stderr

    monkeypatch.setattr("ablate._train", lambda *_: pytest.fail("it trained"))
    assert "no ablation is called 'magic'" in told("--ablations", "magic")
    assert "seed: give --seeds" in told("--seed", 5)
    said = told("--ablations", "cutmix", "focal loss", "ResNet-50", "--weights", "none")
    assert "cutmix: these settings cannot work: cutmix_alpha cuts pixels" in said
    assert "focal loss" not in said
    assert "LSTM: the baseline does this already" in told("--ablations", "LSTM")
    assert "none twice" in told("--seeds", 1, 1)
    assert "no class may be called 'path'" in told("--classes", "dark", "path")
    said = told("--ablations", "focal loss", "--label-smoothing", 0.05)
    assert "focal loss: these settings cannot work: label_smoothing is a setting of loss" in said
    fractions = ("--label-fractions", 0.5)
    assert "leave --ablations out" in told(*fractions, "--ablations", "focal loss")
    assert "leave --folds out" in told(*fractions, "--folds", "folds")
    assert "each must be above 0 to 1, none twice" in told(*fractions, 0.5)
    assert "each must be above 0 to 1, none twice" in told(*fractions, 0)
    assert "each must be above 0 to 1, none twice" in told(*fractions, 1.5)
    assert "seed: give --seeds" in told(*fractions, "--seed", 5)
    study = tmp_path / "study"
    study.mkdir()
    config = AblateConfig(
        model_name="cnnlstm", data_root=str(tiny_data), classes=("dark", "grey", "light")
    )
    ablate.hold_to_baseline(config, study)
    recipe = json.loads((study / "recipe.json").read_text())
    (study / "recipe.json").write_text(json.dumps({**recipe, "lstm_hidden": 77}))
    with pytest.raises(UserError, match=r"its runs had lstm_hidden 77, not 512"):
        ablate.hold_to_baseline(config, study)
    del recipe["ema_decay"]  # of a version that had none: as good as its default
    (study / "recipe.json").write_text(json.dumps(recipe))
    ablate.hold_to_baseline(config, study)
    with pytest.raises(UserError, match=r"its runs had ema_decay 0\.0, not 0\.9"):
        ablate.hold_to_baseline(dataclasses.replace(config, ema_decay=0.9), study)


def test_an_ablation_that_changed_is_not_taken_for_done(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AblateConfig(data_root=str(tiny_data), classes=("dark", "grey", "light"))
    place = tmp_path / "mixup" / "seed0"
    place.mkdir(parents=True)
    settings = ablate.ablation_settings(config, "mixup", 0)
    assert not ablate.is_finished(place, settings)
    (place / "test_metrics.json").write_text("{}")
    (place / "config.json").write_text(json.dumps(dataclasses.asdict(resolve(settings))))
    assert ablate.is_finished(place, settings)
    assert ablate.is_finished(place, dataclasses.replace(settings, num_workers=7))
    monkeypatch.setitem(ABLATIONS, "mixup", {"mixup_alpha": 0.4})
    with pytest.raises(UserError, match=r"was trained with mixup_alpha 0\.2, not 0\.4"):
        ablate.is_finished(place, ablate.ablation_settings(config, "mixup", 0))
