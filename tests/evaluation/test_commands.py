"""Options of the command line, and names of schedulers."""

from dataclasses import fields

from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from tiny_models import tiny_pipeline

from diffusers_adm.evaluation.commands.sampling_options import PARSERS
from diffusers_adm.evaluation.options import PRECONDITIONED_SCHEDULERS, SAMPLING_OPTIONS, SCHEDULERS
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.solvers import GUIDED_SETTINGS, SIGMA_SCHEDULERS, SUPPORTED_SCHEDULERS


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


def test_schedulers_keep_a_noise_schedule_of_default_betas():
    pipeline = tiny_pipeline(scheduler=DDPMScheduler(variance_type="learned_range"))
    # Other classes have other defaults.
    set_scheduler(pipeline, "HeunDiscrete")
    assert (pipeline.scheduler.config.beta_start, pipeline.scheduler.config.beta_end) == (0.0001, 0.02)


def test_all_supported_schedulers_have_a_name():
    assert {f"{name}Scheduler" for name in SCHEDULERS if "-" not in name} == {
        scheduler_class.__name__ for scheduler_class in SUPPORTED_SCHEDULERS
    }
    assert {f"{name}Scheduler" for name in PRECONDITIONED_SCHEDULERS} == {
        scheduler_class.__name__ for scheduler_class in SIGMA_SCHEDULERS if scheduler_class not in SUPPORTED_SCHEDULERS
    }
    guided = {name.removesuffix("-guided") for name in SCHEDULERS if name.endswith("-guided")}
    assert guided == {scheduler_class.__name__.removesuffix("Scheduler") for scheduler_class in GUIDED_SETTINGS}


def test_whatever_a_call_takes_is_an_option():
    without_words = {"with_gradients"}  # gradients end with the process
    assert (
        PARSERS.keys() == SAMPLING_OPTIONS.keys() == {field.name for field in fields(SamplingOptions)} - without_words
    )
    for name, word, value in (
        ("guidance_scale", "-1.5", -1.5),
        ("guidance_scale", "1e-1", 0.1),
        ("guidance_scale", "none", None),
        ("num_inference_steps", "25", 25),
        ("condition_unet", "False", False),
        ("timestep_respacing", "250", "250"),
        ("timesteps", "[90, 60]", [90, 60]),
        ("guidance_options", '{"schedule": "Linear"}', {"schedule": "Linear"}),
    ):
        assert PARSERS[name](word) == value
