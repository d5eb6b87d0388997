"""The score for clips that are unlike those of the training: by hand and on simulated clips."""

import numpy as np
import pytest
import torch

from evaluation.novelty import NoveltyReference, class_means, distance_to_means


def reference(*distances: float) -> NoveltyReference:
    return NoveltyReference(torch.ones(1, 1, dtype=torch.float64), distances)


def test_novelty_is_the_fraction_of_validation_clips_that_are_nearer() -> None:
    novelty = reference(0.1, 0.5, 0.3, 0.3).novelty(np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 2]))
    assert novelty.tolist() == pytest.approx([0, 0, 1 / 5, 1 / 5, 3 / 5, 3 / 5, 4 / 5])
    values = reference(0.1, 0.5, 0.3, 0.3).novelty(np.linspace(0, 2, 200))
    assert (np.diff(values) >= 0).all()


def test_few_ordinary_clips_look_novel() -> None:
    """Of clips like the validation clips at most 5 % get a novelty above 0.95, however few these
    are."""
    rng = np.random.default_rng(0)
    for count in (3, 20, 100):
        values = [reference(*rng.random(count)).novelty(rng.random(1))[0] for _ in range(4000)]
        assert np.mean(np.array(values) > 0.95) < 0.06


def test_means_and_distances_by_hand() -> None:
    features = torch.tensor([[3.0, 0, 0], [0, 5, 0], [0, 0, 2], [0, 0, 9]]).double()
    means = class_means(features, torch.tensor([4, 4, 1, 1]))  # classes without clips are left out
    half = 0.5**0.5
    assert torch.allclose(means, torch.tensor([[0, 0, 1], [half, half, 0]]).double())
    clips = torch.tensor([[[0, 0, 7.0], [2, 2, 0]], [[1, 0, 0], [0, 0, -1]]]).double()
    expected = torch.tensor([[0, 0], [1 - half, 1]]).double()  # -1 is nearer to the other mean
    assert torch.allclose(distance_to_means(clips, means), expected)


def test_a_checkpoint_holds_it() -> None:
    fitted = reference(0.25, 0.5)
    read = NoveltyReference.of_checkpoint({"novelty": fitted.state_dict()})
    assert torch.equal(read.means, fitted.means)
    assert read.distances == fitted.distances
    assert NoveltyReference.of_checkpoint({}) is None
