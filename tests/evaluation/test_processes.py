"""Sampling on several processes, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import arrays_of
from tiny_models import SIZE

from diffusers_adm.launch import join_processes


def command(model: Path, output: Path, *words: str | Path) -> list[str]:
    common = ["--model", model, "--output", output, "--num_samples", 60, "--batch_size", 4]
    return ["-m", "diffusers_adm.cli", "sample", *map(str, common), *map(str, words)]


# Without MPI `accelerate launch --cpu` starts a single process, whatever it is told.
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is of machines without")
def test_processes_of_a_launch_on_a_cpu_share_the_images(model, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    words = command(model, tmp_path / "run", "--guidance_scale", 0.0, "--num_inference_steps", 1)
    run = subprocess.run([*TWO_PROCESSES, *words], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout.count("60 samples in") == 1  # the main process says so


def test_processes_that_cannot_be_joined_are_refused(monkeypatch):
    join_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")  # as where something had made a state of one process before
    with pytest.raises(ValueError, match="2 processes were launched, but they cannot be joined"):
        join_processes()


@pytest.mark.slow
def test_two_processes_and_a_killed_run_draw_the_same_set(model, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    words = ["--guidance_scale", 1.0, "--num_inference_steps", 50]
    two = [*TWO_PROCESSES, *command(model, tmp_path / "two", *words)]
    subprocess.run(two, check=True, env={**environment, "OMP_NUM_THREADS": "1"})

    killed = subprocess.Popen([sys.executable, *command(model, tmp_path / "killed", *words)], env=environment)
    shards = tmp_path / "killed" / "shards"
    while killed.poll() is None and len(list(shards.glob("0*.npz"))) < 3:
        time.sleep(0.05)
    assert killed.poll() is None, "the run was too short to be killed"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    drawn = {path: path.stat().st_mtime_ns for path in shards.glob("0*.npz")}
    assert 3 <= len(drawn) < 15
    subprocess.run([sys.executable, *command(model, tmp_path / "killed", *words)], check=True, env=environment)
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in drawn.items())

    name = f"samples_60x{SIZE}x{SIZE}x3.npz"
    two, one = arrays_of(tmp_path / "two" / name), arrays_of(tmp_path / "killed" / name)
    assert np.array_equal(two["arr_0"], one["arr_0"]) and np.array_equal(two["arr_1"], one["arr_1"])
