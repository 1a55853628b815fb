"""Search for the noise levels of few steps."""

import itertools
import json
import shlex

import numpy as np
import pytest
import torch
from command_line import run
from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler
from tiny_models import images, tiny_pipeline, tiny_unet

from diffusers_adm.evaluation import search_steps
from diffusers_adm.evaluation.step_search import cheapest_path, step_costs
from diffusers_adm.models.unet_adm import ADMUNet2DOutput


def gaussian_pipeline(spread: float = 0.2):
    """A pipeline whose UNet is told the noise level, and knows the normal distribution of a standard deviation."""
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    scheduler = EDMEulerScheduler()
    scheduler.register_to_config(clip_sample=False)
    pipeline = tiny_pipeline(unet, scheduler, with_classifier=False)

    def forward(sample, sigma, class_labels=None, low_res=None):
        sigma = sigma[:, None, None, None]
        return ADMUNet2DOutput(sample=sample * spread**2 / (spread**2 + sigma**2))

    pipeline.unet.forward = forward
    return pipeline


def test_cheapest_path_is_the_cheapest_of_all():
    costs = torch.rand(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 3, 8):
        paths = itertools.combinations(range(8), steps)

        def cost(path):
            return costs[0, path[0]] + sum(costs[start + 1, end] for start, end in zip(path, (*path[1:], 8)))

        assert cheapest_path(costs, steps) == list(min(paths, key=cost))


def test_cost_is_the_distance_of_x_t_between_a_step_and_the_trajectory():
    sigmas, x_0, noise = [8.0, 4.0, 1.0], torch.randn(2, 5), torch.randn(2, 5)
    levels = torch.tensor([*sigmas, 0.0])[:, None, None]
    states = x_0 + levels * noise
    assert step_costs(states / (1 + levels**2).sqrt(), sigmas)[1:].abs().max() < 1e-5
    states[2, 0] += 3.0  # at noise level 1, one of two images
    # From 8, the straight step misses it by 3. From 4, the first step meets it, and the slope is off by -1 then.
    expected = torch.tensor([[0, 0, 1.5 / 2**0.5, 0], [0, 0, 0, 2.0], [0, 0, 0, 0]], dtype=torch.float64)
    states = states / (1 + levels**2).sqrt()
    costs = step_costs(states, sigmas)
    torch.testing.assert_close(costs[1:], expected, rtol=0, atol=1e-5)
    begun = (states[0] - states).square().mean(dim=2).sqrt().mean(dim=1)  # by pure noise instead of x_t
    torch.testing.assert_close(costs[0].float(), begun)


def test_found_steps_follow_the_path_better_than_the_default_ones():
    pipeline, x_T = gaussian_pipeline(), images()
    scheduler = pipeline.scheduler
    found = search_steps(pipeline, 6, num_images=4, batch_size=2)
    assert pipeline.scheduler is scheduler and found.name == "sigmas"
    assert found.values == sorted(set(found.values), reverse=True) and len(found.values) == 6
    exact = 80 * x_T * 0.2 / (0.2**2 + 80**2) ** 0.5

    def error(**steps):
        return (pipeline([1, 2], latents=x_T, output_type="latent", **steps).images - exact).norm().item()

    assert error(sigmas=found.values) < 0.7 * error(num_inference_steps=6)


def test_batches_and_guidance_of_a_search():
    pipeline = tiny_pipeline()
    search = {"num_images": 3, "num_candidates": 12}
    found = search_steps(pipeline, 4, batch_size=3, **search)
    assert found.name == "timesteps" and len(set(found.values)) == 4
    assert search_steps(pipeline, 4, batch_size=2, **search) == found
    guided = search_steps(pipeline, 4, call={"guidance_scale": 2000.0}, **search)
    assert guided != found


def test_command_prints_and_writes_steps_that_the_next_command_takes(model, tmp_path, capsys):
    words = ["--num_inference_steps", 3, "--num_images", 2, "--num_candidates", 8, "--guidance_scale", 2.0]
    words += ["--guidance_options", '{"interval": [0.01, Infinity]}']
    assert run("search-steps", "--model", model, "--output", tmp_path / "steps.json", *words) == 0
    written = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert str(written["timesteps"]) in printed and printed.rstrip().endswith(written["command"])
    assert len(written["timesteps"]) == len(written["noise_levels"]) == 3 and written["seed"] == 0
    program, *command = shlex.split(written["command"])
    command[command.index("samples")] = tmp_path / "samples"
    assert program == "diffusers-adm" and run(*command, "--num_samples", 2) == 0
    with np.load(next((tmp_path / "samples").glob("*.npz"))) as samples:
        call = json.loads(str(samples["metadata"]))["call"]
    assert call["timesteps"] == written["timesteps"] and call["guidance_scale"] == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, but got 0"),
        ({"num_inference_steps": 9, "num_candidates": 8}, "must be at most 8, the number of candidates, but got 9"),
        ({"num_images": 0}, "`num_images` must be an integer of at least 1"),
        ({"call": {"timesteps": [3]}}, "`call` must not choose the steps of a search, but got timesteps"),
        ({"call": {"guidance_scale": "x"}}, "guidance_scale"),
    ],
)
def test_searches_that_cannot_be_done_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        search_steps(tiny_pipeline(), **{"num_inference_steps": 3, **call})


def test_consistency_models_have_no_path_to_search():
    unet = tiny_unet(out_channels=3, preconditioning="consistency", timestep_scale=1000.0)
    pipeline = tiny_pipeline(unet, CMStochasticIterativeScheduler(), with_classifier=False)
    with pytest.raises(ValueError, match="must not have a consistency model"):
        search_steps(pipeline, 3)
