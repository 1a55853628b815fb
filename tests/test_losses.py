"""Training losses against recorded ones."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from golden_cases import draw_weights, load_case, published_flags
from tiny_models import images, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.diffusion import (
    NoiseSchedule,
    add_noise,
    epsilon_from_x_0,
    fixed_log_variance,
    learned_log_variance,
    x_0_from_epsilon,
)
from diffusers_adm.losses import classifier_loss, drop_labels, edm_loss, hybrid_loss, vlb_bits, vlb_loss


@pytest.fixture(scope="module")
def golden():
    """Recorded losses, and what they were computed from."""
    case, io = load_case("losses")
    unet_case, _ = load_case(case["unet"])
    unet = ADMUNet2DModel.from_openai(draw_weights(unet_case), published_flags(unet_case))
    schedule = NoiseSchedule.from_config(DDPMScheduler(beta_schedule=case["schedule"]).config)
    x_t = add_noise(schedule, io["x_start"], io["timestep"], io["noise"])
    return unet, schedule, io, x_t


def test_hybrid_loss_equals_the_published_one_term_by_term(golden):
    unet, schedule, io, x_t = golden
    model_output = unet(x_t, io["timestep"], io["class_labels"]).sample
    loss = hybrid_loss(model_output, schedule, io["x_start"], x_t, io["timestep"], io["noise"])
    for term, recorded in (("simple", "mse"), ("vlb", "vb"), ("total", "loss")):
        torch.testing.assert_close(getattr(loss, term), io[f"hybrid|{recorded}"], rtol=1e-5, atol=0)


def test_whole_bound_in_bits_equals_the_published_one(golden):
    unet, schedule, io, x_t = golden
    model_output = unet(x_t, io["timestep"], io["class_labels"]).sample
    bits = vlb_loss(model_output, schedule, io["x_start"], x_t, io["timestep"])
    torch.testing.assert_close(bits, io["kl|loss"], rtol=1e-5, atol=0)


def test_whole_bound_teaches_mean_and_variance(golden):
    _, schedule, io, x_t = golden
    model_output = torch.randn(3, 6, 32, 32, requires_grad=True)
    bits = vlb_loss(model_output, schedule, io["x_start"], x_t, io["timestep"])
    (gradient,) = torch.autograd.grad(bits.sum(), model_output)
    assert (gradient[:, :3].flatten(1).abs().sum(dim=1) > 0).all()
    assert (gradient[:, 3:].flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small"])
def test_whole_bound_with_a_fixed_variance(variance_type, golden):
    # Where the predicted x_0 is right, only the two variances are left: a closed form away from the first timestep.
    _, schedule, io, _ = golden
    index = torch.tensor([1, 300, 999])
    x_t = add_noise(schedule, io["x_start"], index, io["noise"])
    bits = vlb_loss(io["x_start"], schedule, io["x_start"], x_t, index, "sample", variance_type)
    log_ratio = (fixed_log_variance(schedule, variance_type) - schedule.posterior_log_variance)[index]
    expected = 0.5 * (log_ratio - 1 + (-log_ratio).exp()) / math.log(2) * len(schedule)
    torch.testing.assert_close(bits.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("model_class", [ADMUNet2DModel, UNet2DModel])
def test_any_epsilon_model_learns_its_variance_from_a_stock_scheduler(model_class):
    torch.manual_seed(0)
    if model_class is UNet2DModel:
        model = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
    else:
        model = tiny_unet(num_class_embeds=None)
    scheduler = DDPMScheduler()
    sample_size, channels = model.config.sample_size, model.config.in_channels
    x_0, timestep = torch.rand(4, channels, sample_size, sample_size) * 2 - 1, torch.tensor([3, 200, 600, 999])

    noise = torch.randn_like(x_0)
    x_t = scheduler.add_noise(x_0, noise, timestep)
    model_output = model(x_t, timestep).sample
    schedule = NoiseSchedule.from_config(scheduler.config)
    hybrid_loss(model_output, schedule, x_0, x_t, timestep, noise).total.mean().backward()

    last = [parameter for name, parameter in model.named_parameters() if name.endswith("conv_out.weight")][-1]
    assert last.grad[channels:].abs().sum() > 0


def test_the_bound_teaches_the_variance_alone(golden):
    _, schedule, io, x_t = golden
    model_output = torch.randn(3, 6, 32, 32, requires_grad=True)
    loss = hybrid_loss(model_output, schedule, io["x_start"], x_t, io["timestep"], io["noise"])
    (gradient,) = torch.autograd.grad(loss.vlb.sum(), model_output)
    assert torch.count_nonzero(gradient[:, :3]) == 0
    assert (gradient[:, 3:].flatten(1).abs().sum(dim=1) > 0).all()


def test_without_learned_variance_the_loss_is_the_simple_one(golden):
    _, schedule, io, x_t = golden
    model_output = torch.randn(3, 3, 32, 32)
    loss = hybrid_loss(model_output, schedule, io["x_start"], x_t, io["timestep"], io["noise"])
    assert loss.vlb is None
    expected = (model_output - io["noise"]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.total, expected)


def test_bound_is_weighted_by_the_number_of_timesteps():
    schedule = NoiseSchedule.from_config(DDPMScheduler(num_train_timesteps=100).config)
    x_0, noise, index = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([5, 60])
    x_t, model_output = add_noise(schedule, x_0, index, noise), torch.randn(2, 2, 4, 4)
    loss = hybrid_loss(model_output, schedule, x_0, x_t, index, noise)
    epsilon, fraction = model_output.chunk(2, dim=1)
    x_0_hat, log_variance = (
        x_0_from_epsilon(schedule, x_t, index, epsilon),
        learned_log_variance(schedule, index, fraction),
    )
    bits = vlb_bits(schedule, x_0, x_t, index, x_0_hat, log_variance)
    torch.testing.assert_close(loss.vlb, bits / 10)
    unscaled = hybrid_loss(model_output, schedule, x_0, x_t, index, noise, vlb_weight=1.0)
    torch.testing.assert_close(unscaled.total, loss.simple + bits)


def test_predicting_x_0_has_the_bound_of_the_epsilon_that_it_implies(golden):
    _, schedule, io, x_t = golden
    model_output = torch.randn(3, 6, 32, 32)
    implied = epsilon_from_x_0(schedule, x_t, io["timestep"], model_output[:, :3])
    as_epsilon = torch.cat([implied, model_output[:, 3:]], dim=1)
    arguments = (schedule, io["x_start"], x_t, io["timestep"], io["noise"])
    loss = hybrid_loss(model_output, *arguments, prediction_type="sample")
    torch.testing.assert_close(loss.vlb, hybrid_loss(as_epsilon, *arguments).vlb, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss.simple, (model_output[:, :3] - io["x_start"]).square().mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="v_prediction"):
        hybrid_loss(model_output, *arguments, prediction_type="v_prediction")


def test_confidence_costs_its_distance_from_the_uniform_distribution():
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 2, 1, 1])
    probabilities = logits.softmax(dim=1)
    cross_entropy = -probabilities[torch.arange(5), labels].log()
    divergence = (probabilities * (probabilities * 4).log()).sum(dim=1)
    torch.testing.assert_close(classifier_loss(logits, labels), cross_entropy)
    torch.testing.assert_close(classifier_loss(logits, labels, 0.1), cross_entropy + 0.1 * divergence)
    uniform = torch.zeros(5, 4, dtype=torch.float64)
    torch.testing.assert_close(classifier_loss(uniform, labels, 7.0), classifier_loss(uniform, labels))


def test_labels_are_dropped_at_the_given_rate():
    labels = torch.arange(10).repeat(1000)
    dropped = drop_labels(labels, 10, 0.2, torch.Generator().manual_seed(0))
    is_null = dropped == 10
    assert 0.18 < is_null.float().mean() < 0.22
    assert torch.equal(dropped[~is_null], labels[~is_null])
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)
    assert (drop_labels(labels, 10, 1.0) == 10).all()


def test_an_output_of_odd_channels_is_refused(golden):
    _, schedule, io, x_t = golden
    with pytest.raises(ValueError, match="must have 3 channels.*but got 4"):
        hybrid_loss(torch.randn(3, 4, 32, 32), schedule, io["x_start"], x_t, io["timestep"], io["noise"])


def test_loss_of_edm_is_that_of_the_network_before_its_scales():
    sigma, sigma_data = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64), 0.7
    unet = tiny_unet(out_channels=3, preconditioning="edm", sigma_data=sigma_data).double()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    x_0, noise = (images(3, seed=seed).double() for seed in (0, 1))
    level = sigma[:, None, None, None]
    with torch.no_grad():  # the network returns zeros, so its target is what remains
        denoised = unet(x_0 + level * noise, sigma, torch.zeros(3, dtype=torch.long)).sample
    target = (sigma_data**2 * noise - level * x_0) / (sigma_data * (level**2 + sigma_data**2).sqrt())
    expected = target.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(edm_loss(denoised, x_0, sigma, sigma_data), expected, rtol=1e-9, atol=0)
