"""Whether an exported network computes what the trained model computes."""

import pytest
import torch
from torch import nn

from deployment.parity import compare, in_batches
from modeling.engines import FEATURES, LOGITS, Engine
from modeling.inference import NotFiniteError
from utils.errors import UserError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        frames = clips.float().mean(dim=(3, 4)) / 255  # (B, T, C)
        return self.head(frames.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(dim=1)


class Other(Engine):
    """The model with an error in its logits, and in its features."""

    def __init__(self, model: Model, logits: float = 0.0, features: float = 0.0) -> None:
        super().__init__()
        self.model, self.errors, self.sizes = [model], (logits, features), []

    def compute(self, inputs: dict) -> dict:
        clips = torch.from_numpy(inputs["clips"])
        self.sizes.append(len(clips))
        features = clips.float().mean(dim=(1, 3, 4)) / 255
        logits = self.model[0](clips) + self.errors[0] * torch.tensor([1.0, 0.0])
        return {LOGITS: logits.numpy(), FEATURES: (features + self.errors[1]).numpy()}


@pytest.fixture
def clips() -> list[torch.Tensor]:
    return list(torch.randint(256, (19, 4, 3, 8, 8), dtype=torch.uint8))


def test_what_agrees_is_accepted_in_batches_of_1_2_and_5(clips: list[torch.Tensor]) -> None:
    model = Model().eval()
    engine = Other(model)
    parity = compare(model, engine, in_batches(clips))
    parity.require("the file")
    assert parity.clips == 19 and max(parity.logits, parity.features) < 1e-6
    assert engine.sizes == [1, 2, 5, 1, 2, 5, 1, 2]


@pytest.mark.parametrize("errors", [(2e-4, 0.0), (0.0, 2e-2), (10.0, 0.0)])
def test_what_differs_is_refused(clips: list[torch.Tensor], errors: tuple[float, float]) -> None:
    model = Model().eval()
    parity = compare(model, Other(model, *errors), in_batches(clips))
    assert max(parity.logits, parity.features) == pytest.approx(max(map(abs, errors)), rel=0.01)
    with pytest.raises(UserError, match="does not compute what the model does: on 19 clips"):
        parity.require("the file")


def test_clips_that_get_another_class_are_counted(clips: list[torch.Tensor]) -> None:
    model = Model().eval()
    others = [compare(model, Other(model, e), in_batches(clips)).other_classes for e in (9, -9)]
    assert sum(others) == 19  # one of the two errors changes the class of each clip


def test_another_class_and_no_clip_at_all_are_refused(clips: list[torch.Tensor]) -> None:
    model = Model().eval()
    parity = compare(model, Other(model), in_batches(clips))
    for changed in (parity._replace(other_classes=1), parity._replace(clips=0)):
        with pytest.raises(UserError):
            changed.require("the file")


def test_logits_that_are_not_finite_are_refused(clips: list[torch.Tensor]) -> None:
    model = Model().eval()
    for errors in ((float("nan"), 0.0), (0.0, float("inf"))):
        with pytest.raises(NotFiniteError):
            compare(model, Other(model, *errors), in_batches(clips))
