"""Schedules, respacing, forward process and posterior against recorded tables and closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from golden_cases import load_case

from diffusers_adm.betas import betas_from_config
from diffusers_adm.diffusion import (
    NoiseSchedule,
    add_noise,
    discretized_log_likelihood,
    epsilon_from_x_0,
    fixed_log_variance,
    gaussian_kl,
    learned_log_variance,
    posterior_mean,
    x_0_from_epsilon,
)
from diffusers_adm.respacing import evenly_spaced_timesteps, respaced_timesteps


CONFIGS = {
    "linear": DDPMScheduler(beta_schedule="linear").config,
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2").config,
}
RECORDED_NAMES = {
    "timesteps": "timesteps",
    "betas": "beta",
    "alphas_cumprod": "alpha_bar",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_mean_x0",
    "posterior_mean_coef2": "posterior_mean_xt",
}


def test_every_table_equals_the_published_one():
    _, recorded = load_case("schedules")
    assert {key.split("|")[2] for key in recorded} == set(RECORDED_NAMES)
    for key, table in recorded.items():
        name, respacing, array = key.split("|")
        schedule = NoiseSchedule.from_config(CONFIGS[name], "" if respacing == "1000" else respacing)
        ours = getattr(schedule, RECORDED_NAMES[array])
        assert ours.dtype == table.dtype
        torch.testing.assert_close(ours, table, rtol=1e-12, atol=1e-14, msg=key)


def test_betas_are_those_of_the_stock_scheduler_before_it_rounds():
    for options in (
        {"beta_schedule": "linear", "num_train_timesteps": 400, "beta_start": 2.5e-4, "beta_end": 0.05},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ):
        scheduler = DDIMScheduler(**options)
        betas = betas_from_config(scheduler.config)
        assert betas.dtype == torch.float64
        torch.testing.assert_close(betas.float(), scheduler.betas, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}])
def test_unsupported_schedules_are_refused_by_name(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        betas_from_config(DDPMScheduler().config | options)


def test_a_copy_on_a_device_reads_the_same_values():
    schedule = NoiseSchedule.from_config(CONFIGS["linear"])
    x_0, noise, index = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 500, 999])
    assert torch.equal(add_noise(schedule, x_0, index, noise), add_noise(schedule.to("cpu"), x_0, index, noise))


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        ("", list(range(100))),
        ("5", [0, 25, 50, 74, 99]),
        ("1", [0]),
        ("ddim25", list(range(0, 100, 4))),
        ("2,1", [0, 49, 50]),
        ("100", list(range(100))),
    ],
)
def test_respacing_strings(respacing, expected):
    assert respaced_timesteps(respacing, 100) == expected


def test_sections_take_the_remainder_first():
    # 10 timesteps in three sections: lengths 4, 3, 3.
    assert respaced_timesteps("2,2,2", 10) == [0, 3, 4, 6, 7, 9]


@pytest.mark.parametrize(("steps", "place", "timestep"), [(21, 10, 499), (31, 15, 500), (43, 35, 833), (61, 10, 167)])
def test_strides_are_added_up_not_multiplied(steps, place, timestep):
    # `linspace` and i * stride round each of these to the other neighbour.
    assert respaced_timesteps(str(steps), 1000)[place] == timestep


@pytest.mark.parametrize(
    "respacing", ["ddim7.5", "ddim999", "1001", "400,400,400", "0", "abc", "10,", "-5", "ddim", "1e2", "10;20"]
)
def test_impossible_respacing_is_refused(respacing):
    with pytest.raises(ValueError, match="`timestep_respacing`"):
        respaced_timesteps(respacing, 1000)


def test_ddim_steps_have_an_integer_stride_where_one_fits():
    assert evenly_spaced_timesteps(25, 1000) == list(range(0, 1000, 40))
    assert evenly_spaced_timesteps(7, 1000) == list(range(0, 1000, 143))
    assert evenly_spaced_timesteps(300, 1000) == [round(i * 1000 / 300) for i in range(300)]
    assert evenly_spaced_timesteps(1, 1000) == [0]
    for count in (0, 1001):
        with pytest.raises(ValueError, match="1000"):
            evenly_spaced_timesteps(count, 1000)


def test_x_0_and_epsilon_invert_each_other():
    schedule = NoiseSchedule.from_config(CONFIGS["cosine"], "50")
    x_0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for index in (0, 10, 40):
        x_t = add_noise(schedule, x_0, index, noise)
        torch.testing.assert_close(x_0_from_epsilon(schedule, x_t, index, noise), x_0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(epsilon_from_x_0(schedule, x_t, index, x_0), noise, rtol=1e-4, atol=1e-3)


def test_posterior_is_bayes_rule():
    # q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): a product of two Gaussians.
    schedule = NoiseSchedule.from_config(CONFIGS["linear"], "20")
    x_0, x_t = torch.randn(1, 1, 2, 2).double(), torch.randn(1, 1, 2, 2).double()
    for index in range(1, 20):
        alpha, beta = 1 - schedule.beta[index], schedule.beta[index]
        prior_mean, prior_variance = schedule.alpha_bar[index - 1].sqrt() * x_0, 1 - schedule.alpha_bar[index - 1]
        variance = 1 / (alpha / beta + 1 / prior_variance)
        mean = variance * (alpha.sqrt() * x_t / beta + prior_mean / prior_variance)
        torch.testing.assert_close(posterior_mean(schedule, x_t, index, x_0), mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(schedule.posterior_variance[index], variance, rtol=1e-12, atol=0)


def test_log_variances_at_the_ends_of_their_range():
    schedule = NoiseSchedule.from_config(CONFIGS["linear"], "20")
    ones = torch.ones(1, 1, 1, 1)
    for index in (0, 1, 19):
        lower, upper = learned_log_variance(schedule, index, -ones), learned_log_variance(schedule, index, ones)
        assert lower.item() == pytest.approx(schedule.posterior_log_variance[index].item(), rel=1e-6)
        assert upper.item() == pytest.approx(schedule.beta[index].log().item(), rel=1e-6)
    large, small = fixed_log_variance(schedule, "fixed_large"), fixed_log_variance(schedule, "fixed_small")
    assert large[0] == small[0] == schedule.posterior_variance[1].log()
    assert torch.equal(large[1:], schedule.beta[1:].log())
    assert torch.equal(small[1:], schedule.posterior_variance[1:].log())


def test_kl_equals_that_of_torch_distributions():
    mean, other_mean = torch.randn(5).double(), torch.randn(5).double()
    log_variance, other_log_variance = torch.randn(5).double(), torch.randn(5).double()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(other_mean, (0.5 * other_log_variance).exp()),
    )
    ours = gaussian_kl(mean, log_variance, other_mean, other_log_variance)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_bins_of_the_discretised_gaussian_add_up_to_one():
    values = torch.arange(256).double() / 127.5 - 1
    for mean, std in ((0.1, 0.3), (-0.95, 0.02), (1.2, 0.5)):
        log_likelihood = discretized_log_likelihood(values, torch.tensor(mean), torch.tensor(2 * math.log(std)))
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)
