"""Benchmark of quality against cost: its points, their cost, and the spread of the best points."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import HeunDiscreteScheduler
from digit_features import NAME as DIGITS
from PIL import Image
from tiny_models import tiny_pipeline, tiny_scheduler

from diffusers_adm.benchmarks import sampling as bench_sampling
from diffusers_adm.benchmarks.points import evaluations
from diffusers_adm.benchmarks.sampling import FAST_EVALUATIONS, Bench
from diffusers_adm.evaluation.options import SCHEDULERS


def test_evaluations_are_counted():
    pipeline = tiny_pipeline(scheduler=HeunDiscreteScheduler.from_config(tiny_scheduler().config))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert evaluations(pipeline, call) == (7, 7)
    assert evaluations(pipeline, {**call, "guidance_options": {"every": 3}}) == (7, 3)
    assert evaluations(pipeline, {**call, "guidance_scale": 0.0}) == (7, 0)


def test_bench_knows_the_steps_of_every_scheduler_within_its_evaluations():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler())
    bench = Bench(pipeline, None, Path())
    for name in SCHEDULERS:
        for count in FAST_EVALUATIONS[:2]:
            bench.set_scheduler(name)
            unet, _ = evaluations(pipeline, {"num_inference_steps": bench.steps_within(name, count)})
            assert count - 1 <= unet <= count, (name, count)


@pytest.mark.slow
def test_bench_measures_solvers_and_guidance_and_the_spread_of_the_best(tmp_path, monkeypatch):
    real = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    monkeypatch.setattr(bench_sampling, "FAST_EVALUATIONS", (5, 10, 20))
    monkeypatch.setattr(bench_sampling, "SLOW_STEPS", 12)
    words = [tmp_path / "real.npz", "--output", tmp_path / "bench", "--num_samples", 10, "--batch_size", 10]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, words), "--feature_extractor", DIGITS])
    bench_sampling.main()
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    points = [result["point"] for result in results]
    # All solvers but DDPM with three numbers of evaluations; two at many; twice two with five ways to guide; four with two
    # more seeds.
    assert len(points) == (len(SCHEDULERS) - 1) * 3 + 2 + 2 * 2 * 5 + 4 * 2
    assert len({tuple(point.values()) for point in points}) == len(points)
    heun = next(point for point in points if point["solver"] == "HeunDiscrete" and point["steps"] == 5)
    assert (heun["UNet"], heun["classifier"]) == (9, 9)
    assert {point["UNet"] for point in points} == {5, 9, 10, 12, 19, 20}
    assert all(0 <= result["metrics"]["accuracy"] <= 1 for result in results)
    spread = json.loads((tmp_path / "bench" / "three_seeds.json").read_text())
    assert [point["steps"] for point in spread][0] == 12 and all(point["UNet"] <= 20 for point in spread[1:])
    for name in ("quality.png", "guidance.png"):
        with Image.open(tmp_path / "bench" / name) as plot:
            assert plot.width > 500
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "bench").rglob("*.npz")}
    bench_sampling.main()
    assert all(path.stat().st_mtime_ns == before for path, before in drawn.items())
