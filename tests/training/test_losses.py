"""losses.py: each loss against its paper's formula, and what a training and a test make of it."""

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
from helpers import TINY_FLAGS
from torch.nn import functional as F

from checkpoint import load_checkpoint, save_checkpoint
from config import TrainConfig, from_dict
from evaluate import main as evaluate_main
from models import build_model
from train import main
from training import losses
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import build_dataloaders
from training.losses import Criterion, adjusted_twice, double_correction
from training.state import Training
from utils.errors import UserError
from utils.interrupt import Interrupt

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
    """`one_clip(z, y)` of each clip, on plain lists."""
    return [one_clip(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]


def log_softmax(z: list[float], y: int) -> float:
    return z[y] - math.log(sum(math.exp(one) for one in z))


def smoothed(z: list[float], y: int, share: float) -> float:
    """Cross entropy of a softmax and a target that is spread by `share`."""
    k = len(z)
    targets = [share / k + (1 - share) * (j == y) for j in range(k)]
    return -sum(target * log_softmax(z, j) for j, target in enumerate(targets))


def test_the_default_is_the_cross_entropy_of_before() -> None:
    """Gradients bit for bit; the sum but for rounding."""
    for n in (1, 5, 64):
        logits, labels = batch(n)
        logits.requires_grad_()
        before = F.cross_entropy(logits, labels, reduction="sum")
        (expected,) = torch.autograd.grad(before / 8, logits)
        now = Criterion(TrainConfig())(logits, labels, 0)
        assert now.shape == (n,)
        assert torch.equal(torch.autograd.grad(now.sum() / 8, logits)[0], expected)
        assert now.sum().item() == pytest.approx(before.item(), rel=1e-6)


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


def test_ldam_takes_margins_by_the_fourth_root() -> None:
    logits, labels = batch()
    found = criterion(loss="ldam")(logits, labels, 9)
    margins = [0.5 * (4 / count) ** 0.25 for count in COUNTS]  # 4: the rarest, whose is 0.5

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
        ({"loss": "logit_adjustment", "adjustment_tau": 0.5}, 0.5),
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
    # With tau = 1/2 the prior is taken off half: p(y | x) / prior^(1/2).
    half = plain - 0.5 * torch.tensor([0.9, 0.1]).log()
    assert gradient(half, loss="logit_adjustment", adjustment_tau=0.5).abs().max() < 1e-6


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


def test_losses_that_need_counts_say_so() -> None:
    for settings in ({"loss": "ldam"}, {"class_weights": "inverse"}):
        with pytest.raises(ValueError, match="counts"):
            criterion((), **settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss": "focal", "label_smoothing": 0.2}, "label_smoothing"),
        ({"loss": "ldam", "label_smoothing": 0.2}, "label_smoothing"),
        ({"focal_gamma": 1.0}, "focal_gamma"),
        ({"loss": "balanced_softmax", "adjustment_tau": 0.5}, "adjustment_tau"),
        ({"class_weights": "inverse", "effective_beta": 0.9}, "effective_beta"),
        ({"class_weights": "effective", "effective_beta": 1.0}, "effective_beta"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict, name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(TrainConfig(**settings))
    _, *problems = str(error.value).splitlines()
    assert [problem.split()[0] for problem in problems] == [name]
    resolve(TrainConfig(**settings | {name: 0}))  # says that it is not wanted


def test_a_second_correction_is_warned_of() -> None:
    def warned(**settings: object) -> bool:
        return bool(double_correction(TrainConfig(**settings)))

    for loss in ("ldam", "balanced_softmax", "logit_adjustment"):
        assert warned(loss=loss)
        assert not warned(loss=loss, tau=0)
    assert warned(class_weights="inverse") and not warned(class_weights="inverse", tau=0)
    assert warned(loss="balanced_softmax", class_weights="inverse", tau=0)
    assert not warned(loss="ldam", class_weights="effective", tau=0)
    assert not warned() and not warned(loss="focal")


def test_an_adjustment_on_top_is_warned_of() -> None:
    """Clips drawn with n^-tau leave n^(1 - tau) to adjust for."""

    def warned(adjust: float, **settings: object) -> bool:
        return bool(adjusted_twice(TrainConfig(**settings), adjust))

    assert warned(1.0) and warned(0.6) and not warned(0.5) and not warned(0)
    assert not warned(1.0, tau=0) and not warned(2.0, tau=0)
    assert warned(0.1, tau=0, loss="logit_adjustment") and warned(0.1, tau=1)
    assert warned(1.0, tau=0, class_weights="inverse")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr("train.plot_curves", lambda *_: None)
    monkeypatch.setattr("evaluation.results.plot_confusion", lambda *_: None)


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


def settings_of(flags: list[object]) -> dict[str, object]:
    """The same as fields of a config, without augmentation, so that clips are known."""
    still = dict.fromkeys(("flip", "rotation", "translate", "zoom"), 0.0)
    still |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    tiny = {"classes": CLASSES, "weights": "none", "image_size": 32, "n_frames": 4, "workers": 0}
    tiny |= {"amp": "fp32", "device": "cpu", "model": "vivit", "sampling": "uniform", "tau": 0.0}
    return {**still, **tiny, "data_root": str(flags[1]), "train_csv": str(flags[3])}


def fresh(config: TrainConfig) -> Training:
    torch.manual_seed(0)
    model = build_model("vivit", 3, n_frames=4, image_size=32)
    return Training(config, model, torch.device("cpu"), 11 // config.batch_size + 1, (6, 3, 2))


def test_the_gradient_is_the_mean_of_weighted_losses(uneven: list[object]) -> None:
    """Over the clips, not over their weights; one step on all clips."""
    more = {"batch_size": 16, "clip_norm": 0.0, "class_weights": "inverse", "epochs": 4}
    config = resolve(TrainConfig(**settings_of(uneven), **more))
    loader = build_dataloaders(config)[0]
    run = fresh(config)
    (all_clips,) = loader
    logits = run.model.train()(all_clips.clips)
    weights = torch.tensor([1 / 2, 1, 3 / 2])  # 1/6, 1/3 and 1/2 over their mean
    plain = F.cross_entropy(logits, all_clips.labels, reduction="none")
    expected = weights[all_clips.labels] * plain
    head = run.model.head[-1].weight
    (gradient,) = torch.autograd.grad(expected.mean(), head)
    before = head.detach().clone()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    train_one_epoch(run, run.model, loader, Interrupt())
    assert run.totals[0] == pytest.approx(expected.sum().item(), rel=1e-5)
    assert torch.allclose(before - head, gradient, atol=1e-6)


def test_deferred_weights_survive_a_stop(uneven: list[object]) -> None:
    """Stopped in the second of two epochs, which is the weighted one."""

    class Stop(Exception):
        pass

    class AfterOneStep:
        def check(self) -> None:
            raise Stop

    more = {"batch_size": 4, "learning_rate": 1e-3, "epochs": 2, "loss": "ldam"}
    config = resolve(TrainConfig(**settings_of(uneven), **more, class_weights="inverse"))

    loader = build_dataloaders(config)[0]

    def from_state(state: dict, config: TrainConfig = config) -> Training:
        run = fresh(config)
        run.load_state(copy.deepcopy(state))  # AdamW moves on the tensors it was given
        return run

    whole = fresh(config)
    train_one_epoch(whole, whole.model, loader, Interrupt())
    whole.epoch, whole.step = 1, 0
    first = copy.deepcopy(whole.state())
    train_one_epoch(whole, whole.model, loader, Interrupt())
    stopped = from_state(first)
    with pytest.raises(Stop):
        train_one_epoch(stopped, stopped.model, loader, AfterOneStep())
    resumed = from_state(stopped.state())
    assert (resumed.epoch, resumed.step) == (1, 1)
    train_one_epoch(resumed, resumed.model, loader, Interrupt())
    never = from_state(first, dataclasses.replace(config, class_weights="none"))
    train_one_epoch(never, never.model, loader, Interrupt())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert not torch.equal(never.model.head[-1].weight, whole.model.head[-1].weight)


RUNS = {
    "focal": ["--tau", "0"],
    "ldam": ["--class-weights", "effective", "--tau", "0"],
    "balanced_softmax": ["--mixup", "0.5"],
    "logit_adjustment": ["--tau", "0"],
}


@pytest.fixture
def trained(uneven, tmp_path_factory, run_main) -> Callable[[str], Path]:
    """The run of a loss, trained when it is first asked for."""

    def find(loss: str) -> Path:
        base = tmp_path_factory.getbasetemp()
        place = base / "losses" / loss
        if not place.exists():
            more = ["--loss", loss, *RUNS[loss], "--epochs", 2, "--run-dir", place]
            run_main(main, *uneven, *more, cwd=base)
        (run,) = place.iterdir()
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
    assert warnings == double_correction(config)
    assert bool(warnings) == (loss == "balanced_softmax")
    assert all(warning in (run / "train.log").read_text() for warning in warnings)


@pytest.fixture
def run(trained) -> Path:
    """A run that made up for nothing."""
    return trained("focal")


def probabilities(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "predictions.csv")[[f"p_{name}" for name in CLASSES]].to_numpy()


def test_adjusted_predictions_by_hand(run: Path, run_main, tmp_path: Path) -> None:
    """softmax((z - TAU log prior) / T), from z / T = log p of the plain predictions."""
    run_main(evaluate_main, run, "--workers", 0, "--adjust", 0.5, cwd=tmp_path)
    adjusted = run / "evaluate_test_adjust0.5"
    facts = json.loads((adjusted / "test_metrics.json").read_text())
    assert (facts["adjust"], facts["warnings"]) == (0.5, [])
    temperature = facts["calibration"]["temperature"]
    assert abs(temperature - 1) > 0.01
    odds = probabilities(run) * (np.array([6, 3, 2]) / 11) ** (-0.5 / temperature)
    expected = odds / odds.sum(axis=1, keepdims=True)
    assert np.allclose(probabilities(adjusted), expected, atol=1e-6)
    # Before the temperature: softmax(z - TAU log prior).
    powers = odds**temperature
    untempered = powers / powers.sum(axis=1, keepdims=True)
    truth = pd.read_csv(run / "predictions.csv")["label"].map(CLASSES.index)
    loss = -np.log(untempered[np.arange(9), truth]).mean()
    assert facts["calibration"]["before"]["nll"] == pytest.approx(loss, abs=1e-5)


def test_nothing_is_adjusted_unless_told(run: Path, run_main, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    run_main(evaluate_main, run, "--workers", 0, "--output", output, cwd=tmp_path)
    assert np.array_equal(probabilities(output), probabilities(run))
    assert json.loads((output / "test_metrics.json").read_text())["adjust"] == 0


def test_a_run_without_counts_gets_them_by_resuming(
    run: Path, run_main, mistake, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(old, name)
        del state["class_counts"]
        save_checkpoint(old / name, state)
    _, stderr = mistake(evaluate_main, old, "--adjust", 1, "--workers", 0, cwd=tmp_path)
    assert len(stderr.strip().splitlines()) == 1 and str(old) in stderr
    run_main(main, "--resume", old, cwd=tmp_path)
    assert load_checkpoint(old)["class_counts"] == [6, 3, 2]
    _, stderr = mistake(evaluate_main, old, "--adjust", -1, cwd=tmp_path)
    assert len(stderr.strip().splitlines()) == 1
