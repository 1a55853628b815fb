"""Values of consistency_models: networks, denoisers and whole runs of its samplers."""

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, HeunDiscreteScheduler
from golden_cases import draw_weights, load_case, meta_state_dict, published_flags

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.released import RELEASED_BY_NAME


TRAINING_MODES = {"edm": "edm", "cd": "consistency_distillation"}
RUNS = (
    "consistency_sampling_heun",
    "consistency_sampling_heun_churn",
    "consistency_sampling_euler",
    "consistency_sampling_ancestral",
    "consistency_sampling_onestep",
    "consistency_sampling_multistep",
    "consistency_sampling_multistep_individual",
)


def labels_of(case, io):
    return io["class_labels"] if case["flags"]["class_cond"] else None


@pytest.mark.parametrize("scales", ["edm", "cd"])
@pytest.mark.parametrize("name", ["consistency_unet", "consistency_unet_lsun"])
def test_denoiser_computes_the_recorded_x_0(name, scales):
    case, io = load_case(name)
    flags = f"{published_flags(case)} --training_mode {TRAINING_MODES[scales]}"
    unet = ADMUNet2DModel.from_openai(draw_weights(case), flags)
    for scale in ("c_skip", "c_out", "c_in"):
        torch.testing.assert_close(getattr(unet.preconditioner, scale)(io["sigma"]), io[f"{scales}|{scale}"])
    told = unet.preconditioner.c_noise(io["sigma"]) * unet.config.timestep_scale
    torch.testing.assert_close(told, io["timestep"])
    with torch.no_grad():
        denoised = unet(io["noisy"], io["sigma"], labels_of(case, io)).sample
    recorded = io[f"{scales}|denoised"]
    assert ((denoised - recorded).norm() / recorded.norm()) < 2e-5


@pytest.mark.parametrize("name", RUNS)
def test_seed_gives_the_recorded_images(name):
    case, io = load_case(name)
    unet_case, _ = load_case(case["unet"])
    flags = (
        f"{published_flags(unet_case)} --training_mode {case['training_mode']} --sampler {case['sampler']}"
        f" --steps {case['steps']} --ts '{','.join(map(str, case.get('ts', [])))}'"
    )
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(unet_case), flags=flags)
    pipeline.set_progress_bar_config(disable=True)
    visited = []

    def record(pipeline, step, timestep, tensors):
        visited.append(timestep)
        return tensors

    generator = torch.Generator().manual_seed(case["seed"])
    if case["generator"] == "determ-indiv":
        generator = [torch.Generator().manual_seed(image + 2 * case["seed"]) for image in range(2)]
    churn = {option: float(case[option]) for option in ("s_churn", "s_tmin", "s_tmax", "s_noise") if option in case}
    x_0 = pipeline(
        class_labels=case["class_labels"],
        batch_size=2,
        generator=generator,
        output_type="latent",
        callback_on_step_end=record,
        churn=churn or None,
    ).images
    torch.testing.assert_close(torch.stack(visited), io["evaluations_sigma"], rtol=1e-5, atol=0)
    torch.testing.assert_close(x_0, io["final"], rtol=0, atol=2e-4)


def test_released_files_sample_as_in_the_original_list_of_commands():
    for name, scheduler, steps, ts in (
        ("edm-imagenet-64", HeunDiscreteScheduler, 40, None),
        ("ct-lsun-bedroom", CMStochasticIterativeScheduler, 151, "0,67,150"),
        ("cd-lsun-cat-lpips", CMStochasticIterativeScheduler, 1, None),
    ):
        released = RELEASED_BY_NAME[name]
        checkpoint = PublishedCheckpoint(meta_state_dict(released.file), released.flags)
        assert isinstance(checkpoint.scheduler(), scheduler)
        assert (checkpoint.num_inference_steps, checkpoint.timestep_respacing) == (steps, ts)


def test_released_classifiers_know_the_noise_that_they_were_trained_with():
    for name, beta_schedule in (("imagenet-64", "squaredcos_cap_v2"), ("imagenet-256", "linear")):
        classifier = RELEASED_BY_NAME[f"{name}-classifier"]
        config = NoisyClassifier.from_openai(meta_state_dict(classifier.file), classifier.flags).config
        assert (config.num_train_timesteps, config.beta_schedule) == (1000, beta_schedule)


@pytest.mark.parametrize("sampler", ["heun", "euler", "ancestral", "dpm", "onestep"])
def test_clipping_is_turned_off_by_its_flag(sampler, tmp_path):
    case, _ = load_case("consistency_unet")
    mode = "consistency_training" if sampler == "onestep" else "edm"
    flags = f"{published_flags(case)} --training_mode {mode} --sampler {sampler} --clip_denoised"
    largest = {}
    for clips in (True, False):
        pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(case), flags=f"{flags} {clips}")
        pipeline.save_pretrained(tmp_path / str(clips))
        pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / str(clips))
        pipeline.set_progress_bar_config(disable=True)
        set_scheduler(pipeline, "EDMEuler")
        generator = torch.Generator().manual_seed(0)
        x_0 = pipeline(class_labels=[1], num_inference_steps=1, generator=generator, output_type="latent").images
        largest[clips] = x_0.abs().max()
    assert largest[True] <= 1 < largest[False]


def test_weights_go_back_to_their_published_layout():
    case, _ = load_case("consistency_unet")
    published = draw_weights(case)
    unet = ADMUNet2DModel.from_openai(published, f"{published_flags(case)} --training_mode edm")
    back = unet.to_openai_state_dict()
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], published[name]) for name in published)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--training_mode is required"),
        ("--training_mode progdist", "--training_mode must be one of edm, consistency_dist"),
        ("--training_mode edm --sampler progdist", "--sampler must be one of heun, euler"),
        ("--training_mode edm --sampler onestep", "--sampler onestep requires a consistency model"),
        ("--training_mode consistency_training --sampler multistep", "--ts is required"),
        ("--training_mode consistency_training --sampler multistep --ts 0,22,40", "--ts 0,22,40 must be steps of"),
        ("--training_mode consistency_training --sampler multistep --ts 0;22", "--ts 0;22 must be steps of"),
        ("--training_mode consistency_distillation --steps 1", "--steps must be at least 2 with --sampler onestep"),
    ],
)
def test_flags_that_do_not_describe_a_model_are_refused(flags, message):
    case, _ = load_case("consistency_unet")
    with pytest.raises(ValueError, match=message):
        ClassifierGuidedPipeline.from_openai(draw_weights(case), flags=f"{published_flags(case)} {flags}")


def test_training_mode_of_another_repositorys_model_is_refused():
    case, _ = load_case("improved_unet")
    with pytest.raises(ValueError, match="--training_mode is edm, but"):
        ADMUNet2DModel.from_openai(draw_weights(case), f"{published_flags(case)} --training_mode edm")
