"""Progress of long work."""

import io
import re
import subprocess
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


LOG = """
import sys
from diffusers_adm.cli import main
sys.argv[1:] = ["demo", "--steps", "2", "--output", sys.argv[1]]
assert main() == 0
"""


def test_a_log_holds_whole_lines_and_no_bars(tmp_path):
    done = subprocess.run([sys.executable, "-c", LOG, tmp_path / "demo.png"], capture_output=True, text=True)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stderr
    assert done.stdout.startswith("Drew 40 digits in 2 DDIM steps each")
