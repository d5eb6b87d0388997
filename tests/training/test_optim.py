"""The schedule, and the average of the weights: its formula, and what does not change it."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import make_model, make_state, same_tensors, tiny_config, train_epoch
from torch import nn
from torch.utils.data import DataLoader

from models import freeze
from training.loaders import build_dataloaders
from training.optim import ModelEma, cosine_with_warmup
from training.state import TrainState
from video.container import ClipError


def test_schedule_is_linear_then_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = cosine_with_warmup(optimizer, total_steps=100, warmup_steps=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.01 + 0.099 * i for i in range(10)])
    cosine = [0.5 * (1 + np.cos(np.pi * i / 90)) for i in range(90)]
    assert rates[10:] == pytest.approx(cosine, abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("decay", "wanted"), [(0.99, (4.5, 9.0, 17.25)), (0.15, (4.5, 9.175, 18.37625))]
)
def test_three_steps_by_hand(decay: float, wanted: tuple[float, ...]) -> None:
    """Decays 1/10, 2/11 and 3/12, or 0.15 from the second on; the weight goes 0, 5, 10, 20."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = ModelEma(model, decay)
    for weight, mean in zip((5, 10, 20), wanted, strict=True):
        nn.init.constant_(model.weight, weight)
        average.update(model)
        assert average.model.weight.item() == pytest.approx(mean)
        assert model.weight.item() == weight


def test_statistics_are_averaged_counters_copied_and_frozen_weights_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    average = ModelEma(model, 0.9)
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


def training(
    tiny_data: Path, name: str = "vivit", **settings: object
) -> tuple[TrainState, DataLoader]:
    """A run with three batches per epoch, at a learning rate that changes the weights."""
    more = {"model_name": name, "learning_rate": 1e-2, "warmup_epochs": 0}
    config = tiny_config(tiny_data, **more, **settings)
    loader = build_dataloaders(config)[0]
    torch.manual_seed(1)
    model = make_model(name, 3, n_frames=4, image_size=32)
    if config.freeze_until:
        freeze(model, config.freeze_until)
    return make_state(config, model), loader


def test_every_step_of_an_epoch_is_averaged(tiny_data: Path) -> None:
    state, loader = training(tiny_data, "tsm_resnet", ema_decay=0.2, freeze_until="layer1")
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    wanted = {name: value.double() for name, value in start.items()}
    decays = iter([0.1, 2 / 11, 0.2])

    def stepped(*_: object) -> None:
        decay = next(decays)
        for name, value in state.model.state_dict().items():
            wanted[name] = decay * wanted[name] + (1 - decay) * value

    state.optimizer.register_step_post_hook(stepped)
    train_epoch(state, loader)
    assert state.ema.steps == 3
    frozen = ("backbone.conv1", "backbone.bn1", "backbone.layer1")
    for name, mean in state.eval_model.state_dict().items():
        if mean.is_floating_point():
            assert torch.allclose(mean.double(), wanted[name], atol=1e-6), name
        assert torch.equal(mean, start[name]) == name.startswith(frozen), name


def test_the_average_does_not_change_the_training(tiny_data: Path) -> None:
    averaged, loader = training(tiny_data, ema_decay=0.9)
    train_epoch(averaged, loader)
    plain, loader = training(tiny_data)
    train_epoch(plain, loader)
    one, two = averaged.state_dict(), plain.state_dict()
    assert plain.eval_model is plain.model
    assert set(one) - set(two) == {"trained", "averaged_steps"}
    assert same_tensors(one["trained"], two["model"])
    assert any(not torch.equal(mean, one["trained"][name]) for name, mean in one["model"].items())


def test_a_skipped_step_does_not_change_the_average(tiny_data: Path, monkeypatch) -> None:
    state, loader = training(tiny_data, ema_decay=0.9)
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    for parameter in state.ema.model.parameters():
        parameter.add_(1)  # an update would show, although the weights stay
    state.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # overflows, as fp16 does
    train_epoch(state, loader)
    assert state.scaler.get_scale() < 3e38 / 4

    def unreadable(path: Path, *_: object) -> None:
        raise ClipError(path, "broken")

    monkeypatch.setattr("dataset.read_clip", unreadable)
    state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    state.progress.step = 0
    train_epoch(state, loader)
    assert state.progress.unreadable
    assert state.ema.steps == 0
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, start[name]), name
    for name, mean in state.ema.model.named_parameters():
        assert torch.equal(mean, start[name] + 1), name


def _process(rank: int, folder: Path) -> None:
    """One of two processes, whose weights differ and are in channels-last layout."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    average = ModelEma(model, 0.9)
    model(torch.rand(2, 3, 8, 8))
    average.update(model)
    before = {name: value.clone() for name, value in average.model.state_dict().items()}
    average.broadcast()
    torch.save((before, average.model.state_dict()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_take_over_the_average_of_the_first(tmp_path: Path) -> None:
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
