"""The streaming tables; how fast things are is not tested."""

import numpy as np
import pytest
import torch

from benchmarks.streaming import INT8, STREAMED, compare_streaming, measure_live
from models import MODELS
from timeline.streaming import supports_streaming

CPU = torch.device("cpu")


def test_what_is_timed_can_be_streamed() -> None:
    assert all(supports_streaming(MODELS[name](7, **options)) for name, options in STREAMED.items())


def test_ratios_are_those_of_the_times() -> None:
    table = compare_streaming(["tsm_resnet", "cnnlstm"], 3, 32, 1, CPU, torch.float32)
    assert table["Model"].tolist() == ["tsm_resnet", "cnnlstm"]
    ratio = table["Whole window (ms/frame)"] / table["Stream (ms/frame)"]
    np.testing.assert_allclose(table["Times faster"], ratio)  # of one turn


def test_every_frame_of_the_video_is_timed() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    engines = ("torch", "openvino", INT8)
    names = ["cnnlstm", "tsm_resnet"]
    table = measure_live(names, 2, 32, 6, CPU, torch.float32, engines=engines)
    assert table["Engine"].tolist() == [*engines, *engines]
    assert table["Frames"].tolist() == [4] * 6  # without those that fill the window
    assert (table.drop(columns=["Model", "Engine"]).to_numpy(float) > 0).all()
