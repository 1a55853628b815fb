"""Training of consistency models."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_unet
from training_runs import SMALL_CONSISTENCY_RUN, TINY_UNET, checkpoint_tensors, consistency_args, without_times

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.denoiser import Denoiser
from diffusers_adm.diffusion import NoiseSchedule, add_noise, timestep_at
from diffusers_adm.losses import consistency_loss
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.models.preconditioning import training_schedule
from diffusers_adm.training import train_consistency, train_unet
from diffusers_adm.training.consistency import ConsistencyObjective, follow, path_levels, spacing_through
from diffusers_adm.training.consistency_options import ConsistencyOptions, TeacherOptions
from diffusers_adm.training.pretrained import load_pretrained


DEVIATION = 0.7  # of the Gaussian images of the closed forms
SIGMA_MIN = 0.002


def column(numbers):
    return numbers[:, None, None, None]


def gaussian_denoiser(x, sigma, labels=None):
    """The expected x_0, which is linear for Gaussian images."""
    return x * column(DEVIATION**2 / (DEVIATION**2 + sigma**2))


def gaussian_gain(sigma):
    """The factor from an image at a noise level to the end of its path, at the lowest noise level."""
    return ((DEVIATION**2 + SIGMA_MIN**2) / (DEVIATION**2 + sigma**2)).sqrt()


def exact_model(x, sigma):
    return SimpleNamespace(sample=x * column(gaussian_gain(sigma)))


def gaussian_objective(teacher_steps=1, teacher=gaussian_denoiser, step=0, closer_every=1, **levels):
    options = SimpleNamespace(
        consistency=ConsistencyOptions(sigma_data=DEVIATION, closer_every=closer_every, **levels),
        teacher=TeacherOptions(teacher_steps=teacher_steps),
        diffusion=SimpleNamespace(num_train_timesteps=1000),
    )
    return ConsistencyObjective(options, conditions=lambda batch: {}, step=lambda: step, teacher=teacher)


def gaussian_batch(number):
    return {"image": DEVIATION * torch.randn(number, 1, 2, 2, dtype=torch.float64)}


def test_teacher_leads_along_the_path_of_gaussian_images():
    sigma = torch.tensor([80.0, 5.0, 0.5], dtype=torch.float64)
    x, errors = torch.randn(3, 1, 2, 2, dtype=torch.float64), []
    for steps in (20, 40, 80):
        path = path_levels(sigma, torch.full_like(sigma, SIGMA_MIN), steps)
        assert path.shape == (steps + 1, 3) and (path.diff(dim=0) < 0).all()
        assert torch.equal(path[0], sigma) and (path[-1] == SIGMA_MIN).all()
        end = follow(gaussian_denoiser, x, path)[-1]
        errors.append((end - x * column(gaussian_gain(sigma))).abs().amax())
    # The solver is of second order: twice the steps have a quarter of the error.
    assert errors[0] < 0.05 and 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5


def test_timesteps_of_a_path_are_evenly_spaced():
    schedule = training_schedule(1000, "linear")
    sigma, lower = schedule.sigma[[900, 500]].float(), schedule.sigma[[100, 100]].float()
    path = path_levels(sigma, lower, 4, schedule)
    expected = torch.tensor([[900.0, 700, 500, 300, 100], [500, 400, 300, 200, 100]]).T
    torch.testing.assert_close(timestep_at(schedule, path.flatten()).view(5, 2), expected, rtol=0, atol=1e-2)
    outside = path_levels(torch.tensor([1e4, 0.0101, 0.004]), torch.tensor([1e-5, 0.002, 0.002]), 8, schedule)
    assert (outside.diff(dim=0) < 0).all()


def test_loss_of_the_exact_consistency_function_vanishes_with_the_teachers_steps():
    losses = []
    for teacher_steps in (10, 40, 160):
        torch.manual_seed(0)
        terms = gaussian_objective(teacher_steps)(exact_model, gaussian_batch(200))
        losses.append(terms.loss.mean())
        assert terms.loss.shape == terms.timestep.shape == (200,)
    assert losses[0] > 8 * losses[1] > 64 * losses[2] and losses[2] < 1e-3
    torch.manual_seed(0)
    wrong = gaussian_objective(160)(
        lambda x, sigma: SimpleNamespace(sample=gaussian_denoiser(x, sigma)), gaussian_batch(200)
    )
    assert wrong.loss.mean() > 100 * losses[2]
    # Pairs that are close have a small error with one step of Euler.
    close = gaussian_objective(step=12)(exact_model, gaussian_batch(200))
    far = gaussian_objective(step=3)(exact_model, gaussian_batch(200))
    assert far.loss.mean() > 10 * close.loss.mean()


def test_loss_is_a_weighted_pseudo_huber_distance():
    target = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    predicted = target + column(torch.tensor([0.3, 0.001], dtype=torch.float64))
    sigma, lower = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.5, 0.2]).double()
    loss = consistency_loss(predicted, target, sigma, lower, sigma_data=0.5)
    c = 0.00054  # sqrt(d) times as large for the sum over d dimensions
    expected = [
        ((0.3**2 + c**2) ** 0.5 - c) * (1 / 1.5 + 2),
        ((0.001**2 + c**2) ** 0.5 - c) * (1 / 0.8 + 2),
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_noise_levels_of_a_pair_move_closer():
    sigma = torch.tensor([0.01, 1.0, 80.0])
    objective = gaussian_objective(closer_every=10)
    lower = torch.stack([objective.lower_level(sigma, objective.halvings(step)) for step in (0, 9, 10, 30)])
    assert (lower[:2] == SIGMA_MIN).all()
    torch.testing.assert_close(lower[2, 2], torch.tensor(40.0))
    distance = (1 + 8 * torch.sigmoid(torch.tensor(-1.0))) / 8
    torch.testing.assert_close(lower[3, 1], 1 - distance)
    assert (lower[3] > lower[2] - 1e-9).all() and (lower < sigma).all()


def test_loss_stays_finite_however_long_the_training_is():
    objective = gaussian_objective(step=100_000, closer_every=1)
    loss = objective(lambda x, sigma: SimpleNamespace(sample=0.9 * x), gaussian_batch(64)).loss
    assert loss.isfinite().all() and (loss > 0).all()


def test_losses_on_held_out_images_do_not_depend_on_the_step():
    losses = []
    for step in (0, 15, 70):
        objective = gaussian_objective(step=step, closer_every=10)
        torch.manual_seed(0)
        losses.append(objective.held_out_terms(exact_model, gaussian_batch(64)).loss)
    assert torch.equal(losses[0], losses[1])
    torch.manual_seed(0)
    assert torch.equal(objective(exact_model, gaussian_batch(64)).loss, losses[2])  # after seven halvings


def test_levels_of_a_path_fall_above_the_schedule_too():
    schedule = NoiseSchedule.from_config(DDPMScheduler(beta_end=0.002).config)
    highest = schedule.sigma[-1].item()
    for sigma, lower in ((80.0, 40.0), (80.0, 0.002), (highest / 2, highest / 4)):
        path = path_levels(torch.tensor([sigma]), torch.tensor([lower]), 5, schedule)
        assert (path.diff(dim=0) < 0).all(), path


@pytest.mark.parametrize("step, evaluations", [(9, 1), (10, 2)])
def test_targets_at_the_lowest_noise_level_cost_no_evaluation(step, evaluations):
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return exact_model(x, sigma)

    gaussian_objective(step=step, closer_every=10)(model, gaussian_batch(8))
    assert len(calls) == evaluations


@pytest.mark.parametrize("teacher", [gaussian_denoiser, None])
def test_training_finds_the_consistency_function_of_gaussian_images(teacher):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()

    def gain(sigma):
        c_skip = DEVIATION**2 / ((sigma - SIGMA_MIN) ** 2 + DEVIATION**2)
        c_out = (sigma - SIGMA_MIN) * DEVIATION / (sigma**2 + DEVIATION**2)  # times c_in
        return c_skip + c_out * network(sigma.log()[:, None] / 4)[:, 0]

    def model(x, sigma):
        return SimpleNamespace(sample=x * column(gain(sigma)))

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(400):
        objective = gaussian_objective(1 if teacher is None else 10, teacher, step, 10_000 if teacher else 50)
        optimizer.zero_grad()
        objective(model, gaussian_batch(64)).loss.mean().backward()
        optimizer.step()
    sigma = torch.tensor([SIGMA_MIN, 0.3, 1.0, 3.0, 20.0], dtype=torch.float64)
    error = (gain(sigma) / gaussian_gain(sigma) - 1).abs()
    # Without a teacher the targets are noisy, and two noise levels are never as close as in the limit.
    assert error.max() < (0.15 if teacher else 0.35), error


@pytest.mark.parametrize("beta_schedule", [None, "linear"])
def test_lowest_noise_level_is_returned_as_it_is(beta_schedule):
    unet = tiny_unet(out_channels=3, preconditioning="consistency", sigma_data=1.0, beta_schedule=beta_schedule)
    x = images(2)
    assert torch.equal(unet(x, unet.config.sigma_min, torch.tensor([0, 1])).sample, x)
    assert not torch.equal(unet(x, 1.0, torch.tensor([0, 1])).sample, x)


def test_start_from_a_model_of_timesteps_has_its_prediction(tmp_path):
    teacher = tiny_pipeline(with_classifier=False)
    teacher.save_pretrained(tmp_path)
    scales = {"preconditioning": "consistency", "sigma_data": 1.0, "beta_schedule": "linear"}
    student = tiny_unet(seed=5, out_channels=3, **scales)
    PartialState()  # of the logger
    load_pretrained(student, str(tmp_path))
    schedule, labels = Denoiser(teacher, [0, 1]).schedule, torch.tensor([0, 1])
    for timestep in (0, 300, 999):
        sigma = schedule.sigma[timestep].float().item()
        x_t = add_noise(schedule, images(2, seed=3), timestep, images(2, seed=4))
        epsilon = teacher.unet(x_t, timestep, labels).sample[:, :3]
        # The network is given the same image and timestep, and its output is -epsilon.
        scales = student.preconditioner
        x, level = x_t * (1 + sigma**2) ** 0.5, torch.tensor(sigma)
        expected = scales.c_skip(level) * x - scales.c_out(level) * epsilon
        torch.testing.assert_close(student(x, sigma, labels).sample, expected, rtol=1e-5, atol=1e-5)


def test_start_from_an_edm_model_is_its_denoiser(tmp_path):
    teacher = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    teacher.save_pretrained(tmp_path)
    # At sigma_min = 0, both kinds of preconditioning would be the same.
    scales = {"preconditioning": "consistency", "timestep_scale": 1000.0, "sigma_min": 1e-7}
    student = tiny_unet(seed=5, out_channels=3, **scales)
    load_pretrained(student, str(tmp_path))
    labels = torch.tensor([0, 1])
    for sigma in (0.1, 1.0, 50.0):
        x = images(2, seed=3) + sigma * images(2, seed=4)
        expected = teacher(x, sigma, labels).sample
        torch.testing.assert_close(student(x, sigma, labels).sample, expected, rtol=1e-5, atol=1e-5)


def test_run_resumes_exactly_and_draws_in_one_step_without_a_classifier(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), *"--teacher_steps 3 --closer_every 2".split()]
    more += "--guidance_scale 2 --validation_split train".split()
    train_consistency.main(consistency_args(dataset, start, tmp_path / "once", 4, *more))
    train_consistency.main(consistency_args(dataset, start, tmp_path / "twice", 3, *more))
    train_consistency.main(
        consistency_args(dataset, start, tmp_path / "twice", 4, *more, "--resume_from_checkpoint", "latest")
    )
    once, twice = (checkpoint_tensors(tmp_path / name / "checkpoint-4") for name in ("once", "twice"))
    assert once and all(torch.equal(once[name][key], twice[name][key]) for name in once for key in once[name])
    logged = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert without_times(logged)[-1].keys() >= {"validation_loss"}

    folder = tmp_path / "once" / "pipeline"
    pipeline = ClassifierGuidedPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, CMStochasticIterativeScheduler) and pipeline.classifier is None
    assert pipeline.config.num_inference_steps == 2 and pipeline.config.guidance_scale == 0
    assert pipeline.unet.config.beta_schedule == "linear" and pipeline.unet.config.sigma_data == 1.0
    told = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    assert pipeline(["left", "right"], num_inference_steps=1).images[0].size == (16, 16)
    assert len(told) == 1
    assert pipeline(["left", "right"]).images[1].size == (16, 16)
    assert len(told) == 3
    assert (tmp_path / "once" / "samples" / "step-4.png").exists()
    card = (folder / "README.md").read_text()
    assert "--teacher_steps 3" in card and "--guidance_scale 2.0" in card


@pytest.mark.parametrize("middle", [0.004, 0.4, 7.0, 79.0])
def test_spacing_of_three_levels_is_found(middle):
    scheduler = CMStochasticIterativeScheduler(3, 0.002, 80.0, rho=spacing_through(0.002, middle, 80.0))
    scheduler.set_timesteps(2)
    assert scheduler.sigmas[1].item() == pytest.approx(middle, rel=1e-5)


def test_guidance_of_the_teacher_is_learned(dataset, start, tmp_path):
    trained = []
    for guidance in ([], ["--guidance_scale", "0"], ["--guidance_scale", "0", "--teacher_steps", "2"]):
        more = ["--teacher_model_name_or_path", str(start), *guidance]
        train_consistency.main(consistency_args(dataset, start, tmp_path / str(len(trained)), 1, *more))
        trained.append(checkpoint_tensors(tmp_path / str(len(trained)) / "checkpoint-1")["model.safetensors"])
    for other in trained[1:]:
        assert not all(torch.equal(tensor, other[key]) for key, tensor in trained[0].items())


def test_consistency_model_is_tuned_from_an_edm_model_and_from_itself(dataset, tmp_path, caplog):
    unet = tiny_unet(**{**TINY_UNET, "out_channels": 1}, preconditioning="edm", timestep_scale=1000.0, sigma_max=60.0)
    unet.save_pretrained(tmp_path / "edm" / "unet")
    train_consistency.main(consistency_args(dataset, tmp_path / "edm" / "unet", tmp_path / "run", 1))
    config = ADMUNet2DModel.load_config(tmp_path / "run" / "pipeline" / "unet")
    assert config["beta_schedule"] is None and config["sigma_data"] == 0.5 and config["sigma_max"] == 60.0
    options = consistency_args(dataset, tmp_path / "run" / "pipeline", tmp_path / "again", 1, "--learning_rate", "0")
    train_consistency.main(options)
    first, again = (checkpoint_tensors(tmp_path / name / "checkpoint-1") for name in ("run", "again"))
    averages = [name for name in first if name != "model.safetensors"]
    (average,) = averages  # the pipeline holds the averaged weights
    assert all(torch.equal(tensor, again["model.safetensors"][key]) for key, tensor in first[average].items())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--guidance_scale", "1"], "--guidance_scale 1.0 requires --teacher_model_name_or_path"),
        (["--teacher_steps", "4"], "--teacher_steps 4 requires --teacher_model_name_or_path"),
        (
            ["--teacher_model_name_or_path", "{start}", *"--num_paths 4 --closer_every 2".split()],
            "--closer_every has no effect",
        ),
        (["--teacher_model_name_or_path", "{start}", "--path_levels", "9"], "--path_levels requires --num_paths"),
        (
            ["--teacher_model_name_or_path", "{start}", *"--num_paths 4 --path_levels 80,90".split()],
            r"--path_levels must be 80 \(--sigma_max\), or it and a noise level in \[0.004, 72\] .* but got 80.0,90.0",
        ),
        (
            ["--teacher_model_name_or_path", "{start}", *"--num_paths 4 --path_levels 80 --log_sigma_std 1".split()],
            "--log_sigma_std has no effect with --path_levels",
        ),
        (["--dropout", "0.1"], "--dropout requires --num_paths"),
        (
            ["--teacher_model_name_or_path", "{start}", "--no-class_conditional"],
            "requires labels, but the images have none",
        ),
        (
            ["--teacher_model_name_or_path", "{start}", *"--num_paths 4 --path_levels 9,1".split()],
            "--path_levels must be 80 .* but got 9.0,1.0",
        ),
        (
            ["--teacher_model_name_or_path", "{start}", *"--num_paths 4 --path_levels 80 --sampling_rho 9".split()],
            "--sampling_rho has no effect with --path_levels",
        ),
        (["--sigma_min", "50"], "--sigma_min must be less than half of --sigma_max 80.0, but got 50.0"),
        (["--teacher_model_name_or_path", "{start}", "--label_dropout", "0.1"], "--label_dropout has no effect"),
        (["--teacher_model_name_or_path", "{start}", "--cfg_weight", "1"], "requires a UNet with a null class"),
        (["--teacher_model_name_or_path", "{start}", "--resolution", "8"], "must draw images of"),
        (["--teacher_model_name_or_path", "shipped:adm-cifar-32"], "but draws {'in_channels': 3, 'sample_size': 32}"),
        (["--noise_embedding", "log_sigma"], "--noise_embedding must be timestep"),
    ],
)
def test_options_that_do_not_fit_are_refused(more, message, dataset, start, tmp_path):
    more = [word.format(start=start) for word in more]
    with pytest.raises(ValueError, match=message):
        train_consistency.main(consistency_args(dataset, start, tmp_path, 1, *more))


def test_teacher_has_the_classes_of_the_images_and_predicts_the_expected_image(dataset, start, tmp_path):
    tiny_pipeline(tiny_unet(**{**TINY_UNET, "num_class_embeds": 3}), with_classifier=False).save_pretrained(
        tmp_path / "three"
    )
    more = ["--teacher_model_name_or_path", str(tmp_path / "three")]
    with pytest.raises(ValueError, match="must have the 2 classes of the images, but has 3"):
        train_consistency.main(consistency_args(dataset, start, tmp_path / "run", 1, *more))
    unconditional = tiny_unet(**{**TINY_UNET, "num_class_embeds": None})
    others = tiny_classifier(in_channels=1, num_classes=5, sample_size=16, attention_resolutions=(8,))
    tiny_pipeline(unconditional, classifier=others).save_pretrained(tmp_path / "five")
    more = ["--teacher_model_name_or_path", str(tmp_path / "five"), "--guidance_scale", "1"]
    with pytest.raises(ValueError, match="must have the 2 classes of the images, but has 5"):
        train_consistency.main(consistency_args(dataset, start, tmp_path / "run", 1, *more))
    tiny_pipeline(unconditional, with_classifier=False).save_pretrained(tmp_path / "none")
    more = ["--teacher_model_name_or_path", str(tmp_path / "none")]
    train_consistency.main(consistency_args(dataset, start, tmp_path / "run", 1, *more))
    more = ["--teacher_model_name_or_path", str(tmp_path / "run" / "pipeline")]
    with pytest.raises(ValueError, match="must not be a consistency model"):
        train_consistency.main(consistency_args(dataset, start, tmp_path / "again", 1, *more))


def test_another_noise_schedule_than_that_of_the_start_is_named(dataset, start, tmp_path, caplog):
    train_consistency.main(consistency_args(dataset, start, tmp_path, 1, "--noise_schedule", "cosine"))
    assert "was trained with --noise_schedule linear, but this run has cosine" in caplog.text


def test_longer_run_keeps_the_distances_of_its_pairs(dataset, start, tmp_path):
    train_consistency.main(consistency_args(dataset, start, tmp_path, 4))
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"--closer_every 2 \(was 1\)"):
        train_consistency.main(consistency_args(dataset, start, tmp_path, 16, *resume))
    train_consistency.main(consistency_args(dataset, start, tmp_path, 5, *resume, "--closer_every", "1"))


def test_schedule_without_preconditioning_is_refused():
    with pytest.raises(ValueError, match="beta_schedule='linear' requires a `preconditioning`"):
        tiny_unet(beta_schedule="linear")
    unet = tiny_unet(
        out_channels=3, preconditioning="edm", beta_schedule="linear", model_channels=32, norm_num_groups=32
    )
    with pytest.raises(ValueError, match="`beta_schedule` must be None"):
        unet.to_openai_state_dict()


def test_consistency_model_of_timesteps_starts_no_edm_model(dataset, start, tmp_path):
    train_consistency.main(consistency_args(dataset, start, tmp_path / "run", 1))
    words = (
        f"--dataset_name {dataset} --output_dir {tmp_path / 'edm'} --max_train_steps 1 --pretrained_model_name_or_path"
    )
    words = [*words.split(), str(tmp_path / "run" / "pipeline"), *SMALL_CONSISTENCY_RUN]
    with pytest.raises(ValueError, match="another architecture: beta_schedule linear instead of None"):
        train_unet.main(train_unet.parse_args(words))
