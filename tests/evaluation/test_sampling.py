"""Runs of many images: they draw the images of the pipeline, also after an interruption."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from image_files import arrays_of
from PIL import Image
from sampling_runs import sample
from tiny_models import NUM_CLASSES, SIZE, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline
from diffusers_adm.evaluation import draw_samples
from diffusers_adm.evaluation.shards import image_generator


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


def test_steps_churn_and_restart_are_options_of_the_command(model, tmp_path):
    options = {
        "plain": {},
        "churn": {"s_churn": 4},
        "restart": {"sigma_min": 1, "sigma_max": 10, "times": 1},
    }
    drawn = {}
    for name, value in options.items():
        extra = [f"--{name}", json.dumps(value)] if value else []
        words = ["--scheduler", "heunDiscreteScheduler", "--sigmas", "[50,10,1]", *extra]
        found = sample(model, tmp_path / name, *words, num_samples=2)
        drawn[name] = found["arr_0"]
        call = json.loads(str(found["metadata"]))["call"]
        assert call["sigmas"] == [50, 10, 1] and call.get(name, {}) == value
    assert (drawn["plain"] != drawn["churn"]).any() and (drawn["plain"] != drawn["restart"]).any()


def test_samples_of_other_channels_are_arrays_without_a_grid(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(in_channels=5, out_channels=10), with_classifier=False, num_inference_steps=2)
    with np.load(draw_samples(pipeline, tmp_path / "run", num_images=3, batch_size=2)) as samples:
        assert samples["arr_0"].shape == (3, SIZE, SIZE, 5)
    assert not (tmp_path / "run" / "grid.png").exists()
    with pytest.raises(ValueError, match="1 or 3 channels, but the UNet has 5"):
        draw_samples(pipeline, tmp_path / "png", num_images=3, format="png")


def test_a_run_that_was_stopped_draws_only_what_is_missing(model, tmp_path, capsys):
    whole = sample(model, tmp_path / "whole")
    folder = tmp_path / "stopped"
    sample(model, folder)
    (folder / f"samples_10x{SIZE}x{SIZE}x3.npz").unlink()
    (folder / "shards" / "000001.npz").unlink()
    kept = folder / "shards" / "000002.npz"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    again = sample(model, folder)
    assert f"Found 6 of 10 images in {folder}, drawing the rest." in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(whole[name], again[name])


def test_files_of_killed_processes_are_removed_and_those_of_running_ones_stay(model, tmp_path):
    sample(model, tmp_path)
    (tmp_path / "shards").mkdir(exist_ok=True)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = {
        process: tmp_path / "shards" / f"partial-{platform.node()}-{process}-000000.npz"
        for process in (killed.pid, os.getppid())
    }
    for path in left.values():
        path.touch()
    sample(model, tmp_path)
    assert not left[killed.pid].exists() and left[os.getppid()].exists()


def test_more_samples_begin_with_the_same_images(model, tmp_path):
    fewer = sample(model, tmp_path / "run", num_samples=6)
    before = (tmp_path / "run" / "shards" / "000000.npz").stat().st_mtime_ns
    more = sample(model, tmp_path / "run", num_samples=10)
    assert (tmp_path / "run" / "shards" / "000000.npz").stat().st_mtime_ns == before
    assert np.array_equal(more["arr_0"][:6], fewer["arr_0"]) and np.array_equal(more["arr_1"][:6], fewer["arr_1"])


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
    with pytest.raises(ValueError, match="`class_labels` are required"):
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
        (["--seed", 1], "other settings: seed was 0 and is 1"),
        (["--guidance_scale", 3.0], "other settings: call"),
        (["--labels", "balanced"], "other settings: labels"),
        (["--scheduler", "DDIM"], "other settings: scheduler"),
        (["--dtype", "bfloat16"], "other settings: dtype"),
        (["--labels", "nowhere.txt"], "must be random, balanced or a file"),
        (["--num_samples", 0], "must be in [1, "),
        (["--guidance_scale", "strong"], "'strong' is not one number"),
    ],
)
def test_a_run_takes_no_samples_of_another(words, said, model, tmp_path, capsys):
    folder = tmp_path / "run"
    sample(model, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.npz")}
    common = ["--model", model, "--num_samples", 10, "--batch_size", 4]
    output = tmp_path / "new" if "strong" in said else folder
    assert run("sample", "--output", output, *common, *words) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.npz")} == before


def test_other_weights_and_other_folders_are_refused(model, tmp_path, capsys):
    sample(model, tmp_path / "run")
    tiny_pipeline(tiny_unet(seed=9), num_inference_steps=3).save_pretrained(tmp_path / "tiny")
    common = ["--num_samples", 10, "--batch_size", 4]
    assert run("sample", "--model", tmp_path / "tiny", "--output", tmp_path / "run", *common) == 2
    assert "other settings: weights" in capsys.readouterr().err
    same = tiny_pipeline(num_inference_steps=3)
    same.save_pretrained(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "unet" / "config.json").read_text())
    (tmp_path / "tiny" / "unet" / "config.json").write_text(json.dumps({**config, "timestep_scale": 0.5}))
    assert run("sample", "--model", tmp_path / "tiny", "--output", tmp_path / "run", *common) == 2
    assert "other settings: weights" in capsys.readouterr().err
    assert run("sample", "--model", tmp_path / "tiny", "--output", tmp_path / "tiny", *common) == 2
    assert "holds files that are not of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ([], {"guidance_scale": 1.0, "num_inference_steps": 3}),
        (["--guidance_scale", 2, "--condition_unet", "none"], {"guidance_scale": 2, "num_inference_steps": 3}),
        (["--num_inference_steps", 2], {"guidance_scale": 1.0, "num_inference_steps": 2}),
        (["--timestep_respacing", 2], {"guidance_scale": 1.0, "timestep_respacing": "2"}),
        (["--timesteps", "[90, 60]"], {"guidance_scale": 1.0, "timesteps": [90, 60]}),
        (
            ["--guidance_options", '{"every": 2}', "--eta", "0.5", "--scheduler", "DDIM"],
            {"guidance_scale": 1.0, "num_inference_steps": 3, "guidance_options": {"every": 2}, "eta": 0.5},
        ),
    ],
)
def test_a_runs_settings_are_recorded_as_ever(words, call, model, tmp_path):
    """Runs of earlier versions can be continued."""
    sample(model, tmp_path / "run", *words, num_samples=1)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["call"] == {"condition_unet": True, "eta": 0.0, "cfg_weight": 0.0, **call}
    assert settings.keys() == {
        *("model", "weights", "dtype", "scheduler", "scheduler_config"),
        *("call", "seed", "labels", "low_res", "batch_size"),
    }


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


def test_settings_are_strict_json_and_those_of_earlier_versions_go_on(model, tmp_path):
    words = ("--scheduler", "DPMSolverMultistep")  # whose config holds minus infinity
    sample(model, tmp_path / "run", *words, num_samples=4)
    path = tmp_path / "run" / "settings.json"
    settings = strict_json(path.read_text())
    assert settings["scheduler_config"]["lambda_min_clipped"] == "-inf"
    settings["scheduler_config"]["lambda_min_clipped"] = float("-inf")
    path.write_text(json.dumps(settings))
    found = sample(model, tmp_path / "run", *words, num_samples=5)
    strict_json(str(found["metadata"]))


def strict_json(text: str):
    """Content of a JSON text, which must not hold NaN or infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_arguments_that_hold_for_one_image_are_no_options_of_a_run(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True))
    for name in ("guidance_scale", "cfg_weight"):
        for value in ([1.0, 2.0], torch.ones(4), float("inf"), "1"):
            with pytest.raises(ValueError, match=f"`{name}` must be one finite number for a whole run, but got "):
                draw_samples(pipeline, tmp_path / "run", num_images=4, batch_size=4, call={name: value})
    with pytest.raises(ValueError, match="require a `guidance_fn` that is applied to the predicted x_0"):
        draw_samples(
            pipeline, tmp_path / "run", num_images=4, batch_size=4, call={"guidance_options": {"method": "dps"}}
        )
    assert not (tmp_path / "run").exists()


