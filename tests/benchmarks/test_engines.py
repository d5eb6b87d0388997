"""The table of engines: every engine that is installed, timed on the same clips."""

import pytest

from benchmarks.engines import compare_engines, instruction_sets


def test_engines_are_compared_on_the_same_clips() -> None:
    for package in ("openvino", "onnxruntime", "onnxscript", "nncf"):
        pytest.importorskip(package)
    table = compare_engines([("tsm_resnet", 32)], [1, 2], 2, 2)
    engines = ["eager", "prepared", "openvino", "onnxruntime", "openvino int8"]
    assert table["engine"].tolist() == engines * 2
    assert table["batch"].tolist() == [1] * 5 + [2] * 5
    for _, rows in table.groupby("batch"):
        times = rows.set_index("engine")["ms/clip"]
        assert (times > 0).all()
        for reference in ("eager", "prepared"):
            ratios = rows.set_index("engine")[f"x {reference}"]
            assert ratios[reference] == 1
            assert ratios.to_numpy() == pytest.approx(times[reference] / times)
    differences = table["largest logit difference"].astype(float)
    is_int8 = table["engine"] == "openvino int8"
    assert differences[~is_int8].max() < 1e-4 < differences[is_int8].min()


def test_the_instructions_of_this_cpu_are_named() -> None:
    assert instruction_sets()
