"""Losses against their papers' formulas, in training, and with logit adjustment in a test."""

import copy
import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    TINY_FLAGS,
    make_model,
    make_state,
    same_tensors,
    tiny_config,
    train_epoch,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader

from checkpoint import load_checkpoint, save_checkpoint
from config import TrainConfig, from_dict
from evaluate import main as evaluate_main
from train import main
from training import losses
from training.checks import resolve
from training.loaders import build_dataloaders
from training.losses import Criterion, warn_double_adjustment, warn_double_balancing
from training.state import TrainState
from utils.errors import UserError, format_warning

pytestmark = pytest.mark.usefixtures("no_figures")

COUNTS = (60, 30, 6, 4)
CLASSES = ("dark", "grey", "light")


def batch(n: int = 9, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(n, classes, generator=generator)
    return logits, torch.arange(n) % classes


def criterion(counts: tuple[int, ...] = COUNTS, **settings: object) -> Criterion:
    config = resolve(TrainConfig(epochs=10, **settings))
    return Criterion(config, counts)


def by_hand(logits: torch.Tensor, labels: torch.Tensor, one_clip) -> list[float]:
    """`one_clip(z, y)` for each clip, on plain lists."""
    return [one_clip(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]


def log_softmax(z: list[float], y: int) -> float:
    return z[y] - math.log(sum(math.exp(one) for one in z))


def smoothed(z: list[float], y: int, smoothing: float) -> float:
    """Cross entropy of a softmax with a smoothed target."""
    k = len(z)
    targets = [smoothing / k + (1 - smoothing) * (j == y) for j in range(k)]
    return -sum(target * log_softmax(z, j) for j, target in enumerate(targets))


def test_the_default_is_plain_cross_entropy() -> None:
    """The gradients are equal bit for bit, the sum up to rounding."""
    for n in (1, 5, 64):
        logits, labels = batch(n)
        logits.requires_grad_()
        plain = F.cross_entropy(logits, labels, reduction="sum")
        (expected,) = torch.autograd.grad(plain / 8, logits)
        losses = Criterion(TrainConfig())(logits, labels, 0)
        assert losses.shape == (n,)
        assert torch.equal(torch.autograd.grad(losses.sum() / 8, logits)[0], expected)
        assert losses.sum().item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_equation_4(gamma: float) -> None:
    logits, labels = batch()
    found = criterion(loss="focal", focal_gamma=gamma)(logits, labels, 0)

    def one_clip(z: list[float], y: int) -> float:
        p = math.exp(log_softmax(z, y))
        return -((1 - p) ** gamma) * math.log(p)

    assert found.tolist() == pytest.approx(by_hand(logits, labels, one_clip), rel=1e-5)


def test_focal_loss_of_certain_clips_has_a_gradient() -> None:
    for gamma in (0.0, 0.5, 1.0, 2.0):
        logits = torch.tensor([[200.0, 0, 0], [0, 200.0, 0], [9.0, 0, 0]], requires_grad=True)
        found = losses.focal_loss(logits, torch.tensor([0, 0, 0]), gamma)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found[0] == 0 and gradient[0].tolist() == [0, 0, 0]
        assert found[1].item() == pytest.approx(200) and gradient[1, :2].tolist() == [-1, 1]
        wrong = 2 / (math.exp(9) + 2)
        assert found[2].item() == pytest.approx(wrong**gamma * -math.log1p(-wrong), rel=2e-3)


def test_ldam_margins_follow_the_fourth_root() -> None:
    logits, labels = batch()
    found = criterion(loss="ldam")(logits, labels, 9)
    margins = [
        0.5 * (4 / count) ** 0.25 for count in COUNTS
    ]  # 4: the rarest class, whose margin is 0.5

    def one_clip(z: list[float], y: int) -> float:
        others = sum(math.exp(one) for j, one in enumerate(z) if j != y)
        own = math.exp(z[y] - margins[y])
        return -math.log(own / (own + others))

    assert found.tolist() == pytest.approx(by_hand(logits, labels, one_clip), rel=1e-5)
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert (found > plain).all()


@pytest.mark.parametrize(
    ("settings", "tau"),
    [
        ({"loss": "balanced_softmax"}, 1.0),
        ({"loss": "logit_adjustment"}, 1.0),
        ({"loss": "logit_adjustment", "logit_adjust_tau": 0.5}, 0.5),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_are_shifted_by_the_prior(settings: dict, tau: float, smoothing: float) -> None:
    """Balanced softmax, equation 3, is logit adjustment, equation 10, at tau = 1."""
    logits, labels = batch()
    found = criterion(**settings, label_smoothing=smoothing)(logits, labels, 0)

    def one_clip(z: list[float], y: int) -> float:
        shifted = [one + tau * math.log(n / 100) for one, n in zip(z, COUNTS, strict=True)]
        return smoothed(shifted, y, smoothing)

    assert found.tolist() == pytest.approx(by_hand(logits, labels, one_clip), rel=1e-5)


def test_balanced_softmax_is_least_at_the_balanced_posterior() -> None:
    """Where class 0 has 9 of 10 clips and p(x | 1) = 3 p(x | 0), p(1 | x) is 3/12, balanced 3/4."""
    posterior = torch.tensor([0.75, 0.25])
    labels = torch.tensor([0, 1])

    def gradient(z: torch.Tensor, **settings: object) -> torch.Tensor:
        z = z.clone().requires_grad_()
        loss = criterion((9, 1), label_smoothing=0.0, **settings)(z.expand(2, 2), labels, 0)
        return torch.autograd.grad((posterior * loss).sum(), z)[0]

    balanced, plain = torch.tensor([0.25, 0.75]).log(), posterior.log()
    for settings in ({"loss": "balanced_softmax"}, {"loss": "logit_adjustment"}):
        assert gradient(balanced, **settings).abs().max() < 1e-6
        assert gradient(plain, **settings)[1] < -0.1  # a step raises the rare class's logit
    assert gradient(plain).abs().max() < 1e-6
    # With tau = 1/2 half of the prior is removed: p(y | x) / prior^(1/2).
    half = plain - 0.5 * torch.tensor([0.9, 0.1]).log()
    assert gradient(half, loss="logit_adjustment", logit_adjust_tau=0.5).abs().max() < 1e-6


def test_class_weights_by_hand() -> None:
    inverse = losses.class_weights((1, 2, 4), "inverse")
    assert inverse.tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])
    # Effective numbers 1, 1 + 1/2 and 1 + 1/2 + 1/4 + 1/8.
    effective = losses.class_weights((1, 2, 4), "effective", 0.5)
    mean = (1 + 2 / 3 + 8 / 15) / 3
    assert effective.tolist() == pytest.approx([1 / mean, 2 / 3 / mean, 8 / 15 / mean])
    assert losses.class_weights((1, 2, 4), "effective", 0.0).tolist() == [1, 1, 1]
    near = losses.class_weights(COUNTS, "effective", 0.999999)
    assert near.tolist() == pytest.approx(
        losses.class_weights(COUNTS, "inverse").tolist(), rel=1e-4
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_class_weights_multiply_the_losses(loss: str) -> None:
    """For focal loss they are alpha, equation 5."""
    logits, labels = batch()
    plain = criterion(loss=loss)(logits, labels, 0)
    weighted = criterion(loss=loss, class_weights="inverse")(logits, labels, 0)
    weights = [1 / count for count in COUNTS]
    mean = sum(weights) / 4
    expected = [one * weights[y] / mean for one, y in zip(plain.tolist(), labels, strict=True)]
    assert weighted.tolist() == pytest.approx(expected, rel=1e-5)


def test_ldam_is_weighted_in_the_last_fifth() -> None:
    logits, labels = batch()
    for epochs, first in ((10, 8), (7, 5), (2, 1)):
        config = TrainConfig(epochs=epochs, loss="ldam", class_weights="effective")
        deferred = Criterion(config, COUNTS)
        plain = Criterion(dataclasses.replace(config, class_weights="none"), COUNTS)
        weights = losses.class_weights(COUNTS, "effective").float()[labels]
        for epoch in range(epochs):
            expected = plain(logits, labels, epoch)
            expected = expected * weights if epoch >= first else expected
            assert torch.equal(deferred(logits, labels, epoch), expected)


def test_losses_that_need_counts_are_refused_without() -> None:
    for settings in ({"loss": "ldam"}, {"class_weights": "inverse"}):
        with pytest.raises(ValueError, match="counts"):
            criterion((), **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss": "focal", "label_smoothing": 0.2}, "label_smoothing"),
        ({"loss": "ldam", "label_smoothing": 0.2}, "label_smoothing"),
        ({"focal_gamma": 1.0}, "focal_gamma"),
        ({"loss": "balanced_softmax", "logit_adjust_tau": 0.5}, "logit_adjust_tau"),
        ({"class_weights": "inverse", "class_balanced_beta": 0.9}, "class_balanced_beta"),
        ({"class_weights": "effective", "class_balanced_beta": 1.0}, "class_balanced_beta"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict, name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(TrainConfig(**settings))
    _, *problems = str(error.value).splitlines()
    assert [problem.split()[0] for problem in problems] == [name]
    resolve(TrainConfig(**settings | {name: 0}))  # 0 switches it off


def test_a_second_correction_gives_a_warning() -> None:
    def warned(**settings: object) -> bool:
        return bool(warn_double_balancing(TrainConfig(**settings)))

    for loss in ("ldam", "balanced_softmax", "logit_adjustment"):
        assert warned(loss=loss)
        assert not warned(loss=loss, sampler_tau=0)
    assert warned(class_weights="inverse") and not warned(class_weights="inverse", sampler_tau=0)
    assert warned(loss="balanced_softmax", class_weights="inverse", sampler_tau=0)
    assert not warned(loss="ldam", class_weights="effective", sampler_tau=0)
    assert not warned() and not warned(loss="focal")


def test_an_adjustment_after_another_correction_gives_a_warning() -> None:
    """After drawing clips with n^-tau, n^(1 - tau) is left to adjust for."""

    def warned(adjust: float, **settings: object) -> bool:
        return bool(warn_double_adjustment(TrainConfig(**settings), adjust))

    assert warned(1.0) and warned(0.6) and not warned(0.5) and not warned(0)
    assert not warned(1.0, sampler_tau=0) and not warned(2.0, sampler_tau=0)
    assert warned(0.1, sampler_tau=0, loss="logit_adjustment") and warned(0.1, sampler_tau=1)
    assert warned(1.0, sampler_tau=0, class_weights="inverse")


@pytest.fixture(scope="module")
def uneven(tiny_data: Path, tmp_path_factory) -> list[object]:
    """Flags for 6, 3 and 2 training clips of the three classes."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.csv"
    table = pd.read_csv(tiny_data / "train.csv")
    kept = table.groupby("label").cumcount() < table["label"].map(
        {"dark": 6, "grey": 3, "light": 2}
    )
    table[kept].to_csv(path, index=False, quoting=csv.QUOTE_MINIMAL)
    return ["--data-root", tiny_data, "--train-csv", path, *TINY_FLAGS]


def uneven_run(flags: list[object], **settings: object) -> tuple[TrainState, DataLoader]:
    """A run on these clips, without anything random, and its loader."""
    still = dict.fromkeys(("hflip_prob", "rotation", "translate", "scale"), 0.0)
    still |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    still |= {"train_csv": str(flags[3]), "sampling": "uniform", "sampler_tau": 0.0}
    config = tiny_config(flags[1], **still, **settings)
    return fresh(config), build_dataloaders(config)[0]


def fresh(config: TrainConfig) -> TrainState:
    torch.manual_seed(0)
    model = make_model("vivit", 3, n_frames=4, image_size=32)
    return make_state(config, model, 11 // config.batch_size + 1, (6, 3, 2))


def test_the_gradient_is_the_mean_of_weighted_losses(uneven: list[object]) -> None:
    """The mean is over the clips, not over their weights; one step on all clips."""
    settings = {"batch_size": 16, "max_grad_norm": 0.0, "class_weights": "inverse", "epochs": 4}
    state, loader = uneven_run(uneven, **settings)
    (all_clips,) = loader
    logits = state.model.train()(all_clips.clips)
    weights = torch.tensor([1 / 2, 1, 3 / 2])  # 1/6, 1/3 and 1/2 over their mean
    plain = F.cross_entropy(logits, all_clips.labels, reduction="none")
    expected = weights[all_clips.labels] * plain
    head = state.model.head[-1].weight
    (gradient,) = torch.autograd.grad(expected.mean(), head)
    before = head.detach().clone()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
    train_epoch(state, loader)
    assert state.progress.running_sums[0] == pytest.approx(expected.sum().item(), rel=1e-5)
    assert torch.allclose(before - head, gradient, atol=1e-6)


def test_deferred_weights_survive_a_stop(uneven: list[object]) -> None:
    """A run is stopped in the second of two epochs, the one with weights, and resumed."""

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    settings = {"batch_size": 4, "learning_rate": 1e-3, "epochs": 2, "loss": "ldam"}
    whole, loader = uneven_run(uneven, **settings, class_weights="inverse")

    def resume(saved: dict, config: TrainConfig = whole.config) -> TrainState:
        state = fresh(config)
        state.load_state_dict(copy.deepcopy(saved))  # AdamW changes the tensors that it was given
        return state

    train_epoch(whole, loader)
    whole.progress.end_epoch()
    first = copy.deepcopy(whole.state_dict())
    train_epoch(whole, loader)
    stopped = resume(first)
    with pytest.raises(Stop):
        train_epoch(stopped, loader, stop)
    resumed = resume(stopped.state_dict())
    assert (resumed.progress.epoch, resumed.progress.step) == (1, 1)
    train_epoch(resumed, loader)
    unweighted = resume(first, dataclasses.replace(whole.config, class_weights="none"))
    train_epoch(unweighted, loader)
    assert same_tensors(whole.model.state_dict(), resumed.model.state_dict())
    assert not torch.equal(unweighted.model.head[-1].weight, whole.model.head[-1].weight)


RUNS = {
    "focal": ["--sampler-tau", "0"],
    "ldam": ["--class-weights", "effective", "--sampler-tau", "0"],
    "balanced_softmax": ["--mixup-alpha", "0.5"],
    "logit_adjustment": ["--sampler-tau", "0"],
}


@pytest.fixture
def trained(uneven, tmp_path_factory, run_main) -> Callable[[str], Path]:
    """The run of a loss, which is trained at the first call."""

    def find(loss: str) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = base / "losses" / loss
        if not folder.exists():
            more = ["--loss", loss, *RUNS[loss], "--epochs", 2, "--run-dir", folder]
            run_main(main, *uneven, *more, cwd=base)
        (run,) = folder.iterdir()
        return run

    return find


@pytest.mark.parametrize("loss", RUNS)
def test_every_loss_trains(loss: str, trained) -> None:
    run = trained(loss)
    table = pd.read_csv(run / "metrics.csv")
    assert len(table) == 2 and np.isfinite(table).all(axis=None)
    for name in ("best.pt", "last.pt"):
        assert load_checkpoint(run, name)["class_counts"] == [6, 3, 2]
    config = from_dict(load_checkpoint(run)["config"])
    warnings = json.loads((run / "test_metrics.json").read_text())["warnings"]
    assert warnings == warn_double_balancing(config)
    assert bool(warnings) == (loss == "balanced_softmax")
    log = (run / "train.log").read_text()
    assert all(format_warning(warning) in log for warning in warnings)


@pytest.fixture
def run(trained) -> Path:
    """A run that corrects for no class sizes."""
    return trained("focal")


def probabilities(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "predictions.csv")[[f"p_{name}" for name in CLASSES]].to_numpy()


def test_adjusted_predictions_by_hand(run: Path, run_main, tmp_path: Path) -> None:
    """softmax((z - TAU log prior) / T), from z / T = log p of the plain predictions."""
    run_main(evaluate_main, run, "--num-workers", 0, "--logit-adjust-tau", 0.5, cwd=tmp_path)
    adjusted = run / "evaluate_test_adjusted0.5"
    results = json.loads((adjusted / "test_metrics.json").read_text())
    assert (results["logit_adjust_tau"], results["warnings"]) == (0.5, [])
    temperature = results["calibration"]["temperature"]
    assert abs(temperature - 1) > 0.01
    odds = probabilities(run) * (np.array([6, 3, 2]) / 11) ** (-0.5 / temperature)
    expected = odds / odds.sum(axis=1, keepdims=True)
    assert np.allclose(probabilities(adjusted), expected, atol=1e-6)
    # Before the temperature: softmax(z - TAU log prior).
    powers = odds**temperature
    uncalibrated = powers / powers.sum(axis=1, keepdims=True)
    truth = pd.read_csv(run / "predictions.csv")["label"].map(CLASSES.index)
    loss = -np.log(uncalibrated[np.arange(9), truth]).mean()
    assert results["calibration"]["before"]["nll"] == pytest.approx(loss, abs=1e-5)


def test_nothing_is_adjusted_by_default(run: Path, run_main, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    run_main(evaluate_main, run, "--num-workers", 0, "--output", output, cwd=tmp_path)
    assert np.array_equal(probabilities(output), probabilities(run))
    assert json.loads((output / "test_metrics.json").read_text())["logit_adjust_tau"] == 0


def test_a_run_without_class_counts_gets_them_by_resuming(
    run: Path, run_main, mistake, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(old, name)
        del state["class_counts"]
        save_checkpoint(old / name, state)
    _, stderr = mistake(
        evaluate_main, old, "--logit-adjust-tau", 1, "--num-workers", 0, cwd=tmp_path
    )
    assert len(stderr.strip().splitlines()) == 1 and str(old) in stderr
    run_main(main, "--resume", old, cwd=tmp_path)
    assert load_checkpoint(old)["class_counts"] == [6, 3, 2]
    _, stderr = mistake(evaluate_main, old, "--logit-adjust-tau", -1, cwd=tmp_path)
    assert len(stderr.strip().splitlines()) == 1
