"""Headings and colours of charts."""

from __future__ import annotations

import pytest

from pipeline.report.figure import COLOURS, labels_width
from pipeline.report.panels import charts
from pipeline.report.plots import curve_colours, fitting, is_twin, moving_average, scientific
from pipeline.report.series import Series


def test_held_out_figures_of_one_of_several_metrics_share_its_colour() -> None:
    up = Series([1, 2], [1.0, 2.0])
    found, _ = charts(dict.fromkeys(("mean_reward", "max_reward", "eval_max_reward"), up))
    colours = curve_colours(found[0])
    assert colours == {"mean": COLOURS["s1"], "highest": COLOURS["s2"], "highest held out": COLOURS["s2"]}
    assert [is_twin(label) for label in colours] == [False, False, True]


def test_a_metric_of_its_own_and_its_held_out_figures_differ_in_colour() -> None:
    up = Series([1, 2], [1.0, 2.0])
    found, _ = charts({"loss": up, "eval_loss": up})
    assert curve_colours(found[0]) == {"training": COLOURS["s1"], "held out": COLOURS["s2"]}


def test_labels_that_do_not_fit_are_counted() -> None:
    labels = [(f"reward_function_{at}", "#000000") for at in range(6)]
    kept = fitting(labels, 3.5, "#777777")
    assert labels_width(kept) <= 3.5
    assert kept[:-1] == labels[: len(kept) - 1]
    assert kept[-1] == (f"+{6 - len(kept) + 1}", "#777777")
    assert fitting(labels[:2], 3.5, "#777777") == labels[:2]


def test_an_average_begins_at_the_first_value() -> None:
    assert moving_average([4.0] + [0.0] * 59)[0] == 4.0


@pytest.mark.parametrize(
    ("value", "text"), [(2.5e-7, "2.5e-7"), (-1e-12, "-1e-12"), (0.0, "0"), (0.004, "0.004")]
)
def test_small_numbers_on_an_axis_are_short(value: float, text: str) -> None:
    assert scientific(value) == text
