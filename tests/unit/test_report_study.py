"""Figures of the studies: what the correlation's and the intervention's say, in words and marks."""

import io

import numpy as np

from verl_avar.report import study_figures

STATISTICS = {
    "points": 4,
    "pearson": {"r": 0.996, "p": 0.0039, "interval": [0.9, 1.0]},
    "spearman": {"rho": 1.0, "p": 0.083},
    "line": {"slope": 0.6, "intercept": 44.6},
}


def texts(figure) -> str:
    """All words of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def points_at(*vas: float) -> list[dict]:
    return [{"name": f"model ${i}$", "vas": v, "accuracy": 44.6 + 0.6 * v} for i, v in enumerate(vas)]


def test_correlation_names_points_classes_and_coefficient():
    words = texts(study_figures.correlation_figure(points_at(7.5, 10.1, 13.8, 18.9), STATISTICS))
    for expected in (
        "model $0$",
        "model $3$",
        "narrow\n< 10",
        "wide\n10–15",
        "panoramic\n> 15",
        "r = 0.996, p = 0.0039",
    ):
        assert expected in words


def test_classes_are_shown_for_the_papers_vas_only():
    shown = study_figures.correlation_figure(points_at(7.5, 10.1, 18.9), STATISTICS, "response", "head_mean")
    assert "narrow" not in texts(shown) and "VAS, heads averaged (response)" in texts(shown)


def test_names_of_points_do_not_cover_each_other_or_leave_the_axes():
    rng = np.random.default_rng(0)
    figure = study_figures.correlation_figure(points_at(*rng.uniform(6, 19, 12)), STATISTICS)
    figure.savefig(io.BytesIO())
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    names = [text for text in axes.texts if text.get_text().startswith("model")]
    boxes = [super(type(text), text).get_window_extent(renderer) for text in names]
    frame = axes.get_window_extent(renderer)
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1


def test_long_names_keep_the_end_that_tells_them_apart():
    points = [
        point | {"name": f"checkpoints/of-a-long-run/global_step_{n}"} for n, point in enumerate(points_at(1, 2, 3, 4))
    ]
    names = texts(study_figures.correlation_figure(points, STATISTICS)).splitlines()
    assert {f"checkpoints/o…/global_step_{n}" for n in range(4)} <= set(names)


def figure_of(value, difference=None, half=0.05) -> dict:
    return {
        "value": value,
        "interval": None if value is None else [value - half, value + half],
        "difference": difference,
        "difference_interval": None if difference is None else [difference - half, difference + half],
        "clear": difference is not None and abs(difference) > half,
    }


def test_intervention_marks_the_changes_that_are_clear_of_zero():
    points = [
        {"name": name, "accuracy": figure_of(0.6 + (change or 0), change), "format": figure_of(0.9, None),
         "tokens": figure_of(150.0, None), "head_mean": figure_of(vas)}
        for name, change, vas in (("baseline", None, 1.2), ("β 0.1", 0.01, 1.4), ("β 2", 0.2, None))
    ]  # fmt: skip
    figure = study_figures.intervention_figure(points)
    change = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("change"))
    marks = {line.get_ydata()[0]: line.get_markerfacecolor() for line in change.lines if line.get_marker() == "o"}
    assert marks == {1: "white", 2: study_figures.BLUE}
    words = texts(figure)
    assert "+1.0" in words and "+20.0" in words and "β 0.1" in words and "–" in words  # no VAS at the last


def test_a_vas_that_explodes_is_drawn_on_a_log_scale():
    names = ("accuracy", "format", "tokens", "head_mean")
    points = [{"name": "baseline"} | {name: figure_of(0.5) for name in names}]
    points.append(points[0] | {"name": "β 9", "head_mean": figure_of(60.0)})
    scales = {axes.get_title(loc="left"): axes.get_xscale() for axes in study_figures.intervention_figure(points).axes}
    assert scales.pop("VAS, response, log") == "log" and set(scales.values()) == {"linear"}
