"""The sampler's mathematics, and loaders that neither leave out nor repeat clips."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, tiny_config

from dataset import collate, collate_by_value
from train import train
from training.loaders import TrainSampler, build_dataloaders

LABELS = [0] * 60 + [1] * 30 + [2] * 10


def drawn(sampler: TrainSampler, epochs: int) -> list[int]:
    labels = []
    for sampler.epoch in range(epochs):
        labels += [LABELS[index] for index, _ in sampler]
    return labels


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_classes_are_drawn_in_proportion_to_count_to_the_1_minus_tau(tau: float) -> None:
    epochs = 400
    counts = Counter(drawn(TrainSampler(LABELS, tau, seed=0), epochs))
    wanted = np.array([60, 30, 10]) ** (1 - tau)
    wanted /= wanted.sum()
    fraction = np.array([counts[label] for label in range(3)]) / (epochs * len(LABELS))
    error = np.sqrt(wanted * (1 - wanted) / (epochs * len(LABELS)))  # of a binomial fraction
    assert (np.abs(fraction - wanted) < 4 * error).all()


def test_tau_zero_is_plain_shuffling() -> None:
    sampler = TrainSampler(LABELS, 0, seed=0)
    first = [index for index, _ in sampler]
    sampler.epoch = 1
    second = [index for index, _ in sampler]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second != list(range(100))


def test_samples_depend_on_seed_and_epoch_alone() -> None:
    one, two, other = (
        TrainSampler(LABELS, 1, 3),
        TrainSampler(LABELS, 1, 3),
        TrainSampler(LABELS, 1, 4),
    )
    torch.rand(7)
    assert list(one) == list(two)
    assert list(one) != list(other)
    seeds = [seed for _, seed in one]
    assert len(set(seeds)) == len(seeds)  # a clip drawn twice is augmented in two ways


@pytest.mark.parametrize("tau", [0, 1])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_the_batches_of_one(tau: float, world: int) -> None:
    batch = 6 // world
    one = list(TrainSampler(LABELS, tau, 5))
    parts = [list(TrainSampler(LABELS, tau, 5, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    for step in range(len(LABELS) // 6):
        together = {pair for part in parts for pair in part[step * batch : (step + 1) * batch]}
        assert together == set(one[step * 6 : (step + 1) * 6])
    assert TrainSampler(LABELS, tau, 5, 0, world).clips_per_epoch == len(parts[0])


def test_start_continues_in_the_middle() -> None:
    whole = list(TrainSampler(LABELS, 1, 0))
    sampler = TrainSampler(LABELS, 1, 0)
    sampler.start = 42
    assert list(sampler) == whole[42:]
    assert len(sampler) == 58
    assert sampler.clips_per_epoch == 100


def test_build_dataloaders(tiny_data: Path) -> None:
    train, val, test, num_classes = build_dataloaders(tiny_config(tiny_data, batch_size=4))
    assert num_classes == 3
    assert sum(len(batch.labels) for batch in train) == 18
    for loader in (val, test):
        batches = list(loader)
        assert [i for batch in batches for i in batch.indices] == list(range(9))
        assert [len(batch.labels) for batch in batches] == [4, 4, 1]
        assert batches[0].clips.shape == (4, 4, 3, 32, 32)
        rows = loader.dataset.rows
        labels = torch.cat([batch.labels for batch in batches]).tolist()
        assert labels == [row.label for row in rows]


def test_batches_are_the_same_whatever_the_workers(tiny_data: Path) -> None:
    one, two = (
        [batch.clips for batch in build_dataloaders(tiny_config(tiny_data, num_workers=workers))[0]]
        for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_with_little_shared_memory_the_batches_go_through_pipes(
    tiny_data: Path, monkeypatch, caplog
) -> None:
    """They are the same, and the log says so once. Two workers read two batches of 73,728 bytes
    ahead each, and one is being used."""
    usual = build_dataloaders(tiny_config(tiny_data, num_workers=2))[0]
    batches = {"enough": 5 * 6 * 4 * 3 * 32 * 32, "too little": 5 * 6 * 4 * 3 * 32 * 32 - 1}
    loaders = {}
    for name, free in batches.items():
        monkeypatch.setattr("training.loaders.shared_memory_free", lambda n=free: n)
        loaders[name] = build_dataloaders(tiny_config(tiny_data, num_workers=2))
    assert loaders["enough"][0].collate_fn is collate
    assert all(loader.collate_fn is collate_by_value for loader in loaders["too little"][:3])
    assert caplog.text.count("they take a slower way to the training process") == 1
    for one, two in zip(usual, loaders["too little"][0], strict=True):
        assert torch.equal(one.clips, two.clips)
        assert torch.equal(one.labels, two.labels)
        assert not two.clips.is_shared()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("training.loaders.shared_memory_free", lambda: batches["enough"])
    shared = build_dataloaders(tiny_config(tiny_data, num_workers=2))[0]
    assert shared.collate_fn is collate_by_value
    alone = build_dataloaders(tiny_config(tiny_data, num_workers=0))[0]
    assert alone.collate_fn is collate


def test_training_with_augmentation_on_the_device_is_the_same(
    tiny_data: Path, tmp_path: Path, monkeypatch
) -> None:
    """On a GPU the training step augments; here it does so on the CPU."""
    losses = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr("training.loaders.get_device", lambda _, d=device: torch.device(d))
        run = train(tiny_config(tiny_data, epochs=2, batch_size=4, run_dir=str(tmp_path)))
        losses.append(pd.read_csv(run / "metrics.csv")["train_loss"].to_numpy())
    assert np.allclose(*losses, rtol=0.02)
    assert losses[0].min() > 0


def test_a_program_that_fails_ends_with_its_workers(tiny_data: Path, tmp_path: Path) -> None:
    """A bug of ours must give a traceback, not a program that waits for its workers for ever."""
    (tmp_path / "broken.py").write_text(
        "import train\n"
        "def broken(*_): raise ValueError('a bug of ours')\n"
        "train.epoch_line = broken\n"
        "if __name__ == '__main__':\n"
        "    train.main()\n"
    )
    flags = ("--data-root", tiny_data, *TINY_FLAGS, "--num-workers", "2", "--epochs", "1")
    done = subprocess.run(
        [sys.executable, "broken.py", *map(str, flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "a bug of ours" in done.stderr
