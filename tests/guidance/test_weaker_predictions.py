"""Weaker predictions other than that of the null class, guiders of diffusers, and the scale of epsilon."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    TangentialClassifierFreeGuidance,
)
from guided_calls import LABELS, NULL, calls_of, draw, one_step_x_0, pipeline_of
from tiny_models import NUM_CLASSES, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.guidance import WeakerPrediction, combine_predictions
from diffusers_adm.guidance.attention import attention_layers
from diffusers_adm.guidance.combination import GuiderCombination
from diffusers_adm.guidance.weaker import attended_places, blurred
from diffusers_adm.pipelines.class_labels import draw_labels


LAYER = "encoder.mid_blocks.0"
SIGMA_0 = (1 / (1 - 0.0001) - 1) ** 0.5  # of the first timestep, which a run of one step visits


def epsilon_of(unet, x_t: torch.Tensor, labels: list[int] | None) -> torch.Tensor:
    with torch.no_grad():
        return unet(x_t, torch.zeros(len(x_t), dtype=torch.long), labels and torch.tensor(labels)).sample[:, :3]


def one_step(pipeline, x_t: torch.Tensor, **call) -> torch.Tensor:
    return draw(pipeline, timesteps=[0], latents=x_t, **call)


def test_a_random_class_of_each_image_and_step():
    pipeline, x_t = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, clip_sample=False)), images()
    found = one_step(pipeline, x_t, cfg_weight=2.0, weaker="random_class")
    others = draw_labels(NUM_CLASSES, 2, torch.Generator().manual_seed(0)).tolist()
    epsilon = 3 * epsilon_of(pipeline.unet, x_t, LABELS) - 2 * epsilon_of(pipeline.unet, x_t, others)
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)


def test_a_seeds_image_does_not_depend_on_the_others():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    call = {"num_inference_steps": 4, "output_type": "latent", "cfg_weight": 2.0, "weaker": "random_class"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(LABELS, generator=generators, **call).images
    alone = pipeline(LABELS[1:], generator=torch.Generator().manual_seed(2), **call).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_an_image_of_weight_0_draws_no_random_class():
    pipeline = tiny_pipeline()  # DDPM, whose noise comes from the same generators
    call = {"num_inference_steps": 4, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(LABELS, generator=generators, cfg_weight=[2.0, 0.0], weaker="random_class", **call).images
    alone = pipeline(LABELS[1:], generator=[torch.Generator().manual_seed(2)], **call).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_perturbed_attention_returns_the_values():
    """With scores that are far apart, ordinary attention is each token's own value too: then the two are the same network."""
    unet = tiny_unet()
    pipeline, x_t = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler, clip_sample=False)), images()
    guided = one_step(pipeline, x_t, cfg_weight=1.0, weaker={"kind": "perturbed_attention", "layers": [LAYER]})
    strong = epsilon_of(unet, x_t, LABELS)
    attn = attention_layers(unet)[LAYER]
    weight, bias = attn.to_qkv.weight.detach().clone(), attn.to_qkv.bias.detach().clone()
    hook = attn.to_out.register_forward_pre_hook(lambda module, arguments: (value[0],))
    value = []
    attn.to_qkv.register_forward_hook(lambda module, arguments, output: value.insert(0, output.chunk(3, dim=-1)[2]))
    weak = epsilon_of(unet, x_t, LABELS)
    hook.remove()
    assert torch.equal(attn.to_qkv.weight, weight) and torch.equal(attn.to_qkv.bias, bias)
    assert (strong - weak).abs().max() > 1e-3
    torch.testing.assert_close(guided, one_step_x_0(pipeline, x_t, 2 * strong - weak), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers_per_block", [1, 2, (3, 1, 2)])
def test_perturbed_layers_are_those_of_the_lowest_resolution_by_default(layers_per_block):
    changes = {"channel_mult": (1, 2, 2), "sample_size": 16, "attention_resolutions": (16, 8)}
    unet = tiny_unet(layers_per_block=layers_per_block, **changes)
    sizes = {}
    for name, layer in attention_layers(unet).items():
        layer.register_forward_pre_hook(
            lambda module, arguments, name=name: sizes.update({name: arguments[0].shape[1]})
        )
    unet(images(height=16, width=16), 5, torch.tensor(LABELS))
    lowest = {name for name, tokens in sizes.items() if tokens <= 8 * 8}
    assert set(WeakerPrediction("perturbed_attention").layers_of(unet)) == lowest
    assert len(lowest) == 2 * (layers_per_block if isinstance(layers_per_block, int) else layers_per_block[1]) + 2


def test_the_network_that_is_perturbed_stays_as_it_is():
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    before = draw(pipeline)
    processors = [layer.processor for layer in attention_layers(pipeline.unet).values()]
    for weaker in ("perturbed_attention", "smoothed_attention"):
        assert (draw(pipeline, cfg_weight=1.0, weaker=weaker) - before).abs().max() > 1e-4
    assert [layer.processor for layer in attention_layers(pipeline.unet).values()] == processors
    assert torch.equal(draw(pipeline), before)


def test_smoothed_attention_blurs_where_the_network_attends():
    unet = tiny_unet()
    pipeline, x_t = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler, clip_sample=False)), images()
    options = {"kind": "smoothed_attention", "layers": [LAYER], "blur_sigma": 1.5, "threshold": 0.98}
    guided = one_step(pipeline, x_t, cfg_weight=1.0, weaker=options)
    strong, attn, seen = epsilon_of(unet, x_t, LABELS), attention_layers(unet)[LAYER], []
    attn.to_qkv.register_forward_hook(lambda module, arguments, output: seen.append(output))
    epsilon_of(unet, x_t, LABELS)
    query, key, _ = seen[0].unflatten(-1, (3, attn.heads, -1)).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    attended = scores.softmax(-1).mean(dim=1).sum(dim=1).reshape(2, 1, 4, 4)
    mask = (attended > 0.98).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert 0 < mask.float().mean() < 1
    x_0 = x_t * (1 + SIGMA_0**2) ** 0.5 - SIGMA_0 * strong
    smooth = torch.where(mask, blurred(x_0, 1.5), x_0)
    weak = epsilon_of(unet, (smooth + SIGMA_0 * strong) / (1 + SIGMA_0**2) ** 0.5, LABELS)
    torch.testing.assert_close(guided, one_step_x_0(pipeline, x_t, 2 * strong - weak), rtol=1e-4, atol=1e-4)


