"""Training reads values of the device once per 16 batches, so that a GPU seldom waits for the host.

The device is `meta`, which computes nothing: what the host would read, copy without waiting, or mix
up with tensors of the CPU is counted by a dispatch mode.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_model, make_state
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from clips.manifest import ClipRow
from clips.transforms import ClipAugment, _color_matrices
from config import TrainConfig
from dataset import collate
from training import engine
from training.checks import resolve
from training.engine import WaitClock, evaluate, train_one_epoch
from training.loaders import TrainSampler
from training.losses import Criterion
from utils.errors import UserError
from utils.interrupt import Interrupted

META = torch.device("meta")

# Operators whose result has a size, or an error, that the host must know.
READERS = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "_linalg_check_errors",
    "is_nonzero",
)


class Traffic(TorchDispatchMode):
    """Counts by name what crosses between CPU and device; what is read from there is `value`."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.value = value

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim()}  # a number may come from anywhere
        on_device = any(x.is_meta for x in tensors)
        if name == "_local_scalar_dense" and on_device:
            self.counts["read"] += 1
            return self.value
        if name in ("_to_copy", "to") and "device" in kwargs:  # "to" in inference mode
            target = torch.device(kwargs["device"]).type
            if on_device and target == "cpu":
                self.counts["read"] += 1
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, self.value, dtype=dtype)
            if not on_device and target == "meta" and not kwargs.get("non_blocking"):
                self.counts["blocking copy"] += 1
        elif name == "copy_" and len({x.device.type for x in tensors}) > 1:
            self.counts["blocking copy" if args[0].is_meta else "read"] += 1
        elif name in ("index", "index_put", "index_put_") and _is_boolean(args[1]):
            self.counts["boolean index"] += 1
        elif name in READERS and on_device:
            self.counts[name] += 1
        elif len(devices) > 1:
            self.counts[f"{name} of {' and '.join(sorted(devices))}"] += 1
        return function(*args, **kwargs)


def _is_boolean(indices: list[torch.Tensor | None]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


class HostData(TorchFunctionMode):
    """Counts tensors that are made on the device from Python's numbers, which are copied there."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.is_meta:
            self.counts["blocking copy"] += 1
        return result


class Clips(Dataset):
    """Clips in memory, with augmentation on the device, as on a GPU."""

    def __init__(self, count: int, n_frames: int, size: int, channels: int = 3) -> None:
        self.rows = [ClipRow(f"{i}.mp4", i % 3) for i in range(count)]
        self.clip = torch.zeros(n_frames, channels, size, size, dtype=torch.uint8)
        self.transform = ClipAugment(size)
        self.num_views = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> tuple[int, tuple]:
        number = index[0] if isinstance(index, tuple) else index
        item = self.clip, self.rows[number].label
        params = (self.transform.sample_params(),) if isinstance(index, tuple) else ()
        return number, (*item, *params)


def config_of(**settings: Any) -> TrainConfig:
    common = {"data_root": ".", "classes": ("a", "b", "c"), "weights": "none", "device": "cpu"}
    small = {"n_frames": 4, "image_size": 32, "batch_size": 2, "num_workers": 0}
    return resolve(TrainConfig(**common, precision="fp32", **{**small, **settings}))


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Train a model for an epoch on the meta device; returns the traffic."""
    monkeypatch.setattr(engine, "autocast", lambda *_: contextlib.nullcontext())
    _color_matrices(META, torch.float32)  # they stay on the device

    def train(batches: int, interrupt: Any = None, value: float = 1.0, **settings: Any) -> Traffic:
        config = config_of(**settings)
        options = {"n_frames": config.n_frames, "image_size": config.image_size}
        if config.model_name in ("tsm_resnet", "cnnlstm"):
            options = {"modality": config.modality}
        with META:
            model = make_model(config.model_name, 3, **options)
        clips = Clips(batches * config.batch_size, config.n_frames, config.image_size,
                      3 if config.modality == "rgb" else 5)  # fmt: skip
        sampler = TrainSampler([row.label for row in clips.rows], 0, 0)
        loader = DataLoader(clips, config.batch_size, sampler=sampler, collate_fn=collate)
        with pytest.MonkeyPatch.context() as patch:  # there is no fused AdamW for this device
            patch.setattr(
                "torch.optim.AdamW", lambda groups, lr, fused: torch.optim.SGD(groups, lr)
            )
            state = make_state(config, model, batches, [2, 3, 4])
        criterion = Criterion(config, [2, 3, 4], META)
        parts = model, criterion, state.optimizer, state.scheduler, state.scaler, loader, META
        with Traffic(value) as traffic, HostData(traffic.counts):
            train_one_epoch(*parts, config, state.progress, state.ema, interrupt=interrupt)
        return traffic

    return train


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        {"loss": "focal", "class_weights": "inverse", "ema_decay": 0.9},
        {"loss": "ldam", "dropout": 0.1, "drop_path": 0.1, "gradient_accumulation_steps": 2},
    ],
)
def test_the_host_reads_once_per_16_batches(
    settings: dict, on_meta: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model_name": "vivit", **settings}
    assert engine._CHECK_EVERY == 16
    monkeypatch.setattr(engine, "_CHECK_EVERY", 3)
    # At every third batch and at the last one, and once for the sums at the end.
    assert {n: on_meta(n, **settings).counts for n in (2, 7)} == {2: {"read": 2}, 7: {"read": 4}}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tsm_resnet", {"modality": "rgb+mv"}),
        ("cnnlstm", {}),
        ("r2plus1d", {"n_frames": 4}),
        ("timesformer", {}),
        ("video_swin", {"n_frames": 4, "image_size": 64}),
        ("mvit", {"n_frames": 4, "image_size": 64}),
    ],
)
def test_no_model_reads_or_mixes_devices(name: str, settings: dict, on_meta: Callable) -> None:
    settings = {"n_frames": 2, **settings}
    assert on_meta(1, model_name=name, **settings).counts == {"read": 2}


