"""Times of calls that take turns, and the benchmark of an evaluation with small sizes."""

import pytest

from diffusers_adm.benchmarks import metrics
from diffusers_adm.benchmarks.timing import last_line_of, median_seconds, peak_memory_bytes


def test_calls_take_turns():
    order = []
    times = median_seconds([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert order == ["a", "b"] * 3 and len(times) == 2 and min(times) >= 0
    assert peak_memory_bytes() > 0


def test_a_process_that_fails_says_why():
    assert last_line_of("platform", ["--terse"])
    with pytest.raises(SystemExit, match="No module named"):
        last_line_of("nothing_of_this_name", [])


def test_parts_of_an_evaluation_are_timed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["metrics", "--images", "30", "--features", "8", "--rounds", "1"])
    metrics.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [
        "mean and covariance",
        "Frechet distance",
        "precision and recall",
    ]
    assert "three products alone" in lines[5]