GUIDANCE_FILE = """
from diffusers_adm.guidance import ClassifierGuidance


def own(pipeline):
    return ClassifierGuidance(pipeline.classifier)


def nothing(pipeline):
    return None


def broken(pipeline):
    raise KeyError("weights")


def of_class(pipeline):
    return lambda x_t, timestep, x_0, class_labels: x_0.mean(dim=(1, 2, 3)) * (2 * class_labels - 1)


NUMBER = 3
"""


def test_a_function_is_given_labels_that_no_network_is_given(tmp_path):
    file, labels = tmp_path / "mine.py", tmp_path / "labels.txt"
    file.write_text(GUIDANCE_FILE)
    labels.write_text("0\n1\n" * 2)
    call = {"guidance_fn": f"{file}:of_class", "guidance_scale": 50.0, "num_inference_steps": 3}
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None))
    drawn = arrays_of(draw_samples(pipeline, tmp_path / "run", 4, labels=str(labels), call=call))
    brightness = drawn["arr_0"].astype(float).mean(axis=(1, 2, 3))
    assert drawn["arr_1"].tolist() == [0, 1, 0, 1] and brightness[::2].max() < brightness[1::2].min()


def test_a_function_of_a_file_guides_a_run(model, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(GUIDANCE_FILE)
    words = ("--guidance_scale", 2.0)
    guided = sample(model, tmp_path / "run", *words, "--guidance_fn", f"{file}:own", num_samples=4)
    expected = sample(model, tmp_path / "expected", *words, num_samples=4)  # the same classifier
    assert np.array_equal(guided["arr_0"], expected["arr_0"])
    recorded = json.loads(str(guided["metadata"]))["call"]["guidance_fn"]
    assert (recorded["file"], recorded["name"], len(recorded["sha256"])) == ("mine.py", "own", 64)
    for place, said in (
        (f"{file}:nothing", "returned None"),
        (f"{file}:broken", "failed: KeyError: 'weights'"),
        (f"{file}:NUMBER", "has no function 'NUMBER'"),
        (f"{file}", "must be FILE.py:NAME, but got"),
        (f"{tmp_path / 'no.py'}:own", "there is no file"),
    ):
        capsys.readouterr()
        common = ["--model", model, "--num_samples", 4, "--output", tmp_path / "bad"]
        assert run("sample", *common, "--guidance_fn", place) == 2
        assert said in capsys.readouterr().err
    file.write_text(GUIDANCE_FILE + "\nOTHER = 1\n")
    common = ["--model", model, "--num_samples", 5, "--batch_size", 4, "--output", tmp_path / "run"]
    assert run("sample", *common, *words, "--guidance_fn", f"{file}:own") == 2
    assert "other settings: call" in capsys.readouterr().err