def test_what_costs_a_wait_is_counted() -> None:
    x = torch.zeros(3, device=META)
    with Traffic() as traffic, HostData(traffic.counts):
        x.sum().item(), float(x[0]), bool(x[0] > 0), x.tolist(), x.cpu()
        x.new_tensor(1.0), torch.tensor([1.0], device=META)
        x.copy_(torch.ones(3)), torch.ones(3).to(META)
        torch.ones(3).to(META, non_blocking=True)
        with contextlib.suppress(NotImplementedError, RuntimeError):
            x[x > 0]
    assert traffic.counts["read"] == 5
    assert traffic.counts["blocking copy"] == 4
    assert traffic.counts["boolean index"] == 1


class StopWhere:
    """An Interrupt that stops at the third step, or while the third batch is waited for."""

    def __init__(self, waiting: bool) -> None:
        self.left, self.waiting = 3, waiting

    @contextlib.contextmanager
    def raised(self) -> Any:
        self._count(self.waiting)
        yield

    def check(self) -> None:
        self._count(not self.waiting)

    def _count(self, counts: bool) -> None:
        self.left -= counts
        if counts and not self.left:
            raise Interrupted


@pytest.mark.parametrize("waiting", [False, True])
def test_losses_are_checked_before_an_interrupted_run_is_saved(
    waiting: bool, on_meta: Callable
) -> None:
    """Also where the next check would have been at batch 16."""
    settings = {"model_name": "vivit", "interrupt": StopWhere(waiting)}
    with pytest.raises(Interrupted):
        on_meta(20, **settings)
    settings["interrupt"] = StopWhere(waiting)
    with pytest.raises(UserError, match="the loss became nan in epoch 1, batch"):
        on_meta(20, **settings, value=math.nan)


def test_evaluation_reads_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("vivit", 3, n_frames=4, image_size=32).to(META)
    monkeypatch.setattr(engine, "prepare_for_inference", lambda model, *_: model.eval())
    order: list[str] = []

    class Log(Traffic):
        def __torch_dispatch__(self, function: Any, *more: Any) -> Any:
            before = self.counts["read"]
            result = super().__torch_dispatch__(function, *more)
            order.extend(["read"] * (self.counts["read"] - before))
            return result

    class Logged(Clips):
        def __getitem__(self, index: int) -> tuple:
            order.append("clip")
            return super().__getitem__(index)

    with Log():
        predictions = evaluate(model, DataLoader(Logged(6, 4, 32), 2, collate_fn=collate), META)
    assert order == ["clip"] * 6 + ["read"] * 3
    assert len(predictions.rows) == 6


class Event:
    """A CUDA event that happens when the stand-in for a GPU comes to it."""

    gpu = 0.0
    """milliseconds for which the GPU has worked or waited"""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        Event.gpu = max(Event.gpu, stream())  # at once, unless earlier work is still queued
        self.time = Event.gpu

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return later.time - self.time


def test_a_gpu_that_is_still_busy_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come at 0, 10, 20, 500 ms, and take 100 ms of the GPU each."""
    host = 0.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: lambda: host)
    monkeypatch.setattr(Event, "gpu", 0.0)

    def batches() -> Any:
        nonlocal host
        for time in (0.0, 10.0, 20.0, 500.0):
            host = time
            yield time

    clock = WaitClock(torch.device("cuda", 1))
    for _ in clock.watch(batches()):
        Event.gpu += 100
    assert clock.seconds() == pytest.approx(0.200)  # from 300 to 500 ms
    assert clock.seconds() == 0
