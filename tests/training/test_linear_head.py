"""head linear: the optimum of a logistic regression, its strength chosen over patients."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import clips, make_model, only_run, start_script, tiny_config, wait_for
from sklearn.linear_model import LogisticRegression

import cross_validate
import evaluate
import predict
import train
from checkpoint import load_checkpoint, rebuild_model
from clips.manifest import ClipRow
from clips.split import SplitConfig, split
from clips.splits import read_splits
from config import RECIPES, TrainConfig
from evaluation.calibration import calibrate
from modeling.features import per_clip, recorded_features
from training.checks import resolve
from training.linear_head import (
    STRENGTHS,
    LinearHead,
    choose_and_fit,
    clip_importance,
    fit_heads,
    inner_folds,
)
from utils.errors import UserError

# fmt: off
FLAGS = [
    "--classes", "dark", "grey", "light", "--weights", "none", "--image-size", "32",
    "--model-name", "vivit", "--n-frames", "4", "--num-workers", "0", "--device", "cpu",
    "--head", "linear",
]
# fmt: on


def blobs(
    n: int, width: int, num_classes: int, noise: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes that overlap, of unequal size and scale, and their labels."""
    rng, sizes = np.random.default_rng(0), np.arange(1, num_classes + 1)
    labels = rng.choice(num_classes, n, p=sizes / sizes.sum())
    centres = rng.normal(0, 1, (num_classes, width))
    features = centres[labels] + rng.normal(0, noise, (n, width))
    return features * rng.uniform(0.5, 20, width) + rng.normal(0, 5, width), labels


@pytest.mark.parametrize(("n", "width"), [(60, 8), (30, 200)])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_head_is_scikit_learns(n: int, width: int, num_classes: int) -> None:
    """Also where there are fewer clips than features and the problem is solved in their span."""
    features, labels = blobs(n, width, num_classes)
    importance = np.linspace(0.5, 1.5, n)
    strengths = [0.001, 0.1, 2.0]
    heads = fit_heads(features, labels, importance, strengths, num_classes)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    for strength, head in zip(strengths, heads, strict=True):
        expected = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000)
        expected.fit(standardised, labels, sample_weight=importance)
        weight, bias = expected.coef_, expected.intercept_
        if num_classes == 2:
            weight, bias = np.vstack([-weight, weight]) / 2, np.append(-bias, bias) / 2
        np.testing.assert_allclose(head.weight, weight, atol=2e-5)
        np.testing.assert_allclose(head.bias, bias, atol=2e-5)
        np.testing.assert_allclose(
            head.probabilities(features), expected.predict_proba(standardised), atol=1e-5
        )


