"""Pipeline of the upsampler: formulas, accepted small images, saving and loading."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from golden_cases import draw_weights, load_case, meta_state_dict, published_flags
from PIL import Image
from tiny_models import NUM_CLASSES, SIZE, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.openai.released import RELEASED_BY_NAME, RELEASED_CHECKPOINTS
from diffusers_adm.pipelines.cascade import draw_cascade


SMALL = SIZE // 2


def upsampler(unet=None, scheduler=None, **changes):
    """A quiet pipeline of a tiny upsampler."""
    pipeline = ADMUpsamplePipeline(
        unet=tiny_unet(low_res_conditioning=True) if unet is None else unet,
        scheduler=tiny_scheduler() if scheduler is None else scheduler,
        **{"low_res_size": SMALL, **changes},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_images(batch=2, channels=3):
    """8-bit values in [0, 1], so that files hold them too: `(batch, channels, SMALL, SMALL)`."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, channels, SMALL, SMALL), generator=generator) / 255


def draw(pipeline, image, class_labels=[1, 2], seeds=(0, 1), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipeline(image, class_labels, generator=generators, **options).images


def test_published_upsampler_takes_one_ddim_step_as_its_recorded_output_says():
    case, io = load_case("upsampler")
    pipeline = ADMUpsamplePipeline.from_openai(draw_weights(case), published_flags(case) + " --small_size 8")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.low_res_size == 8
    # The run visits timestep 0; the recorded output is at others, so epsilon is asked of the network again.
    low_res, sample = io["low_res"], io["sample"]
    with torch.no_grad():
        recorded = pipeline.unet(sample, io["timestep"], io["class_labels"], low_res).sample
        torch.testing.assert_close(recorded, io["output"], rtol=1e-4, atol=1e-4)
        epsilon, _ = pipeline.unet(sample, torch.tensor(0), io["class_labels"], low_res.clamp(-1, 1)).sample.chunk(
            2, 1
        )
    alpha_bar = pipeline.scheduler.alphas_cumprod[0].double()
    x_0 = ((sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-1, 1)
    drawn = pipeline(
        (low_res.clamp(-1, 1) + 1) / 2,
        io["class_labels"],
        latents=sample,
        timesteps=[0],
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn, x_0.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "small", "large"), [("64_256_upsampler.pt", 64, 256), ("128_512_upsampler.pt", 128, 512)]
)
def test_released_upsamplers_know_their_sizes(file, small, large):
    pipeline = ADMUpsamplePipeline.from_openai(meta_state_dict(file), RELEASED_CHECKPOINTS[file].flags)
    assert (pipeline.config.low_res_size, pipeline.unet.config.sample_size) == (small, large)


def test_released_file_brings_the_names_of_its_classes(tmp_path, monkeypatch):
    # The file's name is enough; a small model in its place, whose flags say that it is small.
    case, _ = load_case("upsampler")
    row = RELEASED_BY_NAME["imagenet-64-256-upsampler"]
    monkeypatch.setitem(RELEASED_BY_NAME, row.name, dataclasses.replace(row, layout=None))
    torch.save(draw_weights(case), tmp_path / "64_256_upsampler.pt")
    pipeline = ADMUpsamplePipeline.from_openai(
        tmp_path / "64_256_upsampler.pt", published_flags(case) + " --small_size 8 --large_size 32"
    )
    assert pipeline.class_ids("goldfish") == [1]


def test_small_image_decides_what_is_drawn():
    pipeline, image = upsampler(), small_images()
    one, other = draw(pipeline, image), draw(pipeline, 1 - image)
    assert one.shape == (2, 3, SIZE, SIZE)
    assert (one - other).abs().max() > 1e-2


def test_every_kind_of_image_is_the_same_image(tmp_path):
    pipeline, image = upsampler(), small_images()
    arrays = (255 * image).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for picture, file in zip(pictures, files):
        picture.save(file)
    expected = draw(pipeline, image)
    for given in (arrays, arrays / 255, pictures, files, [str(file) for file in files], [image[0], arrays[1]]):
        torch.testing.assert_close(draw(pipeline, given), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(pipeline, pictures[0], 1, seeds=[0]), expected[:1], rtol=0, atol=1e-5)
    grey = upsampler(tiny_unet(in_channels=1, out_channels=2, low_res_conditioning=True))
    assert draw(grey, [picture.convert("L") for picture in pictures]).shape == (2, 1, SIZE, SIZE)


def test_pictures_are_read_as_training_reads_them(tmp_path):
    pipeline = upsampler()
    clear = Image.new("RGBA", (SMALL, SMALL), (255, 0, 0, 0))
    assert torch.equal(pipeline.prepare_low_res(clear), torch.ones(1, 3, SMALL, SMALL))
    turned, exif = Image.fromarray(np.arange(3 * SMALL**2, dtype=np.uint8).reshape(SMALL, SMALL, 3)), Image.Exif()
    exif[0x0112] = 3  # by half a turn
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.save(tmp_path / "clear.png")
    upright = pipeline.prepare_low_res(turned).flip(2, 3)
    assert torch.equal(pipeline.prepare_low_res(tmp_path / "turned.png"), upright)
    assert torch.equal(pipeline.prepare_low_res(Image.open(tmp_path / "turned.png")), upright)
    assert torch.equal(pipeline.prepare_low_res(tmp_path / "clear.png"), torch.ones(1, 3, SMALL, SMALL))


def test_output_of_the_guided_pipeline_is_taken():
    base = tiny_pipeline(tiny_unet(sample_size=8), with_classifier=False)
    large = upsampler(tiny_unet(sample_size=16, low_res_conditioning=True, attention_resolutions=(8,)))
    large.register_to_config(low_res_size=8)
    drawn = [
        draw(large, base([1, 2], num_inference_steps=2, generator=torch.manual_seed(0), output_type=kind).images)
        for kind in ("pt", "np", "pil")
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn[0], drawn[2], rtol=0, atol=0.1)  # 8 bits
    assert drawn[0].shape == (2, 3, 16, 16)


def test_a_cascade_is_its_stages_one_after_the_other():
    base = tiny_pipeline(tiny_unet(sample_size=8))
    sizes = (16, 32)
    stages = [base]
    for size in sizes:
        unet = tiny_unet(sample_size=size, low_res_conditioning=True, attention_resolutions=(size // 2,), seed=size)
        stages.append(upsampler(unet, low_res_size=size // 2))
    calls = [{"guidance_scale": 5.0, "num_inference_steps": 3}, {"num_inference_steps": 2}, {"num_inference_steps": 4}]
    found = draw_cascade(stages, [1, 2], calls, torch.Generator().manual_seed(0), output_type="latent").images
    generator = torch.Generator().manual_seed(0)
    images = base([1, 2], generator=generator, output_type="pt", **calls[0]).images
    images = stages[1](images, [1, 2], generator=generator, output_type="pt", **calls[1]).images
    expected = stages[2](images, [1, 2], generator=generator, output_type="latent", **calls[2]).images
    assert torch.equal(found, expected) and found.shape == (2, 3, 32, 32)
    for wrong, said in (
        ([base], "two stages"),
        ([base, base], "Stages after the first must be ADMUpsamplePipelines"),
        ([base, stages[2]], "enlarges, 3 channels of 16 pixels"),
    ):
        with pytest.raises(ValueError, match=said):
            draw_cascade(wrong, [1, 2])
    with pytest.raises(ValueError, match="one dict per stage, 3, but got 1"):
        draw_cascade(stages, [1, 2], [{}])
    with pytest.raises(ValueError, match="`class_labels` are required"):
        draw_cascade(stages)
    unconditional = upsampler(
        tiny_unet(sample_size=16, low_res_conditioning=True, attention_resolutions=(8,), num_class_embeds=None),
        low_res_size=8,
    )
    found, other = (
        draw_cascade([base, unconditional], labels, calls[:2], torch.Generator().manual_seed(0), output_type="latent")
        for labels in ([1, 2], [1, 3])
    )
    assert torch.equal(found.images[0], other.images[0]) and not torch.equal(found.images[1], other.images[1])
    none = draw_cascade([base, unconditional], [1, 2], [calls[0], {**calls[1], "guidance_fn": None}])
    assert len(none.images) == 2
    with pytest.raises(ValueError, match="`class_labels` must be None"):
        draw_cascade([base, unconditional], [1, 2], [calls[0], {"class_labels": [99, 99]}])
    base.register_to_config(id2label={number: f"class {number}" for number in range(NUM_CLASSES)})
    named, numbered = (
        draw_cascade(stages, labels, calls, torch.Generator().manual_seed(0), output_type="latent").images
        for labels in ("class 2", 2)
    )
    assert torch.equal(named, numbered)


def test_image_is_the_same_alone_and_in_a_batch():
    pipeline, image = upsampler(classifier=tiny_classifier()), small_images()
    together = draw(pipeline, image, guidance_scale=[3.0, 1.0])
    alone = [draw(pipeline, image[i], [i + 1], seeds=[i], guidance_scale=[3.0, 1.0][i]) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)
    assert (together - draw(pipeline, image, guidance_scale=0)).abs().max() > 1e-4


def test_null_class_runs_without_labels():
    image = small_images()
    conditional = upsampler(tiny_unet(low_res_conditioning=True, use_null_class=True))
    expected = draw(conditional, image, [NUM_CLASSES - 1] * 2, condition_unet=False)
    torch.testing.assert_close(draw(conditional, image, None), expected)
    with pytest.raises(ValueError, match="`class_labels` are required"):
        draw(upsampler(), image, None)
    guided = upsampler(conditional.unet, classifier=tiny_classifier())

    def turn_on(called, step, timestep, tensors):
        called._guidance_scale = 1.0
        return {}

    with pytest.raises(ValueError, match="`guidance_scale` requires `class_labels`, but got 1.0"):
        draw(guided, image, None, callback_on_step_end=turn_on)
    unconditional = upsampler(tiny_unet(low_res_conditioning=True, num_class_embeds=None))
    assert draw(unconditional, image, None).shape == (2, 3, SIZE, SIZE)


def test_other_sizes_by_height_and_width():
    pipeline = upsampler()
    wide = torch.rand(2, 3, SMALL, 2 * SMALL, generator=torch.Generator().manual_seed(0))
    assert draw(pipeline, wide, width=2 * SIZE).shape == (2, 3, SIZE, 2 * SIZE)
    with pytest.raises(ValueError, match=f"`image` must be {SMALL}x{SMALL} .* but got {SMALL}x{2 * SMALL}"):
        draw(pipeline, wide)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (2 * small_images() - 1, r"must be in \[0, 1\]"),
        (small_images() * float("nan"), r"must be in \[0, 1\]"),
        (small_images(channels=1), "3 channels"),
        (small_images()[0, 0], "3 channels"),
        (np.zeros((SMALL, SMALL), np.uint8), "3 channels"),
        # Nothing tells how many of the bits are used.
        (Image.fromarray(np.zeros((SMALL, SMALL), np.uint16)), "mode is 'I;16'. Pass an array of floats"),
        ([small_images()[0], torch.rand(3, SIZE, SIZE)], "of the same size"),
        ([], "one or more images"),
        (7, "int"),
        (small_images(batch=3), "image 3, class_labels 2"),
        (small_images(batch=1), "image 1, class_labels 2"),
        (torch.empty(0, 3, SMALL, SMALL), "3 channels"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        draw(upsampler(), image)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="The UNet must be an upsampler"):
        upsampler(tiny_unet())
    with pytest.raises(ValueError, match="`low_res_size` must be a divisor"):
        ADMUpsamplePipeline(tiny_unet(low_res_conditioning=True), tiny_scheduler(), low_res_size=3)
    with pytest.raises(ValueError, match="`guidance_scale` requires `class_labels`"):
        pipeline = upsampler(tiny_unet(low_res_conditioning=True, use_null_class=True), classifier=tiny_classifier())
        draw(pipeline, small_images(), None, guidance_scale=1.0)
    case, _ = load_case("unet_class_conditional")
    with pytest.raises(ValueError, match="ClassifierGuidedPipeline"):
        ADMUpsamplePipeline.from_openai(draw_weights(case), published_flags(case))


def test_saved_upsampler_loads_as_what_it_is(tmp_path):
    pipeline = upsampler(id2label={0: "cat", 1: "dog", 2: "eel"})
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["low_res_size"] == SMALL and index["_class_name"][1] == "ADMUpsamplePipeline"
    loaded = ADMUpsamplePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    image = small_images()
    assert torch.equal(draw(loaded, image, ["dog", "eel"]), draw(pipeline, image))
    assert isinstance(loaded.unet, ADMUNet2DModel)
    with pytest.raises(ValueError, match="saved ADMUpsamplePipeline, not a saved ClassifierGuidedPipeline"):
        ClassifierGuidedPipeline.from_pretrained(tmp_path)


def test_a_run_goes_on_from_its_middle():
    pipeline = upsampler(scheduler=tiny_scheduler(DDIMScheduler))
    whole = list(pipeline.steps(small_images(), [1, 2], num_inference_steps=4))
    call = {"latents": whole[2].x_t, "start": whole[2].timestep}
    assert torch.equal(draw(pipeline, small_images(), num_inference_steps=4, **call), whole[-1].latents)