def test_attended_places_of_a_map():
    attention = torch.zeros(1, 2, 4, 4)
    attention[..., 2] = 1.0  # all queries of both heads attend to the third place
    places = attended_places(attention, (4, 4), 1.0)
    assert places[0, 0].int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_blur_keeps_constants_and_spreads_a_point_like_a_gaussian():
    torch.testing.assert_close(blurred(torch.full((1, 3, 16, 16), 0.7), 2.0), torch.full((1, 3, 16, 16), 0.7))
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1.0
    spread = blurred(point, 2.0)[0, 0]
    offsets = torch.arange(31) - 15.0
    assert torch.allclose((spread.sum(dim=0) * offsets**2).sum(), torch.tensor(4.0), rtol=0.05)
    torch.testing.assert_close(spread, spread.T)


@pytest.mark.parametrize("weaker", ["perturbed_attention", "smoothed_attention"])
def test_unets_without_classes_are_guided_too(weaker):
    unet = tiny_unet(num_class_embeds=None)
    pipeline = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler), with_classifier=False)
    plain = draw(pipeline, class_labels=None, batch_size=2)
    guided = draw(pipeline, class_labels=None, batch_size=2, cfg_weight=1.0, weaker=weaker)
    assert guided.isfinite().all() and (guided - plain).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("weaker", ["random_class", "perturbed_attention", "smoothed_attention"])
def test_with_every_kind_of_solver_beside_a_classifier_and_within_an_interval(scheduler_class, weaker):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    call = {"cfg_weight": 1.0, "weaker": weaker, "guidance_scale": 2.0}
    assert draw(pipeline, **call).isfinite().all()
    rows = calls_of(pipeline.unet)
    within = draw(pipeline, **call, guidance_options={"interval": (0.5, 5.0)})
    assert within.isfinite().all()
    assert len(rows) >= 4  # the steps outside the interval


def test_a_function_makes_the_weaker_prediction():
    pipeline, x_t = pipeline_of(DDIMScheduler, clip_sample=False), images()
    found = one_step(pipeline, x_t, cfg_weight=2.0, weaker=lambda x_t, timestep, class_labels: 0.5 * x_t)
    epsilon = 3 * epsilon_of(pipeline.unet, x_t, LABELS) - 2 * 0.5 * x_t
    torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`weaker` must return a prediction"):
        one_step(pipeline, x_t, cfg_weight=2.0, weaker=lambda *arguments: x_t[:1])


