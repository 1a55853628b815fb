"""Labels of samples."""

import numpy as np
import pytest
import torch
from image_files import arrays_of
from sampling_runs import sample
from tiny_models import NUM_CLASSES, SIZE, tiny_pipeline, tiny_unet

from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.evaluation import draw_samples
from diffusers_adm.evaluation.shards import image_generator


def test_labels_are_random_balanced_or_listed(model, tmp_path):
    balanced = sample(model, tmp_path / "balanced", "--labels", "balanced")
    assert balanced["arr_1"].tolist() == [i % NUM_CLASSES for i in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join(map(str, reversed(balanced["arr_1"]))))
    listed = sample(model, tmp_path / "listed", "--labels", tmp_path / "labels.txt")
    assert listed["arr_1"].tolist() == balanced["arr_1"].tolist()[::-1]
    for folder, mixed in (("balanced", True), ("listed", False)):  # the labels of a file may be sorted
        assert NpzImages(tmp_path / folder / f"samples_10x{SIZE}x{SIZE}x3.npz").mixed is mixed
    from_file = sample(model, tmp_path / "file", "--labels", tmp_path / "listed" / f"samples_10x{SIZE}x{SIZE}x3.npz")
    assert np.array_equal(from_file["arr_0"], listed["arr_0"])
    free = sample(model, tmp_path / "free", "--scheduler", "DDIM", num_samples=100)
    assert np.bincount(free["arr_1"], minlength=NUM_CLASSES).min() > 8
    assert len({image.tobytes() for image in free["arr_0"]}) == 100


def test_unlabelled_samples_have_no_labels(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False, num_inference_steps=2)
    path = draw_samples(pipeline, tmp_path / "run", 3, batch_size=2)
    assert set(arrays_of(path)) == {"arr_0", "metadata"}


def test_labels_and_noise_are_apart():
    first = torch.randint(2**31, (), generator=image_generator(0, 3, purpose=1))
    assert first != torch.randint(2**31, (), generator=image_generator(0, 3))


@pytest.mark.parametrize("condition_unet", [True, False])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_noise_of_a_seed_is_the_same_with_and_without_labels(condition_unet, guidance_scale, tmp_path):
    """The points of a sweep share their noise."""
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), num_inference_steps=2)
    inputs = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    call = {"condition_unet": condition_unet, "guidance_scale": guidance_scale}
    path = draw_samples(pipeline, tmp_path / "run", 3, batch_size=3, seed=5, call=call)
    noise = [torch.randn(3, SIZE, SIZE, generator=image_generator(5, number)) for number in range(3)]
    assert torch.equal(inputs[0], torch.stack(noise))
    assert ("arr_1" in arrays_of(path)) == bool(condition_unet or guidance_scale)


def test_a_word_that_means_two_classes_is_refused(tmp_path):
    pipeline = tiny_pipeline(id2label=dict(enumerate(["1", "10", "2", "20", "3"])), num_inference_steps=1)
    (tmp_path / "labels.txt").write_text("10\n20\n")  # no numbers of classes
    assert arrays_of(draw_samples(pipeline, tmp_path / "named", 2, labels=str(tmp_path / "labels.txt")))[
        "arr_1"
    ].tolist() == [1, 3]
    (tmp_path / "labels.txt").write_text("10\n3\n")
    with pytest.raises(ValueError, match="must not have 3, which is the number of one class and the name of class 4"):
        draw_samples(pipeline, tmp_path / "unclear", 2, labels=str(tmp_path / "labels.txt"))
