"""The variational bound against the recorded one, and against closed forms; how it is measured on a dataset."""

import torch
from diffusers import DDPMScheduler
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.evaluation.likelihood import variational_bound


def test_bound_and_its_terms_equal_the_published_ones():
    case, io = load_case("losses")
    unet_case, _ = load_case(case["unet"])
    unet = ADMUNet2DModel.from_openai(draw_weights(unet_case), published_flags(unet_case))
    recorded = case["bpd"]
    config = DDPMScheduler(beta_schedule=recorded["schedule"]).config
    schedule = NoiseSchedule.from_config(config, recorded["timestep_respacing"])
    torch.manual_seed(recorded["seed"])
    bound = variational_bound(unet, schedule, io["x_start"], io["class_labels"])
    published = {
        "total": "total_bpd",
        "prior": "prior_bpd",
        "terms": "vb",
        "x_0_mse": "xstart_mse",
        "epsilon_mse": "mse",
    }
    for ours, theirs in published.items():
        expected = io[f"bpd|{theirs}"]
        expected = expected.flip(1) if expected.ndim == 2 else expected  # published from the last step to the first
        torch.testing.assert_close(getattr(bound, ours), expected, rtol=2e-5, atol=1e-7, msg=lambda m: f"{ours}: {m}")