class UNetOfX0(ADMUNet2DModel):
    """Predicts x_0 = x - sigma * epsilon at the first timestep."""

    def forward(self, sample, *arguments, **options):
        output = super().forward(sample, *arguments, **options)
        output.sample = sample * (1 + SIGMA_0**2) ** 0.5 - SIGMA_0 * output.sample
        return output


@pytest.mark.parametrize("weaker", [None, "perturbed_attention", "smoothed_attention"])
def test_predictions_of_x_0_are_guided_as_those_of_the_noise(weaker):
    unet = tiny_unet(use_null_class=True, out_channels=3)
    pipeline = tiny_pipeline(unet, tiny_scheduler(DDIMScheduler, clip_sample=False), with_classifier=False)
    call = {"cfg_weight": 5.0, "weaker": weaker, "epsilon_scale": 1.1}
    expected = one_step(pipeline, 9 * images(), **call)
    unet.__class__ = UNetOfX0
    pipeline.scheduler = tiny_scheduler(DDIMScheduler, clip_sample=False, prediction_type="sample")
    torch.testing.assert_close(one_step(pipeline, 9 * images(), **call), expected, rtol=1e-4, atol=1e-4)


def test_epsilon_is_divided_by_its_scale():
    pipeline, x_t = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, clip_sample=False)), images()
    epsilon = epsilon_of(pipeline.unet, x_t, LABELS)
    for scale in (1.25, (3.0, 1.25)):  # a run of one step is at timestep 0
        found = one_step(pipeline, x_t, epsilon_scale=scale)
        torch.testing.assert_close(found, one_step_x_0(pipeline, x_t, epsilon / 1.25), rtol=1e-4, atol=1e-5)
    slope = draw(pipeline, epsilon_scale=(0.001, 1.0))
    assert (slope - draw(pipeline)).abs().max() > 1e-3
    assert torch.equal(draw(pipeline, epsilon_scale=1.0), draw(pipeline))


@pytest.mark.parametrize("guider_class", [ClassifierFreeGuidance, AdaptiveProjectedGuidance])
def test_a_guider_without_extras_is_classifier_free_guidance(guider_class):
    pipeline = pipeline_of(DDIMScheduler)
    extras = {} if guider_class is ClassifierFreeGuidance else {"eta": 1.0, "adaptive_projected_guidance_rescale": 0.0}
    if extras:
        extras["adaptive_projected_guidance_momentum"] = None
    guider = guider_class(guidance_scale=3.0, **extras)
    for options in (None, {"interval": (0.5, 50.0)}):
        found = draw(pipeline, guider=guider, guidance_options=options)
        torch.testing.assert_close(
            found, draw(pipeline, cfg_weight=2.0, guidance_options=options), rtol=1e-3, atol=1e-3
        )


def test_adaptive_projected_guidance_projects_x_0():
    pipeline, x_t = pipeline_of(DDIMScheduler, clip_sample=False), images()
    guider = AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.0, adaptive_projected_guidance_momentum=None)
    found = one_step(pipeline, x_t, guider=guider)
    x = x_t * (1 + SIGMA_0**2) ** 0.5
    strong, weak = (x - SIGMA_0 * epsilon_of(pipeline.unet, x_t, labels) for labels in (LABELS, [NULL, NULL]))
    shift = (strong - weak).double()
    length = shift.flatten(1).norm(dim=1)[:, None, None, None]
    shift = shift * (guider.adaptive_projected_guidance_rescale / length).clamp(max=1.0)
    direction = strong.double() / strong.double().flatten(1).norm(dim=1)[:, None, None, None]
    shift = shift - (shift * direction).sum(dim=(1, 2, 3), keepdim=True) * direction
    guided = weak + 3 * shift if not guider.use_original_formulation else strong + 3 * shift
    expected = one_step_x_0(pipeline, x_t, ((x - guided) / SIGMA_0).float())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_momentum_begins_anew_with_each_run():
    pipeline = pipeline_of(DDIMScheduler)
    guider = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5)
    first = draw(pipeline, guider=guider)
    assert torch.equal(draw(pipeline, guider=guider), first)
    without = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=None)
    assert (draw(pipeline, guider=without) - first).abs().max() > 1e-4