def test_head_is_the_optimum() -> None:
    """The gradient of `|weight|^2 / 2 + C sum_i importance_i loss_i` is zero, by autograd."""
    features, labels = blobs(40, 100, 3)
    importance = np.linspace(0.2, 2, 40)
    (head,) = fit_heads(features, labels, importance, [0.05], 3)
    inputs = torch.from_numpy((features - head.mean) / head.deviation)
    weight, bias = (torch.tensor(v, requires_grad=True) for v in (head.weight, head.bias))
    losses = torch.nn.functional.cross_entropy(
        inputs @ weight.T + bias, torch.from_numpy(labels), reduction="none"
    )
    (weight.square().sum() / 2 + 0.05 * (torch.from_numpy(importance) * losses).sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def test_constant_features_stay_constant() -> None:
    """Rounding errors of a constant feature are not scaled up to deviation 1."""
    features, labels = blobs(30, 4, 2)
    noise = np.random.default_rng(0).normal(0, 1e-7, (30, 1))
    (head,) = fit_heads(np.hstack([features, noise]), labels, np.ones(30), [1.0], 2)
    assert head.deviation[-1] == 1
    assert abs(head.weight[:, -1]).max() < 1e-5


def test_strength_is_the_best_of_the_inner_folds() -> None:
    """Against scikit-learn, fold by fold."""
    features, labels = blobs(60, 90, 3, noise=8)
    folds = np.arange(60) % 3
    config = TrainConfig(sampler_tau=1.0)
    fitted = choose_and_fit(features, labels, folds, config, 3)
    losses = []
    for strength in STRENGTHS:
        out_of_fold = np.zeros((60, 3))
        for fold in range(3):
            train, held_out = folds != fold, folds == fold
            mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
            model = LogisticRegression(
                C=strength, class_weight="balanced", tol=1e-9, max_iter=100_000
            )
            model.fit((features[train] - mean) / deviation, labels[train])
            held = (features[held_out] - mean) / deviation
            out_of_fold[held_out] = model.predict_proba(held)
        balance = 60 / 3 / np.bincount(labels)[labels]
        losses.append(-(balance * np.log(out_of_fold[np.arange(60), labels])).sum())
        if strength == fitted.strength:
            np.testing.assert_allclose(fitted.probabilities, out_of_fold, atol=1e-4)
    assert STRENGTHS.index(fitted.strength) == int(np.argmin(losses))
    assert 0 < np.argmin(losses) < len(STRENGTHS) - 1  # otherwise this shows little
    (whole,) = fit_heads(features, labels, clip_importance(labels, 3, config), [fitted.strength], 3)
    np.testing.assert_allclose(fitted.head.weight, whole.weight, atol=1e-5)
    assert fitted.evaluated.all()


def test_clips_of_a_class_that_one_fold_has_alone_are_not_evaluated() -> None:
    features, labels = blobs(40, 5, 2)
    labels[:4] = 2
    folds = np.where(labels == 2, 0, np.arange(40) % 2)
    fitted = choose_and_fit(features, labels, folds, TrainConfig(), 3)
    assert fitted.evaluated.tolist() == [False] * 4 + [True] * 36
    assert np.isfinite(fitted.head.bias).all()  # the head itself has seen them


def test_importance_of_clips() -> None:
    labels = np.array([0, 0, 0, 0, 1])
    assert clip_importance(labels, 2, TrainConfig(sampler_tau=0)).tolist() == [1] * 5
    # count^-1: 1/4 and 1, whose mean over the clips is 2/5
    balanced = clip_importance(labels, 2, TrainConfig(sampler_tau=1))
    assert balanced == pytest.approx([0.625] * 4 + [2.5])
    # count^-1/2: 1/2 and 1, with mean 3/5
    assert clip_importance(labels, 2, TrainConfig()) == pytest.approx([5 / 6] * 4 + [5 / 3])
    weighted = TrainConfig(sampler_tau=0, class_weights="inverse")
    assert clip_importance(labels, 2, weighted) == pytest.approx(balanced)


def rows(*groups: str, kind: str = "patient") -> list[ClipRow]:
    return [ClipRow(Path(f"{i}.mp4"), i % 2, **{kind: g}) for i, g in enumerate(groups)]


def test_inner_folds_do_not_divide_patients() -> None:
    names = [f"p{i}" for i in np.random.default_rng(0).integers(0, 9, 60)]
    folds, kind = inner_folds(rows(*names), seed=0)
    assert kind == "patient"
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    assert all(len(set(folds[np.array(names) == name])) == 1 for name in names)
    assert len(set(inner_folds(rows(*"aabbcc"), seed=0)[0])) == 3


def test_a_few_unknown_patients_do_not_divide_the_others() -> None:
    some = rows(*"aaaabbbbccccdddd")
    unknown = [ClipRow(Path(f"u{i}.mp4"), i % 2, None, "v") for i in range(4)]
    folds, kind = inner_folds([*some, *unknown], seed=0)
    assert kind == "patient"
    assert all(len(set(folds[start : start + 4])) == 1 for start in range(0, 20, 4))


def test_inner_folds_of_unknown_patients() -> None:
    videos, kind = inner_folds(rows(*"aabbcc", kind="video"), seed=0)
    assert kind == "video"
    assert videos.reshape(3, 2).std(axis=1).tolist() == [0, 0, 0]
    one_patient = [ClipRow(Path(f"{i}.mp4"), i % 2, "p", str(i // 4)) for i in range(8)]
    folds, kind = inner_folds(one_patient, seed=0)
    assert kind == "video"
    assert len(set(folds[:4])) == len(set(folds[4:])) == 1
    nothing = [ClipRow(Path(f"{i}.mp4"), i % 2) for i in range(12)]
    folds, kind = inner_folds(nothing, seed=0)
    assert (len(set(folds)), kind) == (5, "path")
    with pytest.raises(UserError, match="no class has two clips"):
        inner_folds(nothing[:2], seed=0)


def test_inner_folds_of_classes_of_one_patient_each() -> None:
    """Folds of whole patients could evaluate the clips of one class in four alone."""
    patients = ["p0", "p0x", "p1", "p2", "p3"]
    confounded = [ClipRow(Path(f"{i}.mp4"), max(0, i % 5 - 1), patients[i % 5]) for i in range(40)]
    folds, kind = inner_folds(confounded, seed=0)
    assert kind == "path"
    assert len(set(folds)) == 5


def test_unseen_classes_leave_the_temperature_alone() -> None:
    """A class that the other folds lack gets a small probability, not zero."""
    features, labels = blobs(60, 10, 3, noise=4)
    folds = np.arange(60) % 3
    plain = choose_and_fit(features, labels, folds, TrainConfig(), 3)
    # One clip more in fold 0, of a class of its own.
    more = np.vstack([features, features[:1]])
    fitted = choose_and_fit(more, np.append(labels, 3), np.append(folds, 0), TrainConfig(), 4)
    assert fitted.evaluated.tolist() == [True] * 60 + [False]
    assert fitted.strength == plain.strength
    mine, prior = fitted.probabilities[:60:3], 1 / (40 + 4)
    np.testing.assert_allclose(mine[:, 3], prior / (1 + prior))
    np.testing.assert_allclose(mine[:, :3], plain.probabilities[::3] / (1 + prior), atol=1e-5)
    zero = np.column_stack([plain.probabilities[::3], np.zeros(20)])
    expected, found, spoilt = (
        calibrate(labels[::3], probabilities, 0.1).temperature
        for probabilities in (plain.probabilities[::3], mine, zero)
    )
    assert abs(np.log(found / expected)) < 0.2 * abs(np.log(spoilt / expected))


SIZE = {"n_frames": 4, "image_size": 32}
MODELS = {
    "tsm_resnet": {},
    "r2plus1d": {},
    "vivit": SIZE,
    "timesformer": SIZE,
    "video_swin": {},
    "mvit": SIZE,
    "cnnlstm": {"lstm_layers": 0},
    "statistics": {"lstm_layers": 0, "temporal_pooling": "statistics"},
    "root_statistics": {"lstm_layers": 0, "temporal_pooling": "root_statistics"},
}


@pytest.mark.parametrize("name", MODELS)
def test_model_gives_the_logits_of_its_head(name: str) -> None:
    """The standardisation is folded into the model, whatever it does before its last layer."""
    torch.manual_seed(0)
    is_statistics = name.endswith("statistics")
    model = make_model("cnnlstm" if is_statistics else name, 3, **MODELS[name]).eval()
    x = clips(5, 4, 3, 32, 32)
    with torch.inference_mode(), recorded_features(model) as newest:
        if is_statistics:
            eps = torch.tensor(model.standardise.eps)
            model.standardise.set_statistics(torch.tensor(0.0), 1 - eps)
        model(x)
        features = per_clip(newest[0], 5).numpy()
    rng = np.random.default_rng(1)
    width = features.shape[1]
    deviation = features.std(axis=0) + 1e-3
    head = LinearHead(
        features.mean(axis=0), deviation, rng.normal(0, 0.1, (3, width)), rng.normal(0, 1, 3)
    )
    head.write_into(model)
    with torch.inference_mode():
        logits = model(x).double().numpy()
    expected = (features - head.mean) / head.deviation @ head.weight.T + head.bias
    np.testing.assert_allclose(logits, expected, atol=2e-3)


@pytest.fixture(scope="module")
def fitted(tiny_data: Path, tmp_path_factory) -> tuple[Path, str]:
    """A run with a linear head on the features of a random ViViT, and what it printed."""
    folder = tmp_path_factory.mktemp("linear")
    process = start_script("train.py", "--data-root", str(tiny_data), *FLAGS, cwd=folder)
    process.join()
    output = (folder / "out.txt").read_text()
    assert process.exitcode == 0, output
    return only_run(folder), output


def test_run_is_fitted_to_training_and_validation_clips(fitted, tiny_data: Path) -> None:
    run, output = fitted
    state = load_checkpoint(run)
    assert state["class_counts"] == [9, 9, 9]  # 6 + 3
    assert "logistic regression on 27 clips" in output
    assert "random weights" in output
    results = json.loads((run / "test_metrics.json").read_text())
    assert results["clips"] == 9
    assert any("random weights" in warning["text"] for warning in results["warnings"])
    assert len(state["calibration"]["confidence"]) == 27  # out of the inner folds
    assert len(state["novelty"]["distances"]) == 27
    (row,) = pd.read_csv(run / "metrics.csv").to_dict("records")
    assert row["val_accuracy"] == pytest.approx(np.mean(state["calibration"]["correct"]))
    # All else is as it was: that of the seed.
    torch.manual_seed(0)
    names = state["model"].keys()
    random = train.build_model(tiny_config(tiny_data), 3).state_dict()
    changed = {name for name in names if not torch.equal(state["model"][name], random[name])}
    assert changed == {"head.1.weight", "head.1.bias"}


def test_its_checkpoint_is_like_any_other(fitted, run_main, tiny_data: Path) -> None:
    """evaluate.py and predict.py give the probabilities of the run's own test."""
    run, _ = fitted
    own = pd.read_csv(run / "predictions.csv").set_index("path")
    columns = [f"p_{name}" for name in ("dark", "grey", "light")]
    run_main(evaluate.main, run, "--num-workers", 0, "--device", "cpu", cwd=run.parent)
    again = pd.read_csv(run / "evaluate_test" / "predictions.csv").set_index("path")
    np.testing.assert_allclose(again.loc[own.index, columns], own[columns], atol=1e-5)
    flags = "--device", "cpu", "--num-workers", 0, "--clips", "answers.csv"
    run_main(predict.main, run, tiny_data / "clips/test", *flags, cwd=run.parent)
    answers = pd.read_csv(run.parent / "answers.csv")
    assert len(answers) == 9
    done = run_main(
        evaluate.main, run, "--split", "val", "--num-workers", 0, "--device", "cpu", cwd=run.parent
    )
    assert "the head was fitted to the val clips too" in done.stdout


def test_finished_run_resumes_to_the_same(fitted, run_main) -> None:
    run, _ = fitted
    before = load_checkpoint(run)["model"]
    done = run_main(train.main, "--resume", run, cwd=run.parent.parent)
    assert "logistic regression on 27 clips" in done.stdout
    after = load_checkpoint(run)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_killed_run_resumes_to_the_same(fitted, tiny_data: Path, tmp_path: Path, run_main) -> None:
    run, _ = fitted
    process = start_script("train.py", "--data-root", str(tiny_data), *FLAGS, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/last.pt")), process)
    process.kill()
    process.join()
    killed = only_run(tmp_path)
    run_main(train.main, "--resume", killed, cwd=tmp_path)
    assert (killed / "predictions.csv").read_text() == (run / "predictions.csv").read_text()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 7),
        ("loss", "focal"),
        ("mixup_alpha", 0.2),
        ("dropout", 0.5),
        ("rotation", 3.0),
        ("learning_rate", 0.003),
        ("monitor", "last"),
        ("freeze_until", "embedding"),
    ],
)
def test_settings_without_effect_are_refused(tiny_data: Path, setting: str, value) -> None:
    with pytest.raises(UserError, match=f"{setting} has no effect with head linear"):
        tiny_config(tiny_data, head="linear", **{setting: value})


def test_resolved_config_stays_valid(tiny_data: Path) -> None:
    config = tiny_config(tiny_data, head="linear")
    assert resolve(config) == config


def test_random_lstm_is_refused(tiny_data: Path, tmp_path: Path, mistake) -> None:
    flags = ["--data-root", tiny_data, "--model-name", "cnnlstm", "--head", "linear"]
    flags += ["--backbone", "efficientnet_lite0", "--image-size", 32, "--n-frames", 2]
    text = mistake(train.main, *flags, "--num-workers", 0, cwd=tmp_path).stderr
    assert "head linear: lstm would keep its random weights: give --lstm-layers 0" in text
    assert not (tmp_path / "runs").exists()


def test_class_that_only_validation_has(tmp_path: Path, tiny_data: Path) -> None:
    """It counts as trained on, because the head is fitted to it."""
    for name in ("train", "val", "test"):
        table = pd.read_csv(tiny_data / f"{name}.csv")
        table = table[table["label"] != "light"] if name == "train" else table
        table["path"] = [str(tiny_data / "clips" / path) for path in table["path"]]
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    manifests = {name: tmp_path / f"{name}.csv" for name in ("train", "val", "test")}
    classes = ("dark", "grey", "light")
    with pytest.raises(UserError, match="classes with no training clip"):
        read_splits(manifests, tmp_path, classes)
    assert len(read_splits(manifests, tmp_path, classes, None, ("train", "val"))["val"]) == 9
    assert tiny_config(tmp_path, head="linear", classes=None).classes == classes


def test_two_folds_train_on_the_other_half(tiny_data: Path, tmp_path: Path, run_main) -> None:
    parts = [pd.read_csv(tiny_data / f"{name}.csv") for name in ("train", "val", "test")]
    pd.concat(parts).to_csv(tmp_path / "all.csv", index=False)
    split(SplitConfig(str(tmp_path / "all.csv"), str(tmp_path / "folds"), folds=2))
    flags = ["--folds", tmp_path / "folds", "--data-root", tiny_data, *FLAGS]
    run_main(cross_validate.main, *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    predictions = pd.read_csv(run / "predictions.csv")
    assert len(predictions) == 36
    assert predictions["path"].is_unique
    for fold in ("fold1", "fold2"):
        tables = [pd.read_csv(tmp_path / f"folds/{fold}/{name}.csv") for name in ("train", "val")]
        state = load_checkpoint(run / fold)
        assert (
            sum(state["class_counts"])
            == sum(map(len, tables))
            == 36 - sum(predictions["fold"] == fold)
        )
        patients = set(pd.concat(tables)["patient"])
        assert not patients & set(predictions.loc[predictions["fold"] == fold, "patient"])
        assert rebuild_model(state).training is False


def test_recipe_gives_defaults_that_flags_overrule(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*arguments: str) -> TrainConfig:
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        return train.read_settings()[0]

    config = settings("--recipe", "laptop", "--image-size", "96", "--lstm-layers", "2")
    expected = {**RECIPES["laptop"], "image_size": 96, "lstm_layers": 2}
    assert config == TrainConfig(**expected)
    assert settings("--recipe=laptop") == TrainConfig(**RECIPES["laptop"])
    # A value that is the field's default is a choice too.
    assert settings("--model-name", "tsm_resnet", "--recipe", "laptop").model_name == "tsm_resnet"
    for wrong in (["--recipe", "desktop"], ["--recipe"]):
        with pytest.raises(UserError, match="choose from laptop"):
            settings(*wrong)
