"""Samples by the thousand, and sweeps: the same on any processes, after any interruption."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from digit_features import NAME as DIGITS
from PIL import Image
from tiny_models import NUM_CLASSES, SIZE, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline
from diffusers_adm.benchmarks import sampling as bench_sampling
from diffusers_adm.benchmarks.sampling import FAST_EVALUATIONS, Bench, evaluations
from diffusers_adm.evaluation import draw_samples
from diffusers_adm.evaluation.commands import option_type, parse_value
from diffusers_adm.evaluation.schedulers import SCHEDULERS, set_scheduler
from diffusers_adm.evaluation.shards import image_generator
from diffusers_adm.launch import join_processes
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.solvers import GUIDED_SETTINGS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny pipeline that draws in three steps."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(num_inference_steps=3).save_pretrained(folder)
    return folder


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def sample(model: Path, output: Path, *words: str | Path, num_samples: int = 10) -> dict[str, np.ndarray]:
    common = ["--model", model, "--output", output, "--num_samples", num_samples, "--batch_size", 4]
    assert run("sample", *common, *words) == 0
    return arrays_of(output / f"samples_{num_samples}x{SIZE}x{SIZE}x3.npz")


def test_samples_are_the_pipelines_cut_to_8_bits_as_published(model, tmp_path):
    found = sample(model, tmp_path / "run", "--guidance_scale", 2.0, "--seed", 5)
    pipeline = tiny_pipeline(num_inference_steps=3)
    x_0 = pipeline(
        class_labels=found["arr_1"][:4],
        guidance_scale=2.0,
        generator=[image_generator(5, number) for number in range(4)],
        output_type="latent",
    ).images
    expected = ((x_0 + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert found["arr_0"].shape == (10, SIZE, SIZE, 3) and found["arr_0"].dtype == np.uint8
    # A batch of other threads may round one value in a thousand otherwise.
    assert (np.abs(found["arr_0"][:4].astype(int) - expected.numpy()) > 1).sum() == 0
    assert found["arr_1"].shape == (10,) and set(found["arr_1"]) <= set(range(NUM_CLASSES))
    metadata = json.loads(str(found["metadata"]))
    assert metadata["call"]["guidance_scale"] == 2.0 and metadata["call"]["num_inference_steps"] == 3
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.size == (10 * SIZE, SIZE)


def test_a_run_that_was_stopped_draws_only_what_is_missing(model, tmp_path):
    whole = sample(model, tmp_path / "whole")
    folder = tmp_path / "stopped"
    sample(model, folder)
    (folder / f"samples_10x{SIZE}x{SIZE}x3.npz").unlink()
    (folder / "shards" / "000001.npz").unlink()
    kept = folder / "shards" / "000002.npz"
    before = kept.stat().st_mtime_ns
    again = sample(model, folder)
    assert kept.stat().st_mtime_ns == before
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(whole[name], again[name])


def test_more_samples_begin_with_the_same_images(model, tmp_path):
    fewer = sample(model, tmp_path / "run", num_samples=6)
    before = (tmp_path / "run" / "shards" / "000000.npz").stat().st_mtime_ns
    more = sample(model, tmp_path / "run", num_samples=10)
    assert (tmp_path / "run" / "shards" / "000000.npz").stat().st_mtime_ns == before
    assert np.array_equal(more["arr_0"][:6], fewer["arr_0"]) and np.array_equal(more["arr_1"][:6], fewer["arr_1"])


def test_labels_are_random_balanced_or_listed(model, tmp_path):
    balanced = sample(model, tmp_path / "balanced", "--labels", "balanced")
    assert balanced["arr_1"].tolist() == [i % NUM_CLASSES for i in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join(map(str, reversed(balanced["arr_1"]))))
    listed = sample(model, tmp_path / "listed", "--labels", tmp_path / "labels.txt")
    assert listed["arr_1"].tolist() == balanced["arr_1"].tolist()[::-1]
    from_file = sample(model, tmp_path / "file", "--labels", tmp_path / "listed" / f"samples_10x{SIZE}x{SIZE}x3.npz")
    assert np.array_equal(from_file["arr_0"], listed["arr_0"])
    free = sample(model, tmp_path / "free", "--scheduler", "DDIM", num_samples=100)
    assert np.bincount(free["arr_1"], minlength=NUM_CLASSES).min() > 8
    assert len({image.tobytes() for image in free["arr_0"]}) == 100


def test_unlabelled_samples_have_no_labels(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False, num_inference_steps=2)
    path = draw_samples(pipeline, tmp_path / "run", 3, batch_size=2)
    assert set(arrays_of(path)) == {"arr_0", "metadata"}


def test_pictures_lie_in_a_folder_a_class_with_a_manifest(model, tmp_path):
    arrays = sample(model, tmp_path / "run")
    assert sample(model, tmp_path / "run", "--format", "png", "--remove_shards")
    folder = tmp_path / "run" / f"samples_10x{SIZE}x{SIZE}x3"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(10))
    for line, image, label in zip(lines, arrays["arr_0"], arrays["arr_1"]):
        assert np.array_equal(np.asarray(Image.open(folder / line["file_name"])), image)
        assert line["label"] == label and Path(line["file_name"]).parent.name == f"{label:04d}"
    assert not (tmp_path / "run" / "shards").exists()
    assert sample(model, tmp_path / "run")  # what is there already is not drawn again
    assert not list((tmp_path / "run" / "shards").iterdir())


def test_an_upsampler_enlarges_samples_of_another_run(model, tmp_path):
    small = sample(model, tmp_path / "small")
    unet = tiny_unet(sample_size=2 * SIZE, in_channels=3, low_res_conditioning=True, attention_resolutions=(8,))
    ADMUpsamplePipeline(unet, tiny_scheduler(), low_res_size=SIZE, num_inference_steps=2).save_pretrained(
        tmp_path / "up"
    )
    base = tmp_path / "small" / f"samples_10x{SIZE}x{SIZE}x3.npz"
    words = ["--model", tmp_path / "up", "--output", tmp_path / "large", "--num_samples", 9, "--batch_size", 4]
    assert run("sample", *words, "--low_res", base) == 0
    large = arrays_of(tmp_path / "large" / f"samples_9x{2 * SIZE}x{2 * SIZE}x3.npz")
    assert large["arr_0"].shape == (9, 2 * SIZE, 2 * SIZE, 3)
    assert np.array_equal(large["arr_1"], small["arr_1"][:9])
    sample(model, tmp_path / "other", "--seed", 1)
    assert run("sample", *words, "--low_res", tmp_path / "other" / base.name) == 2  # other images of the same size
    unet = tiny_unet(
        sample_size=2 * SIZE, low_res_conditioning=True, attention_resolutions=(8,), num_class_embeds=None
    )
    unlabelled = ADMUpsamplePipeline(unet, tiny_scheduler(), low_res_size=SIZE, num_inference_steps=2)
    assert "arr_1" not in arrays_of(draw_samples(unlabelled, tmp_path / "unlabelled", 3, low_res=base))
    bare = tmp_path / "bare.npz"  # without labels
    np.savez(bare, arr_0=small["arr_0"])
    with pytest.raises(ValueError, match="class_labels are missing"):
        draw_samples(ADMUpsamplePipeline.from_pretrained(tmp_path / "up"), tmp_path / "random", 3, low_res=bare)
    guided = ADMUpsamplePipeline(
        unet,
        tiny_scheduler(),
        tiny_classifier(sample_size=2 * SIZE, attention_resolutions=(8,)),
        low_res_size=SIZE,
        num_inference_steps=2,
    )
    drawn = arrays_of(draw_samples(guided, tmp_path / "guided", 3, low_res=base, call={"guidance_scale": 1.0}))
    assert np.array_equal(drawn["arr_1"], small["arr_1"][:3])
    pipeline = ADMUpsamplePipeline.from_pretrained(tmp_path / "up")
    last = pipeline(small["arr_0"][8], large["arr_1"][8].item(), generator=image_generator(0, 8), output_type="latent")
    expected = ((last.images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)[0].numpy()
    assert (np.abs(large["arr_0"][8].astype(int) - expected) > 1).sum() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", 1], "other settings: seed 0, not 1"),
        (["--guidance_scale", 3.0], "other settings: call"),
        (["--labels", "balanced"], "other settings: labels"),
        (["--scheduler", "DDIM"], "other settings: scheduler"),
        (["--dtype", "bfloat16"], "other settings: dtype"),
        (["--labels", "nowhere.txt"], "is not random, balanced or a file"),
        (["--num_samples", 0], "must be at least 1"),
        (["--guidance_scale", "strong"], "neither a number nor one an image"),
    ],
)
def test_a_run_takes_no_samples_of_another(words, said, model, tmp_path, capsys):
    folder = tmp_path / "run"
    sample(model, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.npz")}
    common = ["--model", model, "--num_samples", 10, "--batch_size", 4]
    output = tmp_path / "new" if said.startswith("neither") else folder
    assert run("sample", "--output", output, *common, *words) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.npz")} == before


def test_other_weights_and_other_folders_are_refused(model, tmp_path, capsys):
    sample(model, tmp_path / "run")
    tiny_pipeline(tiny_unet(seed=9), num_inference_steps=3).save_pretrained(tmp_path / "tiny")
    common = ["--num_samples", 10, "--batch_size", 4]
    assert run("sample", "--model", tmp_path / "tiny", "--output", tmp_path / "run", *common) == 2
    assert "other settings: weights" in capsys.readouterr().err
    assert run("sample", "--model", tmp_path / "tiny", "--output", tmp_path / "tiny", *common) == 2
    assert "holds files of something else" in capsys.readouterr().err


def test_a_run_that_drew_nothing_leaves_its_folder_free(model, tmp_path):
    common = ["--model", model, "--output", tmp_path / "run", "--num_samples", 10, "--batch_size", 4]
    assert run("sample", *common, "--timestep_respacing", "ddim7x") == 2
    arrays = sample(model, tmp_path / "run", "--timestep_respacing", "3")
    default = sample(model, tmp_path / "same", "--num_inference_steps", 3)
    assert np.array_equal(arrays["arr_0"], default["arr_0"])
    renamed = tmp_path / "renamed"
    tiny_pipeline(num_inference_steps=3).save_pretrained(renamed)
    before = (tmp_path / "same" / "shards" / "000000.npz").stat().st_mtime_ns
    sample(renamed, tmp_path / "same", "--condition_unet", "true", "--guidance_scale", "none")  # the same run
    assert (tmp_path / "same" / "shards" / "000000.npz").stat().st_mtime_ns == before


def test_labels_and_noise_are_apart():
    first = torch.randint(2**31, (), generator=image_generator(0, 3, purpose=1))
    assert first != torch.randint(2**31, (), generator=image_generator(0, 3))


def test_schedulers_are_set_as_they_are_named():
    pipeline = tiny_pipeline(scheduler=DDPMScheduler(variance_type="learned_range"))
    stock = pipeline.scheduler
    for scheduler_class, settings in GUIDED_SETTINGS.items():
        name = scheduler_class.__name__.removesuffix("Scheduler")
        pipeline.scheduler = stock
        set_scheduler(pipeline, name)
        assert not pipeline.scheduler.config.thresholding
        set_scheduler(pipeline, f"{name}-guided")
        config = dict(pipeline.scheduler.config)
        assert {**config, **settings} == config
    pipeline.scheduler = stock
    set_scheduler(pipeline, "HeunDiscrete-Karras")
    assert isinstance(pipeline.scheduler, HeunDiscreteScheduler) and pipeline.scheduler.config.use_karras_sigmas
    pipeline.scheduler = DDIMScheduler()
    set_scheduler(pipeline, "DDPM")
    assert pipeline.scheduler.config.variance_type == "learned_range"


def test_whatever_a_call_takes_is_an_option():
    assert {"guidance_scale", "num_inference_steps", "timestep_respacing", "condition_unet", "eta"} <= set(
        SamplingOptions.recorded()
    )
    words = ["1", "-1.5", "true", "False", "none", "ddim25", "90,60", "1e-1", '{"schedule": "Linear"}']
    expected = [1, -1.5, True, False, None, "ddim25", "90,60", 0.1, {"schedule": "Linear"}]
    assert [parse_value(word) for word in words] == expected
    assert option_type("timestep_respacing")("250") == "250" and option_type("eta")("0.5") == 0.5


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
    with pytest.raises(ValueError, match="2 processes were launched, which cannot be joined"):
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


def test_sweep_measures_each_point_once(tmp_path, capsys):
    """With the default model, whose digits the independent classifier knows."""
    real = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    words = ["sweep", tmp_path / "real.npz", "--output", tmp_path / "sweep", "--num_samples", 8, "--batch_size", 8]
    words += [
        "--scheduler",
        "DDIM",
        "--num_inference_steps",
        2,
        "--guidance_scale",
        0,
        1.5,
        "--feature_extractor",
        DIGITS,
    ]
    assert run(*words) == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [result["point"]["guidance_scale"] for result in results] == [0, 1.5]
    with open(tmp_path / "sweep" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert (
        float(rows[1]["FD"]) == results[1]["metrics"]["frechet_distance"] != results[0]["metrics"]["frechet_distance"]
    )
    table = (tmp_path / "sweep" / "results.md").read_text()
    assert "| DDIM | 1.5 | 2 |" in table and DIGITS in table and "8 samples a point" in table
    with Image.open(tmp_path / "sweep" / "trade-off.png") as plot:
        assert plot.width > 1000
    metrics = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("metrics_*.json")}
    assert len(metrics) == 2

    assert run(*words, "--condition_unet", "true", "false") == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert len(results) == 4
    assert results[0]["settings"]["samples"]["metadata"]["scheduler"] == "DDIMScheduler"
    unconditional = results[1]["settings"]["samples"]["metadata"]["call"]
    assert unconditional["condition_unet"] is False and unconditional["guidance_scale"] == 0

    # A point is measured anew against another reference.
    np.savez(tmp_path / "real.npz", arr_0=255 - real)
    assert run(*words) == 0
    assert all(path.stat().st_mtime_ns != before for path, before in metrics.items())
