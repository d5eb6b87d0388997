"""The average of the weights: its formula, what it leaves alone, when it stands still."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from config import TrainConfig
from models import build_model, freeze
from training.checks import resolve
from training.engine import train_one_epoch
from training.loaders import build_dataloaders
from training.optim import WeightAverage
from training.state import Training
from utils.interrupt import Interrupt
from video.container import ClipError


@pytest.mark.parametrize(
    ("decay", "wanted"), [(0.99, (4.5, 9.0, 17.25)), (0.15, (4.5, 9.175, 18.37625))]
)
def test_three_steps_by_hand(decay: float, wanted: tuple[float, ...]) -> None:
    """Decays 1/10, 2/11 and 3/12, or 0.15 from the second on; the weight goes 0, 5, 10, 20."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay)
    for weight, mean in zip((5, 10, 20), wanted, strict=True):
        nn.init.constant_(model.weight, weight)
        average.update(model)
        assert average.model.weight.item() == pytest.approx(mean)
        assert model.weight.item() == weight


def test_statistics_are_averaged_counters_copied_and_frozen_weights_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    average = WeightAverage(model, 0.9)
    mean, variance = torch.zeros(4), torch.ones(4)
    for step in range(3):
        model(torch.randn(8, 3) * 5)
        average.update(model)
        decay = (1 + step) / (10 + step)
        mean = decay * mean + (1 - decay) * model[1].running_mean
        variance = decay * variance + (1 - decay) * model[1].running_var
    assert torch.allclose(average.model[1].running_mean, mean)
    assert torch.allclose(average.model[1].running_var, variance)
    assert average.model[1].num_batches_tracked == 3
    assert torch.equal(average.model[0].weight, model[0].weight)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def training(tiny_data: Path, model: str = "vivit", **changes: object) -> tuple[Training, object]:
    """Three batches an epoch, at a learning rate that moves the weights."""
    settings = {"data_root": str(tiny_data), "classes": ("dark", "grey", "light")}
    settings |= {"image_size": 32, "n_frames": 4, "batch_size": 6, "workers": 0, "weights": "none"}
    settings |= {"amp": "fp32", "device": "cpu", "model": model, "learning_rate": 1e-2}
    config = resolve(TrainConfig(**{**settings, "warmup_epochs": 0, **changes}))
    loader = build_dataloaders(config)[0]
    torch.manual_seed(1)
    options = {"n_frames": 4, "image_size": 32} if model == "vivit" else {}
    built = build_model(model, 3, **options)
    if config.freeze_to:
        freeze(built, config.freeze_to)
    return Training(config, built, torch.device("cpu"), 3), loader


def test_every_step_of_an_epoch_is_averaged(tiny_data: Path) -> None:
    run, loader = training(tiny_data, "tsm", ema=0.2, freeze_to="layer1")
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    wanted = {name: value.double() for name, value in start.items()}
    decays = iter([0.1, 2 / 11, 0.2])

    def stepped(*_: object) -> None:
        decay = next(decays)
        for name, value in run.model.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value

    run.optimizer.register_step_post_hook(stepped)
    train_one_epoch(run, run.model, loader, Interrupt())
    assert run.average.steps == 3
    frozen = ("backbone.conv1", "backbone.bn1", "backbone.layer1")
    for name, mean in run.tested.state_dict().items():
        if mean.is_floating_point():
            assert torch.allclose(mean.double(), wanted[name], atol=1e-6), name
        assert torch.equal(mean, start[name]) == name.startswith(frozen), name


def test_the_average_leaves_the_training_alone(tiny_data: Path) -> None:
    averaged, loader = training(tiny_data, ema=0.9)
    train_one_epoch(averaged, averaged.model, loader, Interrupt())
    plain, loader = training(tiny_data)
    train_one_epoch(plain, plain.model, loader, Interrupt())
    one, two = averaged.state(), plain.state()
    assert plain.tested is plain.model
    assert set(one) - set(two) == {"trained", "averaged_steps"}
    for name, value in two["model"].items():
        assert torch.equal(one["trained"][name], value), name
    assert any(not torch.equal(mean, one["trained"][name]) for name, mean in one["model"].items())


def test_a_step_that_was_left_out_does_not_move_the_average(tiny_data: Path, monkeypatch) -> None:
    run, loader = training(tiny_data, ema=0.9)
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    for parameter in run.average.model.parameters():
        parameter.add_(1)  # so that an update would show although the weights stay
    run.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # overflows, as fp16 does
    train_one_epoch(run, run.model, loader, Interrupt())
    assert run.scaler.get_scale() < 3e38 / 4

    def unreadable(path: Path, *_: object) -> None:
        raise ClipError(path, "broken")

    monkeypatch.setattr("dataset.read_clip", unreadable)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.step = 0
    train_one_epoch(run, run.model, loader, Interrupt())
    assert run.unreadable
    assert run.average.steps == 0
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, start[name]), name
    for name, mean in run.average.model.named_parameters():
        assert torch.equal(mean, start[name] + 1), name


def _process(rank: int, folder: Path) -> None:
    """One of two processes whose weights differ, laid out as convolutions are."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    average = WeightAverage(model, 0.9)
    model(torch.rand(2, 3, 8, 8))
    average.update(model)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    average.agree()
    torch.save((before, average.model.state_dict()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_on_the_first_ones_average(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_process, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first[0].items():
        assert torch.equal(first[1][name], value)
        assert torch.equal(second[1][name], value)
    assert not torch.equal(second[0]["0.weight"], second[1]["0.weight"])
    assert not torch.equal(second[0]["1.running_mean"], second[1]["1.running_mean"])
