"""`ClassifierGuidedPipeline`: labels, seeds and guidance of a call, on random models of the real classes."""

import numpy as np
import pytest
import torch
from pipeline_calls import (
    NAMES,
    SCALE,
    STEPS,
    differ,
    draw,
    every_solver,
    labels_seen,
    rows_seen,
    seeded,
    solver_pipeline,
)
from tiny_models import NUM_CLASSES, SIZE, images, tiny_classifier, tiny_pipeline, tiny_unet


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


def test_names_are_found_in_either_form_of_their_accents():
    """Names of folders on a Mac have accents of their own."""
    composed, decomposed = "\u00e9cureuil", "e\u0301cureuil"
    for saved in (composed, decomposed):
        pipeline = tiny_pipeline(id2label={0: "chat", 1: saved})
        assert [pipeline.class_ids(name) for name in (composed, decomposed)] == [[1], [1]]


def test_a_message_names_the_classes_that_there_are():
    with pytest.raises(ValueError, match="No class is called 'zebra'. The names are "):
        tiny_pipeline(id2label={0: "cat", 1: "dog"}).class_ids("zebra")
    many = tiny_pipeline(
        tiny_unet(num_class_embeds=30),
        id2label={number: f"class {number}" for number in range(30)},
        with_classifier=False,
    )
    with pytest.raises(ValueError, match="Similar names are .*class 3.*`pipe.label2id` has all names"):
        many.class_ids("clas 3")


def test_an_unknown_argument_is_said_of_what_was_called():
    with pytest.raises(TypeError, match="^ClassifierGuidedPipeline: got an unexpected keyword argument 'prompt'"):
        tiny_pipeline()(prompt="a cat")


def test_random_labels_of_a_list_of_generators_are_those_of_each_alone():
    pipeline = tiny_pipeline()
    seen = labels_seen(pipeline.unet)
    draw(pipeline, None, batch_size=3, generator=[seeded(seed) for seed in range(3)], num_inference_steps=1)
    expected = [torch.randint(0, NUM_CLASSES, (1,), generator=seeded(seed)).item() for seed in range(3)]
    assert seen == [expected]


@pytest.mark.filterwarnings("ignore:The UNet has 5 classes and the classifier has 2")
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


@pytest.mark.filterwarnings("ignore:The UNet has 5 classes and the classifier has [39]")
def test_unet_and_classifier_may_know_different_numbers_of_classes():
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), classifier=tiny_classifier(num_classes=3))
    with pytest.warns(UserWarning, match="The UNet has 5 classes and the classifier has 3. Both are given the labels"):
        assert draw(pipeline, [2, 2]).isfinite().all()
    with pytest.raises(ValueError, match=r"must be in \[0, 2\], but got \[3\]"):
        draw(pipeline, [2, 3])
    # A model that receives no label has no say.
    draw(pipeline, [3, 4], guidance_scale=0)
    with pytest.raises(ValueError, match=r"must be in \[0, 4\], but got \[5\]"):
        draw(pipeline, [3, 5], guidance_scale=0)

    larger = tiny_pipeline(tiny_unet(use_null_class=True), classifier=tiny_classifier(num_classes=9))
    with pytest.raises(ValueError, match=r"must be in \[0, 4\], but got \[8\]"):
        draw(larger, [8, 1])
    assert draw(larger, [8, 1], condition_unet=False).isfinite().all()
