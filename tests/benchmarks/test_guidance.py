"""The bench of methods of guidance: the best setting of each, and the seeds that did not choose it."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from digit_features import NAME as DIGITS
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.benchmarks import guidance as bench_guidance
from diffusers_adm.benchmarks.guidance import FAMILIES, NEAR, PLAIN, Family, chosen_families
from diffusers_adm.benchmarks.points import evaluations
from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.evaluation.schedulers import set_scheduler


def test_evaluations_of_weaker_predictions_and_particles_are_counted():
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), scheduler=tiny_scheduler(DDIMScheduler))
    call = {"num_inference_steps": 3, "guidance_scale": 0.0, "cfg_weight": 1.0}
    for kind in ("null_class", "perturbed_attention", "smoothed_attention"):
        assert evaluations(pipeline, {**call, "weaker": kind}) == (6, 0)
    particles = {"num_inference_steps": 3, "guidance_scale": 1.0, "particles": 4}
    assert evaluations(tiny_pipeline(), particles)[0] == 12


@pytest.mark.parametrize("name", FAMILIES)
def test_default_model_can_be_drawn_with_all_settings(name):
    pipeline, family = load_pipeline(None), FAMILIES[name]
    set_scheduler(pipeline, family.scheduler)
    plain, *others = [
        draw(pipeline, **family.call | setting | ({} if "timesteps" in setting else {"num_inference_steps": 6}))
        for settings in family.methods.values()
        for setting in settings
    ]
    assert all((other - plain).abs().max() > 1e-4 for other in others)


def draw(pipeline, **call):
    return pipeline([3], generator=torch.Generator().manual_seed(0), output_type="latent", **call).images


def test_the_best_setting_is_drawn_with_other_seeds(tmp_path, monkeypatch, capsys):
    real = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    methods = {
        PLAIN: [{}],
        "noise": [{"epsilon_scale": 1.01}, {"epsilon_scale": 30.0}],
        "digits again": [{"epsilon_scale": 1.02}],  # far from the reference, which is noise
    }
    once = Family("DDIM", call, {PLAIN: [{}]}, num_seeds=0)
    families = {"digits": Family("DDIM", call, methods), "digits once": once, "others": once}
    monkeypatch.setattr(bench_guidance, "FAMILIES", families)
    words = [tmp_path / "real.npz", "--output", tmp_path / "bench", "--num_samples", 5, "--batch_size", 5, "--seed", 3]
    monkeypatch.setattr("sys.argv", ["bench", *map(str, words), "--feature_extractor", DIGITS, "--only", "digits"])
    bench_guidance.main()
    plain, noise, digits, plain_once = json.loads((tmp_path / "bench" / "methods.json").read_text())
    points = json.loads((tmp_path / "bench" / "results.json").read_text())
    found = {(point["setting"], point["seed"]): point["metrics"] for point in (r["point"] | r for r in points)}
    assert noise["setting"] == min(methods["noise"], key=lambda setting: found[str(setting), 3]["frechet_distance"])
    assert plain["spread"]["seeds"] == [4, 5, 6] and (plain["UNet"], plain["classifier"]) == (2, 2)
    expected = np.mean([found["{}", seed]["recall"] for seed in (4, 5, 6)])
    assert plain["metrics"]["recall"] == pytest.approx(expected)
    assert plain_once["family"] == "digits once" and "spread" not in plain_once
    assert digits["distance_of_choice"] > NEAR * noise["distance_of_choice"]
    assert "spread" in noise and "spread" not in digits
    assert "| digits | plain |" in capsys.readouterr().out


def test_families_are_chosen_by_a_part_of_their_name():
    assert [*chosen_families("", None)] == [*FAMILIES]
    assert [*chosen_families("no classifier", None)] == ["conditional UNet, no classifier"]
    assert "discriminator" in chosen_families("", "guide.py:build")["conditional UNet and classifier"].methods
    with pytest.raises(ValueError, match="--only must be part of one of .* but got 'nothing'"):
        chosen_families("nothing", None)
