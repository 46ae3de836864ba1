"""The figure of a training: title and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

figures = pytest.importorskip("matplotlib.figure")
pytest.importorskip("transformers")

from kdkernels.cli.train.summary import figure_of, name_of_loss  # noqa: E402
from kdkernels.trainer import DistillationArguments  # noqa: E402


class Axes:
    """An output folder that records the axes instead of writing the figure."""

    def write(self, name: str, save: Callable[[Any], None]) -> str:
        figure = save.__closure__[0].cell_contents  # type: ignore[index]
        figure.draw_without_rendering()
        (self.axes,) = figure.axes
        return name


def test_the_title_names_the_loss(tmp_path: Any) -> None:
    def title(**options: Any) -> str:
        return name_of_loss(DistillationArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options))

    assert title(divergence="jsd(beta=0.3)", temperature=2.0, ce_weight=0.5) == "1 x jsd(beta=0.3) at T = 2 + 0.5 x cross-entropy"
    assert title(kd_weight=0.0, ce_weight=1.0, ce_weight_last=0.25) == "1 x cross-entropy, cross-entropy ends at 0.25"


@pytest.mark.parametrize("before", [None, {"eval_loss": 2.5}])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_the_axis_has_whole_steps(steps: int, before: Any) -> None:
    output: Any = Axes()
    history = [{"step": step, "loss": 2.0 / step} for step in range(1, steps + 1)]
    assert figure_of(output, history, before, None, loss="1 x forward_kl at T = 1") == "training.png"
    assert output.axes.get_title(loc="left") == "1 x forward_kl at T = 1"
    assert all(float(tick).is_integer() for tick in output.axes.get_xticks())
