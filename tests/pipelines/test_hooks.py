"""Interfaces for research (predictions with gradients, hooks, jumps in time, inversion) and the worked examples."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm.command_line import run_command
from diffusers_adm.diffusion import NoiseSchedule, add_noise, learned_log_variance, renoise, x_0_from_epsilon
from diffusers_adm.examples import anomaly_map, counterfactual, ddnm, digits, dps, repaint, sdedit, symmetry
from diffusers_adm.guidance import classifier_gradient


LABELS = [1, 3]


def draw(pipeline, **call) -> torch.Tensor:
    arguments = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent", **call}
    return pipeline(LABELS, generator=torch.Generator().manual_seed(0), **arguments).images


def test_prediction_has_gradients_through_frozen_weights():
    pipeline = tiny_pipeline()
    pipeline.unet.requires_grad_(False)
    x_t = images().requires_grad_()
    timestep = torch.tensor([5, 200])
    found = pipeline.predict(x_t, timestep, LABELS)
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        output = pipeline.unet(x_t, timestep, torch.tensor(LABELS)).sample
    torch.testing.assert_close(found.epsilon, output[:, :3])
    torch.testing.assert_close(found.log_variance, learned_log_variance(schedule, timestep, output[:, 3:]))
    x_0 = x_0_from_epsilon(schedule, x_t.detach(), timestep, output[:, :3])
    torch.testing.assert_close(found.x_0, x_0)
    torch.testing.assert_close(found.x_0_clipped, x_0.clamp(-1, 1))
    (gradient,) = torch.autograd.grad(found.x_0.square().sum(), x_t)
    step, direction = 1e-2, images(seed=4)
    ends = [pipeline.predict(x_t.detach() + sign * step * direction, timestep, LABELS).x_0 for sign in (1, -1)]
    slope = (ends[0].square().sum() - ends[1].square().sum()).item() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-2)


def test_prediction_of_fixed_variance_and_of_x_0():
    unet = tiny_unet(out_channels=3)
    scheduler = tiny_scheduler(variance_type="fixed_large", prediction_type="sample")
    pipeline = tiny_pipeline(unet, scheduler)
    found = pipeline.predict(images(), 300, LABELS)
    schedule = NoiseSchedule.from_config(scheduler.config)
    torch.testing.assert_close(found.x_0, unet(images(), 300, torch.tensor(LABELS)).sample)
    torch.testing.assert_close(
        x_0_from_epsilon(schedule, images(), 300, found.epsilon), found.x_0, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(found.log_variance.flatten(), schedule.log_beta[300].float().repeat(2))


def test_callback_is_given_x_0_and_the_gradient():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    before, after = [], []
    call = {
        "guidance_scale": [0.0, 5.0],
        "guidance_options": {"step_fractions": (0.0, 0.5)},
        "callback_on_step_start": lambda _, step, timestep, kwargs: before.append((timestep, kwargs["latents"])) or {},
        "callback_on_step_end": lambda _, step, timestep, kwargs: after.append(kwargs) or {},
        "callback_on_step_end_tensor_inputs": ["x_0", "gradient"],
    }
    draw(pipeline, **call)
    for step, ((timestep, x_t), found) in enumerate(zip(before, after, strict=True)):
        predicted = pipeline.predict(x_t, timestep, LABELS)
        torch.testing.assert_close(found["x_0"], predicted.x_0_clipped)
        if step >= 2:
            assert found["gradient"] is None
            continue
        expected = classifier_gradient(pipeline.classifier, x_t, timestep.expand(2), torch.tensor(LABELS))
        torch.testing.assert_close(found["gradient"][1], 5.0 * expected[1])
        assert not found["gradient"][0].any()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"x_0_fn": lambda x_0, timestep: x_0[:1]}, r"output of `x_0_fn` must be .* but got \(1, 3, 8, 8\)"),
        ({"x_0_fn": lambda x_0, timestep: None}, "output of `x_0_fn` must be .* but got NoneType"),
        (
            {"x_0_fn": lambda x_0, timestep: x_0 / (timestep > 300)},
            "output of `x_0_fn` for image 0 is not finite at step 2",
        ),
        ({"x_0_fn": 5}, "`x_0_fn` must be a function, but got int"),
        (
            {"callback_on_step_start": lambda *_: None},
            "`callback_on_step_start` must return a dict, .* returned NoneType",
        ),
        ({"callback_on_step_end": lambda *_: None}, "`callback_on_step_end` must return a dict, .* returned NoneType"),
        (
            {"callback_on_step_end": lambda *_: {"latents": None}},
            "latents that `callback_on_step_end` returns must be .* but got NoneType",
        ),
        (
            {"callback_on_step_start": lambda _, step, timestep, kwargs: {"latents": kwargs["latents"][:1]}},
            r"latents that `callback_on_step_start` returns must be .* but got \(1, 3, 8, 8\)",
        ),
        ({"guidance_fn": "a"}, "`guidance_fn` must be a function, but got str"),
        ({"guidance_fn": tiny_classifier()}, "`guidance_fn` must be a function, but got NoisyClassifier"),
        ({"weaker": "a", "cfg_weight": 1.0}, "`weaker` must be one of .*, but got .a.\\."),
        ({"weaker": tiny_unet(seed=7)}, "`weaker` requires a `cfg_weight`"),
        (
            {"cfg_weight": 1e40, "weaker": tiny_unet(seed=7)},
            r"`cfg_weight` must be finite, .*, but got 1e\+40",
        ),
    ],
)
def test_hooks_that_return_something_else_are_told(call, said):
    with pytest.raises(ValueError, match=said):
        draw(tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler)), **call)


@pytest.mark.parametrize(
    ("timestep", "labels", "said"),
    [(1000, LABELS, "1000"), (0.5, LABELS, "0.5"), (3, [1, 5], "5"), ([3] * 3, LABELS, "3"), (3, [1], "1")],
)
def test_prediction_refuses_what_is_not_there(timestep, labels, said):
    with pytest.raises(ValueError, match=said):
        tiny_pipeline().predict(images(), timestep, labels)


def test_epsilon_view_serves_callers_that_know_three_channels():
    unet = tiny_unet()
    view = unet.epsilon_view(torch.tensor(LABELS))
    x_t = images().requires_grad_()
    assert view.config.in_channels == view.config.out_channels == 3 and view.config.sample_size == SIZE
    assert unet.config.out_channels == 6 and view.dtype == torch.float32
    # As diffusers' community pipeline for DPS calls them.
    scheduler = DDPMScheduler.from_config(tiny_scheduler().config, variance_type="fixed_small")
    scheduler.set_timesteps(10)
    output = view(x_t, scheduler.timesteps[3]).sample
    torch.testing.assert_close(output, unet(x_t, scheduler.timesteps[3], torch.tensor(LABELS)).sample[:, :3])
    x_0 = scheduler.step(output, scheduler.timesteps[3], x_t).pred_original_sample
    (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(x_0), x_t)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert torch.equal(
        view(x_t, 5, torch.tensor([0, 0]), return_dict=False)[0], view(x_t, 5, torch.tensor([0, 0])).sample
    )
    assert view.to("meta").class_labels.is_meta  # labels go where the weights go


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_hooks_see_and_change_each_step(scheduler_class):
    pipeline, seen = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class)), []
    states = []

    def before(pipe, step, timestep, tensors):
        seen.append(("before", step, int(timestep)))
        states.append(tensors["latents"].clone())
        return tensors

    def x_0_fn(x_0, timestep):
        seen.append(("x_0", None, int(timestep)))
        assert x_0.abs().max() <= 1
        return x_0

    def after(pipe, step, timestep, tensors):
        seen.append(("after", step, int(timestep)))
        states.append(tensors["latents"].clone())
        return tensors

    hooks = {"callback_on_step_start": before, "x_0_fn": x_0_fn, "callback_on_step_end": after}
    assert torch.equal(draw(pipeline, **hooks), draw(pipeline))  # what only looks changes nothing
    assert [kind for kind, *_ in seen] == ["before", "x_0", "after"] * 4
    assert len({timestep for *_, timestep in seen[:3]}) == 1 and seen[0][2] > seen[-1][2]
    assert torch.equal(states[1], states[2])  # after a step is before the next

    target = torch.full((2, 3, SIZE, SIZE), 0.25)
    torch.testing.assert_close(draw(pipeline, x_0_fn=lambda x_0, timestep: target), target, rtol=0, atol=2e-2)
    started = draw(pipeline, callback_on_step_start=lambda *_: {"latents": torch.zeros(2, 3, SIZE, SIZE)})
    assert (started - draw(pipeline)).abs().max() > 1e-3


def test_timesteps_are_visited_as_they_are_listed():
    pipeline, seen, states = tiny_pipeline(), [], []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append((int(args[1][0]), args[0].clone())))
    after = {"callback_on_step_end": lambda _, step, t, tensors: states.append(tensors["latents"].clone()) or tensors}
    listed = [300, 200, 300, 200, 100, 0]
    draw(pipeline, timesteps=listed, **after)
    assert [timestep for timestep, _ in seen] == listed
    # Between the second step, which leads to timestep 100, and the third noise is added up to timestep 300.
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, sorted(set(listed)))
    kept = schedule.alpha_bar[3].item() / schedule.alpha_bar[1].item()
    added = (seen[2][1] - kept**0.5 * states[1]) / (1 - kept) ** 0.5
    assert added.mean().abs() < 0.15 and 0.92 < added.std() < 1.08
    assert (added * states[1]).mean().abs() < 0.15 * states[1].square().mean()
    assert torch.equal(seen[3][1], states[2])

    descending = NoiseSchedule.from_config(pipeline.scheduler.config, "4").timesteps.flip(0).tolist()
    assert torch.equal(draw(pipeline, timesteps=descending), draw(pipeline))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"timesteps": []}, "one or more integers"),
        ({"timesteps": [1000, 0]}, "one or more integers"),
        ({"timesteps": [900, 300, 600, 300, 0]}, "skips 600"),
        ({"timesteps": [900, 600, 300, 600]}, "end with the least noisy"),
    ],
)
def test_timesteps_that_cannot_be_visited_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        draw(tiny_pipeline(), **call)


def test_renoising_composes_to_the_forward_process():
    schedule = NoiseSchedule.from_config(tiny_scheduler().config)
    x_0, generator = torch.full((1, 1, 200, 200), 0.7), torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(x_0.shape, generator=generator)

    torch.testing.assert_close(renoise(schedule, x_0, -1, 400, x_0), add_noise(schedule, x_0, 400, x_0))
    twice = renoise(schedule, renoise(schedule, x_0, -1, 150, noise()), 150, 400, noise())
    direct = add_noise(schedule, x_0, 400, noise())
    assert twice.mean().item() == pytest.approx(direct.mean().item(), abs=0.02)
    assert twice.std().item() == pytest.approx(direct.std().item(), rel=0.02)
    beta = schedule.beta[401].item()
    expected = (1 - beta) ** 0.5 * x_0 + beta**0.5 * x_0  # one step: q(x_t | x_{t-1})
    torch.testing.assert_close(renoise(schedule, x_0, 400, 401, x_0), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="to_index=5 and index=5"):
        renoise(schedule, x_0, 5, 5, x_0)


def test_inverted_images_are_drawn_again():
    """Uses the default model, because the ODE of a random network does not lead to images."""
    pipeline = digits.quiet_pipeline(ddim=True)
    whole = digits.draw(pipeline, 4, seed=100, num_inference_steps=25, guidance_scale=1.0)
    errors = []
    for steps in (10, 50):
        labels = list(range(4))
        x_t = pipeline.invert(whole, labels, num_inference_steps=steps)
        again = pipeline(
            labels, guidance_scale=0.0, num_inference_steps=steps, latents=x_t, output_type="latent"
        ).images
        errors.append((again - whole).square().mean().sqrt().item())
    assert errors[1] < errors[0] and errors[1] < 0.12, errors
    assert 0.7 < x_t.std() < 1.2  # clipping takes noise away where digits are black


def test_repaint_keeps_what_is_known_and_draws_the_rest():
    pipeline, known = digits.quiet_pipeline(), digits.true_digits(3)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16, :] = 1
    timesteps = repaint.jumping_timesteps(10, jump_length=3, jump_count=2)
    assert timesteps == [900, 800, 700, 900, 800, 700, 600, 500, 400, 600, 500, 400, 300, 200, 100, 300, 200, 100, 0]
    assert repaint.jumping_timesteps(600, 10, 1)[:3] == [998, 996, 995]  # begins at pure noise
    drawn = repaint.inpaint(pipeline, known, mask, repaint.jumping_timesteps(20, 5, 2))
    assert torch.equal(drawn[..., :16, :], known[..., :16, :])
    below = (drawn[..., 16:, :] - known[..., 16:, :]).abs().mean()
    assert below < 0.5 * (-1 - known[..., 16:, :]).abs().mean() + 0.1  # nearer to the digit than nothing is


def test_ddnm_agrees_with_the_small_image():
    pipeline, whole = digits.quiet_pipeline(ddim=True), digits.true_digits(3)
    small = ddnm.shrink(whole)
    drawn = ddnm.super_resolve(pipeline, small, steps=10)
    assert (ddnm.shrink(drawn) - small).abs().mean() < 0.03
    assert (drawn - whole).abs().mean() < (ddnm.enlarge(small) - whole).abs().mean()


def test_dps_restores_what_was_measured():
    pipeline, whole = digits.quiet_pipeline(), digits.true_digits(3)
    measured = dps.blur(whole) + 0.05 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    drawn = dps.restore(pipeline, measured, steps=25)
    assert (drawn - whole).abs().mean() < 0.6 * (measured - whole).abs().mean()


def test_a_function_of_ones_own_makes_digits_symmetric():
    pipeline = digits.quiet_pipeline(ddim=True)
    plain, guided = (
        digits.draw(pipeline, 3, num_inference_steps=10, **call)
        for call in ({}, {"guidance_fn": symmetry.symmetric, "guidance_scale": 0.03})
    )
    assert symmetry.asymmetry(guided) < 0.6 * symmetry.asymmetry(plain)


def test_examples_say_in_one_line_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["symmetry", "--digits", "11"])
    assert run_command("symmetry", symmetry.main) == 2
    assert capsys.readouterr().err == "symmetry: error: --digits 11 must be in [1, 10].\n"


@pytest.mark.parametrize(("example", "least"), [(sdedit, 3), (anomaly_map, 3), (counterfactual, 2)])
def test_examples_that_take_a_part_of_the_steps_say_how_many_they_need(example, least, monkeypatch, capsys, tmp_path):
    name, picture = example.__name__.rpartition(".")[2], tmp_path / "picture.png"
    for steps, code in ((least - 1, 2), (least, 0)):
        monkeypatch.setattr("sys.argv", [name, "--digits", "1", "--steps", str(steps), "--output", str(picture)])
        assert run_command(name, example.main) == code
        error = capsys.readouterr().err
        assert code == 0 or error == f"{name}: error: --steps {steps} must be at least {least}.\n"
        assert picture.is_file() == (code == 0)


def test_examples_write_their_pictures(tmp_path, capsys):
    pipeline = digits.quiet_pipeline()
    rows = {"a": torch.zeros(NUM_CLASSES, 1, 32, 32), "b": torch.ones(NUM_CLASSES, 1, 32, 32)}
    digits.save_rows(pipeline, rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 0 and "rows.png" in capsys.readouterr().out
