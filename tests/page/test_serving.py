"""The page is served by the command and by the Space's file, and problems are told in one line."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from command_line import run
from documents import ROOT

from diffusers_adm import default_cascade


pytestmark = pytest.mark.page

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@contextmanager
def free_port() -> Iterator[int]:
    """Yields a port that is in use while the context lasts, and free after it."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        yield own.getsockname()[1]


@contextmanager
def serving(*words: str | Path, **environment: str) -> Iterator[str]:
    """Runs a program until the context ends, and yields the address that it prints."""
    with free_port() as port:
        pass
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), **environment}
    with subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield next(match[0] for match in map(ADDRESS.search, lines) if match)
        finally:
            process.terminate()


def served_page(address: str) -> dict:
    """Returns the config of the page that is served."""
    with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
        return json.load(answer)


def test_command_serves_the_page():
    with serving("-m", "diffusers_adm.cli", "page") as address:
        assert served_page(address)["title"] == "Classifier guidance"


def test_space_runs_as_its_files_say(tmp_path):
    front_matter = yaml.safe_load((ROOT / "spaces" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front_matter["sdk"] == "gradio"
    space = shutil.copytree(ROOT / "spaces", tmp_path / "space")
    with serving(space / front_matter["app_file"], GRADIO_SERVER_NAME="127.0.0.1") as address:
        page = served_page(address)
    assert page["title"] == "Classifier guidance" and not page["analytics_enabled"]


def test_port_in_use_is_told_in_one_line(capsys):
    with free_port() as port:
        assert run("page", "--port", port) == 2
    message = f"diffusers-adm page: error: --port {port} cannot be used at --host 127.0.0.1: choose another --port or --host."
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "nothing"), "There is no folder 'nothing'. Ids on the Hub look like 'owner/name'."),
        (("--model", default_cascade()[1]), "Choose another --model."),
        (("--port", 0), "--port 0 must be in [1, 65535]."),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(words, message, capsys):
    assert run("page", *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
