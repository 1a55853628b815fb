"""`ClassifierGuidedPipeline`: what a call takes, gives and refuses, on random models of the real classes."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.solvers import GUIDED_SETTINGS, SUPPORTED_SCHEDULERS


CPU = torch.device("cpu")
STEPS = 3
SCALE = 20.0  # random classifiers have small gradients
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark", 3: "ray", 4: "cock"}
SOLVERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddim eta": (DDIMScheduler, {"eta": 1.0}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solver_pipeline(solver: str, **kwargs) -> tuple[ClassifierGuidedPipeline, dict]:
    """A pipeline with the scheduler that `solver` names, and what a call needs beside."""
    scheduler_class, call = SOLVERS[solver]
    return tiny_pipeline(scheduler=tiny_scheduler(scheduler_class), **kwargs), call


def draw(pipeline: ClassifierGuidedPipeline, class_labels=(1, 3), **kwargs) -> torch.Tensor:
    """x_0 as it is, from a fixed seed and in few steps unless told otherwise."""
    if isinstance(class_labels, tuple):
        class_labels = list(class_labels)
    arguments = {"generator": seeded(), "output_type": "latent", "guidance_scale": SCALE, **kwargs}
    if "timestep_respacing" not in arguments:
        arguments.setdefault("num_inference_steps", STEPS)
    return pipeline(class_labels, **arguments).images


def visited(pipeline: ClassifierGuidedPipeline, **kwargs) -> list[int]:
    """The training timesteps that the UNet is given, in order."""
    timesteps = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: timesteps.append(args[1]))
    draw(pipeline, **{"class_labels": [0, 1], "guidance_scale": 0.0, **kwargs})
    hook.remove()
    assert all((timestep == timestep[0]).all() for timestep in timesteps)
    return [int(timestep[0]) for timestep in timesteps]


def rows_seen(module: torch.nn.Module) -> list[int]:
    """A list that collects the batch size of every call of a model."""
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    return rows


def labels_seen(module: torch.nn.Module) -> list:
    """A list that collects the labels of every call of a UNet."""
    labels = []
    module.register_forward_pre_hook(lambda _, args: labels.append(None if args[2] is None else args[2].tolist()))
    return labels


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first - second).abs().max().item() > 1e-3


# Labels


def test_label_may_be_given_in_any_form():
    pipeline = tiny_pipeline(id2label=NAMES)
    expected = draw(pipeline, [1, 3])
    forms = [
        [[1], [3]],
        ["goldfish", "ray"],
        [["goldfish"], 3],
        torch.tensor([1, 3]),
        torch.tensor([[1], [3]]),
        np.array([1, 3]),
        [torch.tensor(1), np.int64(3)],
        torch.tensor([1, 3], dtype=torch.int32),
    ]
    for form in forms:
        assert torch.equal(draw(pipeline, form), expected), form

    one = draw(pipeline, [1])
    for form in (1, "goldfish", torch.tensor(1), np.int64(1), np.array(1)):
        assert torch.equal(draw(pipeline, form), one), form
    assert one.shape == (1, 3, SIZE, SIZE)
    assert differ(one, draw(pipeline, [2]))


def test_synonyms_name_the_same_class():
    pipeline = tiny_pipeline(id2label=NAMES)
    assert pipeline.class_ids(["tench", "Tinca tinca", "tench, Tinca tinca"]) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"Several classes.*\[0, 1\]"):
        tiny_pipeline(id2label={0: "crane, bird", 1: "crane"}).class_ids("crane")


@every_solver
def test_random_labels_are_drawn_before_the_noise(solver):
    pipeline, call = solver_pipeline(solver)
    generator = seeded(7)
    labels = torch.randint(0, NUM_CLASSES, (3,), generator=generator)
    latents = torch.randn(3, 3, SIZE, SIZE, generator=generator)
    expected = draw(pipeline, labels, latents=latents, generator=generator, **call)
    assert torch.equal(draw(pipeline, None, batch_size=3, generator=seeded(7), **call), expected)


def test_random_labels_of_a_list_of_generators_are_those_of_each_alone():
    pipeline = tiny_pipeline()
    seen = labels_seen(pipeline.unet)
    draw(pipeline, None, batch_size=3, generator=[seeded(seed) for seed in range(3)], num_inference_steps=1)
    expected = [torch.randint(0, NUM_CLASSES, (1,), generator=seeded(seed)).item() for seed in range(3)]
    assert seen == [expected]


def test_random_labels_suit_every_model_that_receives_them():
    # Labels above what the smaller of the two knows would be an error.
    pipeline = tiny_pipeline(classifier=tiny_classifier(num_classes=2))
    seen = labels_seen(pipeline.unet)
    draw(pipeline, None, batch_size=32, num_inference_steps=1)
    assert set(seen[0]) == {0, 1}
    draw(pipeline, None, batch_size=32, num_inference_steps=1, guidance_scale=0)
    assert set(seen[1]) == set(range(NUM_CLASSES))


def test_models_without_classes_need_no_labels():
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    latents = images(2)
    output = draw(pipeline, None, batch_size=2, guidance_scale=None)
    assert output.shape == latents.shape and output.isfinite().all()
    # No label is drawn: the noise is the generator's first.
    noise = torch.randn(2, 3, SIZE, SIZE, generator=(generator := seeded()))
    assert torch.equal(draw(pipeline, None, latents=noise, generator=generator, guidance_scale=None), output)


# Seeds


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "ddim eta", "dpm++", "unipc"])
def test_batch_of_four_equals_four_batches_of_one(solver):
    pipeline, call = solver_pipeline(solver)
    labels, scales = [0, 4, 2, 2], [SCALE, 0.0, 2 * SCALE, SCALE]
    generators = [seeded(seed) for seed in range(10, 14)]
    together = draw(pipeline, labels, guidance_scale=scales, generator=generators, **call)
    for row in range(4):
        alone = draw(pipeline, labels[row], guidance_scale=scales[row], generator=[seeded(10 + row)], **call)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
        single = draw(pipeline, labels[row], guidance_scale=scales[row], generator=seeded(10 + row), **call)
        assert torch.equal(single, alone)
    assert differ(together[2], together[3])


@pytest.mark.parametrize("solver, noisy", [("ddpm", True), ("ddim", False), ("ddim eta", True)])
def test_noise_of_the_steps_comes_from_the_generator(solver, noisy):
    pipeline, call = solver_pipeline(solver)
    latents = images(2)
    first, again = (draw(pipeline, latents=latents, generator=seeded(5), **call) for _ in range(2))
    other = draw(pipeline, latents=latents, generator=seeded(6), **call)
    assert torch.equal(first, again)
    assert differ(first, other) == noisy


# Guidance


@every_solver
def test_only_images_with_a_scale_reach_the_classifier(solver):
    pipeline, call = solver_pipeline(solver)
    rows = rows_seen(pipeline.classifier)
    scales = [0.0, SCALE, 0.0, SCALE]
    generators = [seeded(seed) for seed in range(4)]
    output = draw(pipeline, [0, 1, 2, 3], guidance_scale=scales, generator=generators, **call)
    assert rows == [2] * STEPS
    for row, scale in enumerate(scales):
        alone = draw(pipeline, row, guidance_scale=scale, generator=[seeded(row)], **call)
        torch.testing.assert_close(output[row], alone[0], rtol=1e-4, atol=1e-4)


@every_solver
def test_scale_zero_is_a_pipeline_without_classifier(solver):
    pipeline, call = solver_pipeline(solver)
    rows = rows_seen(pipeline.classifier)
    plain, _ = solver_pipeline(solver, with_classifier=False)
    expected = draw(plain, guidance_scale=None, **call)
    assert torch.equal(draw(plain, guidance_scale=0, **call), expected)
    assert torch.equal(draw(pipeline, guidance_scale=0, **call), expected)
    assert torch.equal(draw(pipeline, guidance_scale=[0.0, 0.0], **call), expected)
    assert rows == []
    assert differ(draw(pipeline, **call), expected)
    assert rows == [2] * STEPS


@every_solver
def test_guidance_makes_the_label_likelier_to_the_classifier(solver):
    pipeline, call = solver_pipeline(solver)
    labels = torch.arange(NUM_CLASSES)

    @torch.no_grad()
    def log_probability(scale):
        output = draw(pipeline, labels, guidance_scale=scale, num_inference_steps=10, **call)
        logits = pipeline.classifier(output, torch.zeros(NUM_CLASSES, dtype=torch.long)).logits
        return logits.log_softmax(dim=-1)[labels, labels].mean().item()

    assert log_probability(-SCALE) < log_probability(0) < log_probability(SCALE)


def test_scale_may_be_a_number_a_list_or_a_tensor():
    pipeline = tiny_pipeline()
    expected = draw(pipeline)
    for scale in ([SCALE, SCALE], torch.tensor(SCALE), torch.tensor([SCALE, SCALE]), np.full(2, SCALE)):
        assert torch.equal(draw(pipeline, guidance_scale=scale), expected)
    assert torch.equal(draw(pipeline, guidance_scale=int(SCALE)), expected)


def test_scale_that_is_not_given_is_the_saved_default():
    default = tiny_pipeline()
    assert default.config.guidance_scale == 1.0
    assert torch.equal(draw(default, guidance_scale=None), draw(default, guidance_scale=1.0))
    saved = tiny_pipeline(guidance_scale=SCALE)
    assert torch.equal(draw(saved, guidance_scale=None), draw(default, guidance_scale=SCALE))
    without = tiny_pipeline(with_classifier=False, guidance_scale=SCALE)
    assert torch.equal(draw(without, guidance_scale=None), draw(default, guidance_scale=0))


@pytest.mark.parametrize("guidance_scale", [0.0, SCALE])
def test_condition_unet_false_runs_the_null_class(guidance_scale):
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True))
    seen = labels_seen(pipeline.unet)
    output = draw(pipeline, condition_unet=False, guidance_scale=guidance_scale)
    assert seen == [[NUM_CLASSES] * 2] * STEPS
    assert differ(output, draw(pipeline, guidance_scale=guidance_scale))

    # The same numbers from a UNet that has no classes: the null class's embedding is added to its time embedding.
    unconditional = tiny_unet(num_class_embeds=None)
    state_dict = pipeline.unet.state_dict()
    null = state_dict.pop("class_embedding.weight")[NUM_CLASSES]
    state_dict["time_embedding.mlp.linear_2.bias"] = state_dict["time_embedding.mlp.linear_2.bias"] + null
    unconditional.load_state_dict(state_dict)
    other = tiny_pipeline(unconditional)
    expected = draw(other, guidance_scale=guidance_scale)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(other, guidance_scale=guidance_scale, condition_unet=False), expected)


def test_condition_unet_false_without_guidance_leaves_labels_without_effect():
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True))
    arguments = {"condition_unet": False, "guidance_scale": 0}
    assert torch.equal(draw(pipeline, [0, 1], **arguments), draw(pipeline, [4, 2], **arguments))
    assert differ(draw(pipeline, [0, 1], condition_unet=False), draw(pipeline, [4, 2], condition_unet=False))


def test_condition_unet_false_on_a_conditional_unet_without_null_class_is_refused():
    with pytest.raises(ValueError, match="null class"):
        draw(tiny_pipeline(), condition_unet=False)


def test_unconditional_unet_with_a_classifier():
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None))
    seen = labels_seen(pipeline.unet)
    output = draw(pipeline, [1, 3])
    assert seen == [None] * STEPS
    assert differ(output, draw(pipeline, [0, 0]))
    assert torch.equal(draw(pipeline, [1, 3], guidance_scale=0), draw(pipeline, [0, 0], guidance_scale=0))


def test_conditional_unet_without_classifier():
    pipeline = tiny_pipeline(with_classifier=False)
    assert differ(draw(pipeline, [1, 3], guidance_scale=None), draw(pipeline, [0, 0], guidance_scale=None))


def test_unet_and_classifier_may_know_different_numbers_of_classes():
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), classifier=tiny_classifier(num_classes=3))
    assert draw(pipeline, [2, 2]).isfinite().all()
    with pytest.raises(ValueError, match=r"\[3\] are not in \[0, 2\]"):
        draw(pipeline, [2, 3])
    # A model that receives no label has no say.
    draw(pipeline, [3, 4], guidance_scale=0)
    with pytest.raises(ValueError, match=r"\[5\] are not in \[0, 4\]"):
        draw(pipeline, [3, 5], guidance_scale=0)

    larger = tiny_pipeline(tiny_unet(use_null_class=True), classifier=tiny_classifier(num_classes=9))
    with pytest.raises(ValueError, match=r"\[8\] are not in \[0, 4\]"):
        draw(larger, [8, 1])
    assert draw(larger, [8, 1], condition_unet=False).isfinite().all()


# Steps


def test_steps_that_are_not_given_are_the_saved_default():
    pipeline = tiny_pipeline(num_inference_steps=3)
    assert visited(pipeline, num_inference_steps=None) == [999, 500, 0]
    assert tiny_pipeline().config.num_inference_steps == 250
    respaced = tiny_pipeline(timestep_respacing="ddim4")
    assert visited(respaced, num_inference_steps=None) == [750, 500, 250, 0]
    assert visited(respaced, num_inference_steps=2) == [999, 0]


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_respacing_wins_over_the_number_of_steps_with_either_kind_of_string(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    for respacing, expected in {
        "3": [999, 500, 0],
        "ddim4": [750, 500, 250, 0],
        "2,1": [500, 499, 0],
    }.items():
        assert visited(pipeline, timestep_respacing=respacing, num_inference_steps=7) == expected
        assert pipeline.num_timesteps == len(expected)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_empty_respacing_takes_all_steps(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=7))
    assert visited(pipeline, timestep_respacing="") == [6, 5, 4, 3, 2, 1, 0]


def test_number_of_steps_on_ddim_is_an_integer_stride_where_one_gives_it():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    assert visited(pipeline, num_inference_steps=5) == [800, 600, 400, 200, 0]
    assert visited(pipeline, num_inference_steps=7) == list(range(0, 1000, 143))[::-1]
    # 101 steps: a stride of 9 gives 112, one of 10 gives 100.
    expected = [round(i * 1000 / 101) for i in range(101)]
    assert visited(pipeline, num_inference_steps=101) == expected[::-1]
    assert visited(pipeline, num_inference_steps=1) == [0]


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_number_of_training_timesteps_need_not_be_1000(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=90))
    assert visited(pipeline, num_inference_steps=3) == (
        [89, 44, 0] if scheduler_class is DDPMScheduler else [60, 30, 0]
    )
    assert visited(pipeline, num_inference_steps=90) == list(range(90))[::-1]
    with pytest.raises(ValueError, match=r"91 is not in \[1, 90\]"):
        draw(pipeline, num_inference_steps=91)


def test_scheduler_without_respacing_places_its_own_steps():
    for scheduler_class in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        scheduler = tiny_scheduler(scheduler_class)
        stock = scheduler_class.from_config(scheduler.config)
        stock.set_timesteps(5)
        assert visited(tiny_pipeline(scheduler=scheduler), num_inference_steps=5) == stock.timesteps.tolist()


@every_solver
def test_every_solver_takes_one_step_and_many(solver):
    pipeline, call = solver_pipeline(solver)
    for steps in (1, 2, 11):
        output = draw(pipeline, num_inference_steps=steps, **call)
        assert output.isfinite().all()
        assert pipeline.num_timesteps == steps


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_unguided_multistep_solver_without_clipping_is_the_stock_one(scheduler_class, karras):
    # There is no clipping in the stock class, nor does it know what to do with a learned variance.
    unet = tiny_unet()
    scheduler = tiny_scheduler(scheduler_class, use_karras_sigmas=karras)
    reference = scheduler_class.from_config(scheduler.config)
    scheduler.register_to_config(clip_sample=False)
    latents = expected = images(2)
    output = draw(tiny_pipeline(unet, scheduler), latents=latents, guidance_scale=0, num_inference_steps=6)
    reference.set_timesteps(6)
    with torch.no_grad():
        for timestep in reference.timesteps:
            epsilon = unet(expected, timestep, torch.tensor([1, 3])).sample[:, :3]
            expected = reference.step(epsilon, timestep, expected).prev_sample
    assert (output - expected).abs().max() < 2e-4 * expected.abs().max()


# Every second value lies beyond the threshold, which is far above 1 where guidance is strong.
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 1e3}


@pytest.mark.parametrize("options", [{}, THRESHOLDING])
@pytest.mark.parametrize("guidance_scale", [0.0, SCALE])
def test_first_order_multistep_solver_without_clipping_is_ddim(guidance_scale, options):
    # DPM-Solver++ of first order takes DDIM's steps (Lu et al. 2022, section 4), on the same timesteps.
    unet, call = tiny_unet(), {"latents": images(2), "guidance_scale": guidance_scale}
    scheduler = tiny_scheduler(DPMSolverMultistepScheduler, solver_order=1, timestep_spacing="leading", **options)
    scheduler.register_to_config(clip_sample=False)
    multistep = tiny_pipeline(unet, scheduler)
    ddim = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler, clip_sample=False, **options))
    timesteps = [800, 600, 400, 200]
    assert visited(multistep, num_inference_steps=4) == visited(ddim, timestep_respacing="0,1,1,1,1") == timesteps
    expected = draw(ddim, timestep_respacing="0,1,1,1,1", **call)
    output = draw(multistep, num_inference_steps=4, **call)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpm++", "unipc"])
def test_dynamic_thresholding_scales_x_0_back_to_its_range(solver):
    # Each image's x_0 is clipped at a quantile of its size, at least 1, and divided by it (Saharia et al. 2022, arXiv
    # 2205.11487, section 2.3).
    scheduler_class, call = SOLVERS[solver]
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, **THRESHOLDING))
    steps = {"timestep_respacing": "1"} if solver in ("ddpm", "ddim") else {"num_inference_steps": 1}
    (timestep,), latents = visited(pipeline, **steps), 4 * images(2)
    found = draw(pipeline, guidance_scale=0, latents=latents, **steps)
    with torch.no_grad():
        x_0 = pipeline.predict(latents, timestep, [1, 3]).x_0
    threshold = x_0.abs().flatten(1).quantile(0.5, dim=1).clamp(min=1)[:, None, None, None]
    assert (threshold > 1).any()
    torch.testing.assert_close(found, x_0.clamp(-threshold, threshold) / threshold, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler_class", GUIDED_SETTINGS)
def test_what_authors_advise_keeps_strongly_guided_images_in_their_range(scheduler_class):
    advised = scheduler_class.from_config(tiny_scheduler().config, **GUIDED_SETTINGS[scheduler_class])
    assert dict(advised.config) | GUIDED_SETTINGS[scheduler_class] == dict(advised.config)
    call = {"guidance_scale": 1e4, "num_inference_steps": 6}
    found = draw(tiny_pipeline(scheduler=advised), **call)
    assert 0.5 < found.abs().max() <= 1 + 1e-4
    assert draw(tiny_pipeline(scheduler=tiny_scheduler(scheduler_class)), **call).abs().max() > 1.01


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_schedulers_that_cannot_threshold_clip_whatever_they_were_made_of(scheduler_class):
    advised = DPMSolverMultistepScheduler.from_config(
        tiny_scheduler().config, **GUIDED_SETTINGS[DPMSolverMultistepScheduler]
    )
    pipeline = tiny_pipeline(scheduler=scheduler_class.from_config(advised.config))
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6, latents=4 * images(2)).abs().max() <= 1 + 1e-4


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "unipc"])
def test_x_0_is_clipped_before_guidance_and_never_after(solver):
    scheduler_class, call = SOLVERS[solver]
    # The last step returns x_0: without guidance it is within the range, and guidance moves it out. Strong guidance from
    # t = 500 in one step shows it on DDIM, whose last step is otherwise from t = 0, where there is hardly any noise.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    if solver == "ddim":
        assert pipeline.scheduler.config.clip_sample and pipeline.scheduler.config.clip_sample_range == 1.0
    plain = draw(pipeline, guidance_scale=0, num_inference_steps=6)
    assert plain.abs().max() <= 1 + 1e-4
    steps = {"timestep_respacing": "0,1"} if solver == "ddim" else {"num_inference_steps": 6}
    assert draw(pipeline, guidance_scale=1e4, **steps).abs().max() > 1.01
    pipeline.scheduler.register_to_config(clip_sample=False)  # read at each call
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6).abs().max() > 1.01
    pipeline.scheduler.register_to_config(clip_sample=True, clip_sample_range=0.25)
    assert draw(pipeline, guidance_scale=0, num_inference_steps=6).abs().max() <= 0.25 + 1e-4


def test_ddim_that_was_told_not_to_end_at_alpha_one_gives_numbers():
    # As configs of latent diffusion models say; its table is in float32, and ours in float64.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, set_alpha_to_one=False))
    assert draw(pipeline).isfinite().all()


def test_ddim_ends_at_the_least_noise_of_training_wherever_its_steps_end():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, set_alpha_to_one=False, clip_sample=False))
    found = draw(pipeline, timesteps=[300], guidance_scale=0.0, latents=images())
    predicted = pipeline.predict(images(), 300, [1, 3])
    alpha_bar = 1 - pipeline.scheduler.config.beta_start
    expected = alpha_bar**0.5 * predicted.x_0 + (1 - alpha_bar) ** 0.5 * predicted.epsilon
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_multistep_solver_that_would_stand_still_is_refused(scheduler_class):
    # As many steps as timesteps: the scheduler's spacing then visits one of them twice, which divides by zero.
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, num_train_timesteps=20))
    assert draw(pipeline, num_inference_steps=19).isfinite().all()
    refused(pipeline, "20", num_inference_steps=20)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_with_a_fixed_variance(variance_type):
    scheduler = tiny_scheduler(variance_type=variance_type)
    pipeline = tiny_pipeline(tiny_unet(out_channels=3), scheduler)
    output = draw(pipeline)
    assert output.shape == (2, 3, SIZE, SIZE) and output.isfinite().all()
    assert differ(output, draw(pipeline, guidance_scale=0))
    # A learned variance is not thrown away in silence.
    with pytest.raises(ValueError, match=variance_type):
        tiny_pipeline(tiny_unet(out_channels=6), scheduler)


def test_a_list_of_scales_is_as_long_as_the_batch():
    refused(tiny_pipeline(), "1 numbers were given as guidance_scale", guidance_scale=[SCALE])


@every_solver
def test_model_that_predicts_x_0(solver):
    scheduler_class, call = SOLVERS[solver]
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class, prediction_type="sample"))
    assert draw(pipeline, **call).isfinite().all()


@every_solver
def test_call_changes_no_component(solver):
    pipeline, call = solver_pipeline(solver)
    scheduler = pipeline.scheduler

    def state():
        tables = {name: value for name, value in vars(scheduler).items() if torch.is_tensor(value)}
        others = {name: repr(value) for name, value in vars(scheduler).items() if not torch.is_tensor(value)}
        return {name: value.clone() for name, value in tables.items()}, others, dict(scheduler.config)

    tables, others, config = state()
    flags = [parameter.requires_grad for parameter in pipeline.classifier.parameters()]
    pipeline.classifier.train()
    draw(pipeline, **call)
    tables_after, others_after, config_after = state()
    assert config == config_after and others == others_after and set(tables) == set(tables_after)
    assert all(torch.equal(tables[name], tables_after[name]) for name in tables)
    assert pipeline.scheduler is scheduler
    assert flags == [parameter.requires_grad for parameter in pipeline.classifier.parameters()]
    assert all(parameter.grad is None for parameter in pipeline.classifier.parameters())
    assert pipeline.classifier.training and not pipeline.unet.training


# Callbacks and progress


@every_solver
def test_callback_sees_the_latents_after_each_step(solver):
    pipeline, call = solver_pipeline(solver)
    seen = []

    def callback(called, step, timestep, kwargs):
        assert called is pipeline and set(kwargs) == {"latents"}
        seen.append((step, int(timestep), kwargs["latents"].clone()))
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback, **call)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == visited(pipeline, **call)
    assert torch.equal(seen[-1][2], output)
    assert differ(seen[0][2], seen[1][2])


@every_solver
def test_callback_changes_the_latents(solver):
    pipeline, call = solver_pipeline(solver)

    def zero_at(changed):
        def callback(_, step, timestep, kwargs):
            return {"latents": torch.zeros_like(kwargs["latents"])} if step == changed else {}

        return draw(pipeline, callback_on_step_end=callback, **call)

    assert not zero_at(STEPS - 1).any()
    assert zero_at(0).any() and differ(zero_at(0), draw(pipeline, **call))


@every_solver
def test_scale_that_a_callback_changes_takes_effect_at_the_next_step(solver):
    pipeline, call = solver_pipeline(solver)
    trail = {}

    def run(name, change):
        trail[name] = []

        def callback(called, step, timestep, kwargs):
            trail[name].append(kwargs["latents"].clone())
            if step == 1 and change is not None:
                called._guidance_scale = change
            return kwargs

        return draw(pipeline, callback_on_step_end=callback, num_inference_steps=4, **call)

    rows = rows_seen(pipeline.classifier)
    run("plain", None)
    assert pipeline.guidance_scale == SCALE and rows == [2] * 4
    run("stopped", 0.0)
    assert pipeline.guidance_scale == 0.0 and rows == [2] * (4 + 2)
    assert all(torch.equal(a, b) for a, b in zip(trail["plain"][:2], trail["stopped"][:2], strict=True))
    assert differ(trail["plain"][2], trail["stopped"][2])
    run("one image", [0.0, SCALE])
    assert rows == [2] * (4 + 2 + 2) + [1] * 2
    assert torch.equal(run("again", None), trail["plain"][-1]), "the change lasted beyond its call"


def test_scale_that_a_callback_changes_in_place_is_changed_for_this_run_alone():
    pipeline, given = tiny_pipeline(), torch.tensor([SCALE, SCALE])
    rows = rows_seen(pipeline.classifier)

    def stop(called, step, timestep, kwargs):
        called._guidance_scale *= 0
        return kwargs

    draw(pipeline, guidance_scale=given, callback_on_step_end=stop, num_inference_steps=3)
    assert rows == [2] and given.tolist() == [SCALE, SCALE]


def test_interruption_skips_the_steps_that_are_left():
    pipeline = tiny_pipeline()
    steps, latents = rows_seen(pipeline.unet), []

    def callback(called, step, timestep, kwargs):
        latents.append(kwargs["latents"])
        called._interrupt = step == 1
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback)
    assert len(steps) == 2 and torch.equal(output, latents[-1])
    assert pipeline.interrupt
    draw(pipeline)
    assert not pipeline.interrupt and len(steps) == 2 + STEPS


def test_callback_is_given_only_what_it_asks_for():
    pipeline = tiny_pipeline()
    seen = []
    draw(
        pipeline,
        callback_on_step_end=lambda *args: seen.append(args[3]) or {},
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * STEPS
    assert pipeline._callback_tensor_inputs == ["latents", "x_0", "gradient"]
    with pytest.raises(ValueError, match="'noise'.*latents"):
        draw(pipeline, callback_on_step_end_tensor_inputs=["noise"])


def test_progress_bar_counts_the_steps_and_can_be_switched_off(capfd):
    pipeline = tiny_pipeline()
    draw(pipeline)
    assert capfd.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="drawing")
    draw(pipeline, timestep_respacing="6")
    shown = capfd.readouterr().err
    assert "drawing" in shown and "6/6" in shown


# Outputs


def test_output_types_hold_the_same_images():
    pipeline = tiny_pipeline()
    latent, pt, array, pil = (draw(pipeline, output_type=name) for name in ("latent", "pt", "np", "pil"))
    assert latent.dtype == torch.float32
    assert pt.shape == (2, 3, SIZE, SIZE) and torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert array.shape == (2, SIZE, SIZE, 3) and np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert pt.min() >= 0 and pt.max() <= 1
    assert [type(image) for image in pil] == [Image.Image] * 2
    for image, expected in zip(pil, array, strict=True):
        assert image.mode == "RGB" and image.size == (SIZE, SIZE)
        assert np.array_equal(np.asarray(image), (expected * 255).round().astype("uint8"))


def test_one_channel_gives_grey_images():
    pipeline = tiny_pipeline(tiny_unet(in_channels=1, out_channels=2), classifier=tiny_classifier(in_channels=1))
    assert draw(pipeline).shape == (2, 1, SIZE, SIZE)
    array = draw(pipeline, output_type="np")
    assert array.shape == (2, SIZE, SIZE, 1)
    pil = draw(pipeline, output_type="pil")
    assert [image.mode for image in pil] == ["L", "L"]
    assert np.array_equal(np.asarray(pil[0]), (array[0, :, :, 0] * 255).round().astype("uint8"))


def test_return_dict_false_gives_a_tuple():
    pipeline = tiny_pipeline()
    output = pipeline(
        [1, 3],
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
        generator=seeded(),
        output_type="latent",
        return_dict=False,
    )
    assert type(output) is tuple and len(output) == 1
    assert torch.equal(output[0], draw(pipeline))


def test_default_output_is_pil():
    assert isinstance(tiny_pipeline()(1, num_inference_steps=1).images[0], Image.Image)


def test_height_and_width_may_differ_from_the_default():
    pipeline = tiny_pipeline(classifier=tiny_classifier("adaptive"))
    assert draw(pipeline, height=4, width=12).shape == (2, 3, 4, 12)
    assert draw(pipeline, output_type="pil", height=4, width=12)[0].size == (12, 4)
    latents = images(2, height=4, width=12)
    assert draw(pipeline, height=4, width=12, latents=latents).shape == latents.shape


def test_size_that_the_attention_pool_does_not_take_is_refused():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="sample_size"):
        draw(pipeline, height=16, width=16)
    assert draw(pipeline, height=16, width=16, guidance_scale=0).shape == (2, 3, 16, 16)


def test_latents_that_are_given_are_where_the_run_starts():
    pipeline, _ = solver_pipeline("ddim")
    latents = images(2)
    kept = latents.clone()
    assert torch.equal(draw(pipeline, latents=latents, generator=seeded(1)), draw(pipeline, latents=latents))
    assert torch.equal(latents, kept)
    assert differ(draw(pipeline, latents=latents), draw(pipeline))
    half = draw(pipeline, latents=latents.half())
    assert half.dtype == torch.float32 and torch.equal(half, draw(pipeline, latents=latents.half().float()))


# Saving and loading


@pytest.mark.parametrize("with_classifier", [True, False], ids=["classifier", "no classifier"])
@every_solver
def test_saved_pipeline_draws_equal_images(solver, with_classifier, tmp_path):
    pipeline, call = solver_pipeline(
        solver,
        with_classifier=with_classifier,
        id2label=NAMES,
        guidance_scale=SCALE,
        num_inference_steps=STEPS,
    )
    pipeline.save_pretrained(tmp_path)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.classifier is None) != with_classifier
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert loaded.config.id2label == NAMES and all(type(label) is int for label in loaded.config.id2label)
    arguments = {"generator": seeded(), "output_type": "latent", **call}
    output = loaded(["goldfish", "ray"], **arguments).images
    assert torch.equal(output, draw(pipeline, guidance_scale=None, num_inference_steps=None, **call))

    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "model_index.json").read_text())
    first = json.loads((tmp_path / "model_index.json").read_text())
    assert {**again, "_name_or_path": None} == {**first, "_name_or_path": None}


def test_component_may_be_left_out_or_replaced_when_loading(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    without = ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=None)
    assert without.classifier is None
    other = tiny_classifier(seed=9)
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=other).classifier is other


def test_pipeline_saved_in_half_precision_with_a_variant(tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16", safe_serialization=True)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == loaded.classifier.dtype == torch.float16


# What diffusers' own pipeline tester expects


def test_components_make_another_pipeline():
    pipeline = tiny_pipeline(id2label=NAMES)
    other = ClassifierGuidedPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    assert set(pipeline.components) == {"unet", "scheduler", "classifier"}
    assert torch.equal(draw(other), draw(pipeline))
    ddim = ClassifierGuidedPipeline.from_pipe(pipeline, scheduler=tiny_scheduler(DDIMScheduler))
    assert ddim.unet is pipeline.unet and isinstance(ddim.scheduler, DDIMScheduler)


def test_scheduler_made_from_anothers_config_works():
    pipeline = tiny_pipeline()
    for scheduler_class in SUPPORTED_SCHEDULERS:
        settings = {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {}
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **settings)
        assert draw(pipeline).isfinite().all()


def test_pipeline_declares_what_diffusers_reads():
    assert issubclass(ClassifierGuidedPipeline, DiffusionPipeline)
    assert ClassifierGuidedPipeline._optional_components == ["classifier"]
    assert ClassifierGuidedPipeline.model_cpu_offload_seq.split("->") == ["unet", "classifier"]
    assert ClassifierGuidedPipeline._callback_tensor_inputs == ["latents", "x_0", "gradient"]
    assert tiny_pipeline(with_classifier=False).classifier is None


# Precision and memory


@every_solver
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_pipeline_under_inference_mode_and_with_gradients_on(solver, mode):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    with mode():
        output = draw(pipeline, **call)
        drawn = draw(pipeline, None, batch_size=2, guidance_scale=[0.0, SCALE], **call)
    assert torch.equal(output, expected) and not output.requires_grad
    assert drawn.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_solver
def test_half_precision_keeps_the_samplers_maths_in_float32(solver, dtype):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    pipeline.to(dtype)
    inputs, latents = [], []
    pipeline.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))

    def callback(_, step, timestep, kwargs):
        latents.append(kwargs["latents"].dtype)
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback, **call)
    assert inputs == [dtype] * STEPS and latents == [torch.float32] * STEPS
    assert output.dtype == torch.float32 and output.isfinite().all()
    assert (output - expected).norm() < 0.25 * expected.norm()
    noise = torch.randn(2, 3, SIZE, SIZE, generator=(generator := seeded()))
    assert torch.equal(draw(pipeline, latents=noise, generator=generator, **call), output), "x_T was rounded"


OFFLOADS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_guided_run_is_the_same_under_group_offloading(solver, offload, to_disk, tmp_path):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    for name in ("unet", "classifier"):
        path = str(tmp_path / name) if to_disk else None
        getattr(pipeline, name).enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **OFFLOADS[offload]
        )
    assert torch.equal(draw(pipeline, **call), expected)
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, **call), expected)


def test_pipeline_wide_group_offloading_gives_the_same():
    pipeline = tiny_pipeline()
    expected = draw(pipeline)
    pipeline.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert torch.equal(draw(pipeline), expected)


@every_solver
def test_guided_run_under_layerwise_casting_is_that_of_the_rounded_weights(solver):
    rounded, call = solver_pipeline(solver)
    plain = draw(rounded, **call)
    for model in (rounded.unet, rounded.classifier):
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "embedding" not in name:
                    for parameter in module.parameters():
                        parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    expected = draw(rounded, **call)
    assert differ(expected, plain)

    pipeline, _ = solver_pipeline(solver)
    for model in (pipeline.unet, pipeline.classifier):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(draw(pipeline, **call), expected)
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, **call), expected)


@pytest.mark.gpu
@every_solver
def test_model_cpu_offload_gives_the_same(solver):
    pipeline, call = solver_pipeline(solver)
    device = torch.accelerator.current_accelerator()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = draw(pipeline.to(device), generator=generators, **call).cpu()
    pipeline.to("cpu")
    pipeline.enable_model_cpu_offload(device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    output = draw(pipeline, generator=generators, **call).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert {model.device.type for model in (pipeline.unet, pipeline.classifier)} == {"cpu"}


# Bad input


def refused(pipeline: ClassifierGuidedPipeline, *messages: str, **call) -> None:
    """Asserts that a call raises a ValueError that holds each message, before the UNet runs."""
    rows = rows_seen(pipeline.unet)
    with pytest.raises(ValueError) as error:
        draw(pipeline, **call)
    for message in messages:
        assert message in str(error.value), str(error.value)
    assert rows == []


BAD_CALLS = {
    "label above the range": ({"class_labels": [1, 5]}, ["5", "[0, 4]"]),
    "label below the range": ({"class_labels": [-1, 0]}, ["-1", "[0, 4]"]),
    "null class is no label": ({"class_labels": NUM_CLASSES}, ["5", "[0, 4]"]),
    "label that is no number": ({"class_labels": [1.5, 2]}, ["1.5"]),
    "label that is a truth value": ({"class_labels": True}, ["True"]),
    "tensor of floats": ({"class_labels": torch.tensor([0.5, 1.0])}, ["0.5"]),
    "unknown name": ({"class_labels": ["goldfsh", "ray"]}, ["goldfsh", "goldfish"]),
    "name in other letters": ({"class_labels": "GOLDFISH"}, ["GOLDFISH"]),
    "no labels": ({"class_labels": []}, ["0", "at least 1"]),
    "labels and batch size": ({"class_labels": [1, 2], "batch_size": 3}, ["2", "3"]),
    "labels and latents": ({"class_labels": [1, 2], "latents": images(3)}, ["2", "3"]),
    "batch of none": ({"class_labels": None, "batch_size": 0}, ["0", "at least 1"]),
    "number of scales": ({"guidance_scale": [1.0, 2.0, 3.0]}, ["3", "2"]),
    "no scales": ({"guidance_scale": []}, ["0", "2"]),
    "infinite scale": ({"guidance_scale": float("inf")}, ["inf", "finite"]),
    "scale that is not a number": ({"guidance_scale": [1.0, float("nan")]}, ["nan", "finite"]),
    "number of generators": ({"generator": [seeded()] * 3}, ["3", "2"]),
    "a generator missing": ({"generator": [None, seeded()]}, ["torch.Generator", "None"]),
    "no steps": ({"num_inference_steps": 0}, ["0", "[1, 1000]"]),
    "negative steps": ({"num_inference_steps": -5}, ["-5", "[1, 1000]"]),
    "too many steps": ({"num_inference_steps": 1001}, ["1001", "[1, 1000]"]),
    "respacing that is no number": ({"timestep_respacing": "fast"}, ["fast", "ddim25"]),
    "respacing of more than there are": ({"timestep_respacing": "600,600"}, ["600,600", "500"]),
    "respacing without a stride": ({"timestep_respacing": "ddim101"}, ["ddim101", "1000"]),
    "respacing of none": ({"timestep_respacing": "0"}, ["0"]),
    "respacing that is no string": ({"timestep_respacing": 250}, ["250", "ddim25"]),
    "respacing by no ddim steps": ({"timestep_respacing": "ddim0"}, ["ddim0"]),
    "negative respacing": ({"timestep_respacing": "-3"}, ["-3"]),
    "eta of ddpm": ({"eta": 0.5}, ["0.5", "DDIMScheduler"]),
    "eta out of range": ({"eta": 1.5}, ["1.5", "[0, 1]"]),
    "output type": ({"output_type": "jpeg"}, ["jpeg", "pil"]),
    "height": ({"height": 7}, ["7", "2"]),
    "width": ({"width": 9}, ["9", "2"]),
    "height below zero": ({"height": -8}, ["-8"]),
    "height of zero": ({"height": 0}, ["0"]),
    "shape of latents": ({"latents": images(2, height=4)}, ["(2, 3, 4, 8)", "(2, 3, 8, 8)"]),
    "channels of latents": ({"latents": images(2, channels=1)}, ["(2, 1, 8, 8)", "(2, 3, 8, 8)"]),
    "callback's tensors": ({"callback_on_step_end_tensor_inputs": ["latent"]}, ["latent", "latents"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_with_what_was_given_and_what_is_allowed(name):
    call, messages = BAD_CALLS[name]
    refused(tiny_pipeline(id2label=NAMES), *messages, **call)


@pytest.mark.parametrize("name", ["unet", "classifier", "guiding_unet"])
def test_dropout_is_refused(name):
    model = tiny_classifier(dropout=0.1) if name == "classifier" else tiny_unet(use_null_class=True, dropout=0.1)
    parts = {} if name == "guiding_unet" else {name: model}
    pipeline, call = tiny_pipeline(**parts), {"guiding_unet": model, "cfg_weight": 1.0} if not parts else {}
    assert draw(pipeline, **call).isfinite().all()
    model.train()
    refused(pipeline, f"The {name} is in training mode", **call)


def test_name_without_names_is_refused():
    refused(tiny_pipeline(), "goldfish", "id2label", class_labels=["goldfish", "ray"])


def test_scale_without_classifier_is_refused():
    refused(tiny_pipeline(with_classifier=False), "1.5", "classifier", guidance_scale=1.5)
    refused(tiny_pipeline(with_classifier=False), "classifier", guidance_scale=[0.0, 2.0])


def test_scale_without_classifier_that_a_callback_sets_is_refused():
    pipeline = tiny_pipeline(with_classifier=False)

    def callback(called, step, timestep, kwargs):
        called._guidance_scale = 2.0
        return kwargs

    with pytest.raises(ValueError, match="classifier"):
        draw(pipeline, guidance_scale=None, callback_on_step_end=callback)


def test_labels_for_models_without_classes_are_refused():
    refused(tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False), "class", guidance_scale=None)


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_respacing_of_a_scheduler_that_places_its_own_steps_is_refused(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    refused(pipeline, "ddim25", "DDPMScheduler", scheduler_class.__name__, timestep_respacing="ddim25")


@pytest.mark.parametrize("scheduler_class", [IPNDMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_unsupported_scheduler_is_refused_with_the_list_that_is(scheduler_class):
    pipeline = tiny_pipeline()
    for attempt in (
        lambda: tiny_pipeline(scheduler=scheduler_class()),
        lambda: draw(setattr(pipeline, "scheduler", scheduler_class()) or pipeline),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert scheduler_class.__name__ in str(error.value)
        for supported in SUPPORTED_SCHEDULERS:
            assert supported.__name__ in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
    ],
)
def test_scheduler_config_that_cannot_be_sampled_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(scheduler=tiny_scheduler(DDPMScheduler, **config)))


@pytest.mark.parametrize(
    "classifier, message",
    [
        ({"sample_size": 16, "attention_resolutions": (8,)}, "sample_size: 8 and 16"),
        ({"in_channels": 1}, "in_channels: 3 and 1"),
    ],
)
def test_classifier_and_unet_that_differ_are_refused(classifier, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(classifier=tiny_classifier(**classifier))


def test_runge_kutta_steps_of_pndm_are_refused():
    with pytest.raises(ValueError, match="skip_prk_steps=False"):
        tiny_pipeline(scheduler=tiny_scheduler(PNDMScheduler, skip_prk_steps=False))


def test_learned_variance_that_the_unet_does_not_give_is_refused():
    with pytest.raises(ValueError, match="learned_range.*out_channels=3"):
        tiny_pipeline(tiny_unet(out_channels=3))


def test_upsampler_is_refused():
    with pytest.raises(ValueError, match="low_res_conditioning"):
        tiny_pipeline(tiny_unet(low_res_conditioning=True))
