"""Values of improved-diffusion: networks, runs, noise schedules and losses of 4000 steps."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline
from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.losses import hybrid_loss, vlb_loss
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.schedulers import build_scheduler


UNETS = ("improved_unet", "improved_unet_class_conditional", "improved_unet_lsun", "improved_upsampler")
RUNS = ("improved_sampling_ddpm", "improved_sampling_ddim", "improved_sampling_unscaled")
TABLES = {
    "timesteps": "timesteps",
    "betas": "beta",
    "alphas_cumprod": "alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_xt",
}


@pytest.mark.parametrize("name", UNETS)
def test_network_computes_the_recorded_output(name):
    case, io = load_case(name)
    unet = ADMUNet2DModel.from_openai(draw_weights(case), published_flags(case))
    labels = io["class_labels"] if case["flags"]["class_cond"] else None
    with torch.no_grad():
        sample = unet(io["sample"], io["step_index"], labels, io.get("low_res")).sample
    assert (sample - io["output"]).norm() / io["output"].norm() < 2e-5


@pytest.mark.parametrize("name", RUNS)
def test_seed_gives_the_recorded_images(name):
    case, io = load_case(name)
    unet_case, _ = load_case(case["unet"])
    flags = f"{published_flags(unet_case)} --use_ddim {case['ddim']}"
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(unet_case), flags=flags)
    pipeline.set_progress_bar_config(disable=True)
    told = []
    pipeline.unet.time_embedding.time_proj.register_forward_hook(lambda module, args, output: told.append(args[0][0]))
    x_0 = pipeline(
        class_labels=case["class_labels"],
        batch_size=2,
        timestep_respacing=case["timestep_respacing"],
        generator=torch.Generator().manual_seed(case["seed"]),
        output_type="latent",
    ).images
    assert torch.equal(torch.stack(told), io["network_timesteps"].float())
    torch.testing.assert_close(x_0, io["samples"][-1], rtol=0, atol=2e-4)


def test_noise_schedules_equal_the_recorded_tables():
    _, recorded = load_case("improved_schedules")
    for key, table in recorded.items():
        steps, noise_schedule, respacing, array = key.split("|")
        flags = parse_flags(
            f"--diffusion_steps {steps} --noise_schedule {noise_schedule} --rescale_timesteps True"
            f" --timestep_respacing {respacing}"
        )
        config = build_scheduler(flags, learns_variance=True).config
        schedule = NoiseSchedule.from_config(config, flags["timestep_respacing"])
        if array == "network_timesteps":
            ours = schedule.timesteps.float() * flags.timestep_scale
        else:
            ours = getattr(schedule, TABLES[array])
        torch.testing.assert_close(ours, table, rtol=1e-12, atol=1e-14, msg=key)


def test_losses_equal_the_recorded_ones_term_by_term():
    case, io = load_case("improved_losses")
    unet_case, _ = load_case(case["unet"])
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(unet_case), flags=published_flags(unet_case))
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config)
    x_0, index, noise = io["x_start"], io["timestep"], io["noise"]
    x_t = add_noise(schedule, x_0, index, noise)
    with torch.no_grad():
        model_output = pipeline.unet(x_t, index).sample
    for name, vlb_weight in (("hybrid", None), ("hybrid_unscaled", 1.0)):
        loss = hybrid_loss(model_output, schedule, x_0, x_t, index, noise, vlb_weight=vlb_weight)
        for term, recorded in (("simple", "mse"), ("vlb", "vb"), ("total", "loss")):
            torch.testing.assert_close(getattr(loss, term), io[f"{name}|{recorded}"], rtol=1e-5, atol=0)
    bits = vlb_loss(model_output, schedule, x_0, x_t, index)
    torch.testing.assert_close(bits, io["kl|loss"], rtol=1e-5, atol=0)
