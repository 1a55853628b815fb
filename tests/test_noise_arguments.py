"""Betas, timesteps and steps that noise schedules refuse."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from tiny_models import images, tiny_pipeline, tiny_scheduler

from diffusers_adm.betas import betas_from_config
from diffusers_adm.diffusion import NoiseSchedule, add_noise, renoise
from diffusers_adm.respacing import evenly_spaced_timesteps, trailing_timesteps


CONFIG = DDPMScheduler().config
BAD_ENTRIES = [
    ({"num_train_timesteps": 0}, "`num_train_timesteps` must be at least 1"),
    ({"num_train_timesteps": "10"}, "`num_train_timesteps` must be an integer"),
    ({"beta_start": "a"}, "`beta_start` must be a number"),
    ({"beta_start": -1.0}, r"must be in \(0, 1\)"),
    ({"beta_start": float("nan")}, "`beta_start` must be a number"),
    ({"beta_end": 1.5}, r"must be in \(0, 1\)"),
    ({"beta_schedule": None}, "`beta_schedule` must be a string"),
    ({"trained_betas": [0.1, 1.0]}, r"Betas must be in \(0, 1\), but 1 of 2"),
    ({"trained_betas": [0.1, float("nan")]}, r"Betas must be in \(0, 1\), but 1 of 2"),
    ({"trained_betas": ["a"]}, "Betas must be numbers"),
    ({"trained_betas": []}, "Betas must be real numbers, one per timestep"),
    ({"trained_betas": [[0.1, 0.2]]}, "Betas must be real numbers, one per timestep"),
]


@pytest.mark.parametrize("entry, message", BAD_ENTRIES)
def test_config_without_valid_betas_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config({**CONFIG, **entry})


@pytest.mark.parametrize("config", [None, "config", [], DDPMScheduler(), {"num_train_timesteps": 10}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="A scheduler's config must"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_pipeline_refuses_a_scheduler_whose_betas_are_none(scheduler_class):
    """Fast solvers refuse it too. They do not use the tables of [`NoiseSchedule`], and would return NaN silently."""
    with pytest.raises(ValueError, match=r"Betas must be in \(0, 1\)"):
        tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, trained_betas=[0.1] * 999 + [1.5]))
    with pytest.raises(ValueError, match=r"`beta_end` must be in \(0, 1\)"):
        tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, beta_end=1.5))


def test_pipeline_refuses_a_text_for_a_truth_value_of_the_scheduler():
    with pytest.raises(ValueError, match="`clip_sample` must be True or False, but got 'no'"):
        tiny_pipeline(scheduler=tiny_scheduler(clip_sample="no"))


@pytest.mark.parametrize("beta", [None, "a", 0.1, [0.1, 0.0], torch.tensor([0.1j]), torch.tensor([[0.1]])])
def test_betas_of_another_kind_are_refused(beta):
    with pytest.raises(ValueError, match="Betas must be"):
        NoiseSchedule.from_betas(beta)


@pytest.mark.parametrize("timesteps", [[], [5, 4], [2, 2], [-1, 3], [1000], [0.5], ["1"], 3, [[1, 2]], [True, False]])
def test_timesteps_that_are_not_ascending_integers_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        NoiseSchedule.from_config(CONFIG, timesteps)


def test_timesteps_and_betas_may_be_arrays():
    beta = np.linspace(1e-4, 0.02, 100)
    schedule = NoiseSchedule.from_betas(beta, np.array([3, 50]))
    assert torch.equal(schedule.alpha_bar, NoiseSchedule.from_betas(torch.from_numpy(beta), [3, 50]).alpha_bar)


@pytest.mark.parametrize("index", [-1, 1000, None, "5", True])
def test_step_that_does_not_exist_is_refused(index):
    """A negative index would count from the noisiest step."""
    with pytest.raises(ValueError, match="index"):
        add_noise(NoiseSchedule.from_config(CONFIG), images(), index, images())


@pytest.mark.parametrize(
    "changes",
    [
        {"x": images().numpy()},
        {"x": images().to(torch.complex64)},
        {"x": images()[:1]},
        {"noise": images()[0]},
        {"index": 1.5},
        {"to_index": None},
        {"to_index": torch.tensor(9)},
        {"to_index": 1000},
    ],
)
def test_renoise_refuses_arguments_of_another_kind(changes):
    with pytest.raises(ValueError):
        renoise(
            NoiseSchedule.from_config(CONFIG),
            **{"x": images(), "index": 5, "to_index": 9, "noise": images(), **changes},
        )


@pytest.mark.parametrize("function", [evenly_spaced_timesteps, trailing_timesteps])
@pytest.mark.parametrize("count, total", [(0, 10), (11, 10), ("5", 10), (2.5, 10), (None, 10), (True, 10), (5, None)])
def test_number_of_steps_of_another_kind_is_refused(function, count, total):
    with pytest.raises(ValueError, match="The number of steps must be"):
        function(count, total)


def test_the_cosine_schedule_has_no_use_for_the_ends_of_betas():
    config = {"num_train_timesteps": 4, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.025, "beta_end": 5.0}
    assert len(betas_from_config(config)) == 4
    with pytest.raises(ValueError, match="`beta_start` and `beta_end`"):
        betas_from_config({**config, "beta_schedule": "linear"})
