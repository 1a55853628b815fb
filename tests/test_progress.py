"""Progress of long work."""

import io
import re
import sys

import pytest

from diffusers_adm.progress import with_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (60.0, 0)], ids=["every item is long", "all is short"])
def test_a_log_gets_a_line_now_and_then(seconds, lines, capsys):
    assert list(with_progress(iter("abcd"), 4, "drawing", "batches", seconds)) == list("abcd")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(re.fullmatch(r"drawing: [123] of 4 batches, [\d:]+ left", line) for line in said)


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(with_progress(iter("ab"), 2, "drawing", "batches")) == ["a", "b"]
    assert "drawing: 100%" in sys.stderr.getvalue()
