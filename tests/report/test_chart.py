"""Charts, block by block."""

from __future__ import annotations

import numpy as np

from lrai_report.chart import Line, bar_line, load_line, panel


def plain(line: Line) -> str:
    return "".join(text for text, _ in line)


def test_a_bar_is_as_long_as_its_share() -> None:
    assert plain(bar_line("a", 0.5, 10)) == f"{'a':12}█████       50.0%"
    assert plain(bar_line("a", 1, 10)) == f"{'a':12}██████████ 100.0%"
    assert plain(bar_line("a", 0.0625, 10)).startswith(f"{'a':12}▋    ")


def test_a_panel_is_green_up_to_the_deadline_and_red_above() -> None:
    heights = np.array([0.1, 25, 50, 51, 100, 500, np.inf, np.nan])
    blank, *lines = panel("a", heights, 50)
    assert blank == []
    shown = [plain(line) for line in lines]
    assert [line[12:] for line in shown] == ["    ███ ", "___▁███_", "  █████ ", "▁██████ "]
    assert shown[0].startswith("a ")
    assert shown[1].startswith("50 ms ")
    assert plain(panel("a", heights, 120_000)[2]).startswith("120,000 ms ")
    styles = [{style for _, style in line[1:]} for line in lines]
    assert styles == [{"red"}, {"red", "dim"}, {"green"}, {"green"}]


def test_the_load_is_drawn_in_proportion_to_its_largest() -> None:
    assert plain(load_line(np.array([0.0, 1.0, 4.0, 8.0]))) == f"{'requests':12} ▁▄█"