def test_momentum_begins_anew_after_a_jump():
    guider = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5)
    without = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=None)
    guided = {}
    for name, one in (("momentum", guider), ("none", without)):
        combination = GuiderCombination(one, [800.0, 400.0, 800.0], [1.0] * 3, lambda step: step == 2)
        shifts = []
        for step in range(3):
            assert combination.acts(step)
            pair = [images(), images() + 0.1 * (step + 1)]
            shifts.append(combination.guider.forward(*pair).pred)
        guided[name] = shifts
    equal = [torch.equal(*pair) for pair in zip(guided["momentum"], guided["none"])]
    assert equal == [True, False, True]


def test_the_other_guiders_act_and_leave_out_the_weaker_prediction_when_they_stop():
    pipeline = pipeline_of(DDIMScheduler)
    plain = draw(pipeline)
    for guider in (
        TangentialClassifierFreeGuidance(guidance_scale=3.0),
        ClassifierFreeZeroStarGuidance(guidance_scale=3.0, zero_init_steps=0),
    ):
        assert (draw(pipeline, guider=guider) - plain).abs().max() > 1e-3
    rows = calls_of(pipeline.unet)
    draw(pipeline, guider=ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5))
    assert rows == [4, 4, 2, 2]


def test_a_dict_describes_a_guider():
    pipeline = pipeline_of(DDIMScheduler)
    described = {"kind": "AdaptiveProjectedGuidance", "guidance_scale": 3.0, "eta": 0.5}
    guider = AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.5)
    assert torch.equal(draw(pipeline, guider=described), draw(pipeline, guider=guider))


BAD_CALLS = [
    ({"weaker": "no_class", "cfg_weight": 1.0}, "`weaker` must be one of"),
    ({"weaker": 3, "cfg_weight": 1.0}, "`weaker` must be one of"),
    ({"weaker": {"name": "null_class"}, "cfg_weight": 1.0}, r"but got \['name'\]"),
    ({"weaker": {"kind": "perturbed_attention", "layers": ["mid"]}, "cfg_weight": 1.0}, "attention layers"),
    ({"weaker": {"kind": "smoothed_attention", "blur_sigma": 0.0}, "cfg_weight": 1.0}, "`blur_sigma`"),
    ({"weaker": "random_class"}, "`weaker` requires a `cfg_weight`"),
    ({"guider": "apg"}, "`guider` must be a guider of diffusers"),
    ({"guider": {"guidance_scale": 2.0}}, "`guider` must be a guider of diffusers"),
    ({"guider": {"kind": "AutoGuidance"}}, "must not be AutoGuidance"),
    ({"guider": {"kind": "ClassifierFreeGuidance", "scale": 2.0}}, "takes the entries"),
    ({"guider": {"kind": ["a"]}}, "`guider` must be a guider of diffusers"),
    (
        {"guider": {"kind": "ClassifierFreeGuidance", "guidance_scale": "a"}},
        "`guidance_scale` must be a number, but got 'a'",
    ),
    ({"guider": {"kind": "ClassifierFreeGuidance", "enabled": "no"}}, "`enabled` must be True or False, but got 'no'"),
    (
        {"guider": {"kind": "AdaptiveProjectedGuidance", "adaptive_projected_guidance_norm_dim": [9]}},
        "norm_dim in .*, but got .9.",
    ),
    ({"guider": ClassifierFreeGuidance(), "cfg_weight": 1.0}, "`cfg_weight` must be 0 with `guider`"),
    ({"guider": ClassifierFreeZeroStarGuidance()}, "zero_init_steps=0"),
    ({"guider": AutoGuidance(auto_guidance_layers=[0], dropout=0.1)}, "must not be AutoGuidance"),
    ({"guider": PerturbedAttentionGuidance(perturbed_guidance_layers=[0])}, "weaker='perturbed_attention'"),
    ({"epsilon_scale": 0.0}, "`epsilon_scale` must be above 0"),
    ({"epsilon_scale": (-0.1, 1.0)}, "`epsilon_scale` must be above 0"),
    ({"epsilon_scale": "1"}, "`epsilon_scale` must be a number"),
    ({"epsilon_scale": (1.0, 2.0, 3.0)}, "`epsilon_scale` must be a number"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline_of(), **call)


def test_the_learned_variance_is_that_of_the_stronger_prediction():
    stronger, weaker = images(channels=6), images(channels=3, seed=4)
    combined = combine_predictions(stronger, weaker, 2.0, 3)
    assert torch.equal(combined[:, 3:], stronger[:, 3:])
