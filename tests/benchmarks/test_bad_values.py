"""Benchmarks refuse options that cannot be measured."""

import runpy
import sys

import pytest


@pytest.mark.parametrize(
    ("benchmark", "words", "message"),
    [
        ("metrics", "--rounds 0", "--rounds 0 must be at least 1."),
        ("overhead", "--steps -1", "--steps -1 must be at least 1."),
        ("step", "--batch_size 0", "--batch_size 0 must be at least 1."),
        (
            "gpu",
            "--classifier_channels 32",
            "--classifier_channels 32 must be a multiple of 64, the channels of a head.",
        ),
        ("training", "--rounds 0", "--rounds 0 must be at least 1."),
        ("sampling", "reference.npz --output new --num_samples 3", "--num_samples 3 must be in [4, 100000000]."),
    ],
)
def test_bad_values_end_in_one_line(benchmark, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [benchmark, *words.split()])
    monkeypatch.delitem(sys.modules, f"diffusers_adm.benchmarks.{benchmark}", raising=False)  # of another test
    with pytest.raises(SystemExit) as exited:
        runpy.run_module(f"diffusers_adm.benchmarks.{benchmark}", run_name="__main__", alter_sys=True)
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"{benchmark}: error: {message}\n"
