"""Guidance by networks of transformers that were not trained on noise. Their weights are random."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from digit_classifier import load_digit_classifier
from PIL import Image
from tiny_models import images, tiny_pipeline
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from diffusers_adm.examples import digits
from diffusers_adm.guidance import guidance_gradient, shortened
from diffusers_adm.guidance.functions import CleanClassifierGuidance, CLIPGuidance, as_pixels, spherical_distance


LABELS = torch.tensor([1, 3])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def classifier() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[CLIPModel, CLIPProcessor]:
    """A small CLIP model, and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "adghotx" for end in ("", "</w>"))]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config).eval(), CLIPProcessor(processor, tokenizer)


def test_pixels_are_what_the_processor_makes_of_a_picture():
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    expected = PROCESSOR(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    x_0 = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    found = as_pixels(x_0, PROCESSOR)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)  # of a picture of 8 bits
    assert found.requires_grad
    grey = torch.rand(2, 1, 24, 24) * 2 - 1
    assert as_pixels(grey, PROCESSOR).shape == (2, 3, 16, 16)
    torch.testing.assert_close(as_pixels(grey, None), (grey + 1) / 2)


def test_gradient_is_that_of_the_calibrated_logits(classifier):
    guide = CleanClassifierGuidance(classifier, PROCESSOR, joint_temperature=2.0, conditional_temperature=0.5)
    x_0 = images().clamp(-1, 1)
    leaf = x_0.clone().requires_grad_()
    logits = classifier(as_pixels(leaf, PROCESSOR)).logits
    value = 2 * logits[range(2), LABELS] - torch.log((0.5 * logits).exp().sum(dim=1))
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    found = guidance_gradient(guide, images(seed=8), torch.tensor([1, 1]), x_0, LABELS)
    torch.testing.assert_close(found, expected)
    plain = CleanClassifierGuidance(classifier, PROCESSOR)(None, None, x_0, LABELS)
    torch.testing.assert_close(plain, classifier(as_pixels(x_0, PROCESSOR)).logits.log_softmax(1)[range(2), LABELS])


def test_smoothing_leaves_the_classifier_as_it_is(classifier):
    relus = [module for module in classifier.modules() if isinstance(module, nn.ReLU)]
    guide = CleanClassifierGuidance(classifier, PROCESSOR, softplus_beta=3.0)
    assert relus and [module for module in classifier.modules() if isinstance(module, nn.ReLU)] == relus
    smooth = [module for module in guide.classifier.modules() if isinstance(module, nn.Softplus)]
    assert len(smooth) == len(relus) and all(module.beta == 3.0 for module in smooth)
    assert not any(isinstance(module, nn.ReLU) for module in guide.classifier.modules())
    with pytest.raises(ValueError, match="softplus_beta"):
        CleanClassifierGuidance(lambda pixels: pixels, softplus_beta=3.0)


@pytest.mark.parametrize(
    ("beta", "network", "said"),
    [
        (-1.0, None, "`softplus_beta` must be a number above 0, but got -1.0"),
        (3.0, nn.GELU(), "ReLU modules"),
        (3.0, lambda pixels: pixels, "ReLU modules"),
    ],
)
def test_smoothing_of_what_has_nothing_to_smooth_is_refused(classifier, beta, network, said):
    with pytest.raises(ValueError, match=said):
        CleanClassifierGuidance(network or classifier, softplus_beta=beta)


def test_a_classifier_in_half_precision_guides_as_one_in_full(classifier):
    x_0, timestep = images(seed=2), torch.zeros(2)
    guides = [CleanClassifierGuidance(copy.deepcopy(classifier).to(dtype), PROCESSOR) for dtype in DTYPES]
    exact, *others = [guidance_gradient(guide, x_0, timestep, x_0, LABELS) for guide in guides]
    for other in others:
        assert other.dtype == exact.dtype and (other - exact).norm() < 0.05 * exact.norm()


def test_labels_that_the_classifier_does_not_know_are_refused(classifier):
    guide = CleanClassifierGuidance(classifier, PROCESSOR)
    for labels, said in ((torch.tensor([1, 5]), "[1, 5]"), (torch.tensor([1, -1]), "[1, -1]"), (None, "class_labels")):
        with pytest.raises(ValueError) as error:
            guidance_gradient(guide, images(), torch.tensor([1, 1]), images(), labels)
        assert said in str(error.value)


@pytest.mark.parametrize(("through_unet", "steps", "scale"), [(False, 10, 4.0), (True, 25, 1.0)])
def test_a_classifier_of_clean_digits_draws_the_digits_that_are_asked_for(through_unet, steps, scale):
    pipeline, judge = digits.quiet_pipeline(ddim=True), load_digit_classifier()
    call = {"num_inference_steps": steps, "condition_unet": False}
    guide = CleanClassifierGuidance(lambda pixels: judge(2 * pixels - 1), through_unet=through_unet)
    guided = digits.draw(pipeline, 10, guidance_fn=guide, guidance_scale=scale, **call)
    with torch.no_grad():
        right = [
            (judge(drawn).argmax(1) == torch.arange(10)).sum() for drawn in (digits.draw(pipeline, 10, **call), guided)
        ]
    assert right[0] <= 4 and right[1] >= 8, right


def test_distance_on_the_sphere_is_half_the_squared_angle():
    angle = torch.tensor([0.0, 0.3, 1.5, math.pi])
    first = torch.stack([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(
        spherical_distance(first, torch.tensor([[1.0, 0.0]])), angle.square() / 2, rtol=1e-4, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # of tokenizers, in old transformers
def test_clip_draws_what_is_nearer_to_the_text(clip):
    model, processor = clip
    pipeline = tiny_pipeline()
    call = {"num_inference_steps": 8, "output_type": "latent"}

    def draw(prompt, **changes):
        guide = CLIPGuidance(model, processor, prompt, 4, generator=torch.Generator().manual_seed(0), **changes)
        drawn = pipeline(
            [1, 3], generator=torch.Generator().manual_seed(0), guidance_fn=guide, guidance_scale=300.0, **call
        ).images.clamp(-1, 1)
        whole = CLIPGuidance(model, processor, prompt, 1, min_cutout=1.0)
        with torch.no_grad():
            return whole(None, None, drawn, None)  # minus the distance

    unguided = pipeline([1, 3], generator=torch.Generator().manual_seed(0), guidance_scale=0.0, **call).images
    with torch.no_grad():
        before = CLIPGuidance(model, processor, "a dog", 1, min_cutout=1.0)(None, None, unguided.clamp(-1, 1), None)
    for through_unet in (True, False):
        assert (draw("a dog", through_unet=through_unet) > before).all()
    assert draw(["a dog", "a hat"]).shape == (2,)
    with pytest.raises(ValueError, match="one text per image .2., but got 3 texts"):
        draw(["a dog", "a hat", "a dog"])
    with pytest.raises(ValueError, match="`num_cutouts` must be at least 1"):
        CLIPGuidance(model, processor, "a dog", 0)


def test_gradients_are_shortened_to_the_largest_size():
    gradient = images() * torch.tensor([0.1, 10.0])[:, None, None, None]
    found = shortened(gradient, 0.5)
    assert torch.equal(found[0], gradient[0])
    torch.testing.assert_close(found[1].square().mean().sqrt(), torch.tensor(0.5))
