"""Arguments of wrong types, shapes and ranges that both models refuse."""

import numpy as np
import pytest
import torch
from model_calls import LABELS, TIMESTEPS, every_model, predict, tiny_model
from tiny_models import NUM_CLASSES, images, tiny_unet


WRONG_TYPES = {
    "sample_size": ["8", None, 8.0, True, float("nan"), [8], np.array([8])],
    "channel_mult": [None, "12", 2, ["a"], [None], {1: 2}],
    "attention_resolutions": [None, 4, "4", [4.5]],
    "dropout": ["0.1", None, True, float("nan"), 1.5, -0.1],
    "output_scale_factor": ["2", None, 0, -1.0, float("nan"), float("inf"), [1.0]],
    "timestep_scale": ["1", None, 0, float("inf")],
    "layers_per_block": [2.5, "1", True, 0, (1, 2, 3), (1, 0), (), [1, 2.5]],
    "in_channels": [0, -1, "3", 3.0],
    "norm_num_groups": ["4", 2.0, 0],
    "attention_head_dim": ["8", 2.0, [8]],
    "resnet_time_scale_shift": [None, 1, "ada"],
    "downsample_type": [None, True],
}
WRONG_TYPES_OF_UNET = {
    "use_null_class": ["no", "false", 1, None],
    "low_res_conditioning": ["no", 0, None, []],
    "num_class_embeds": ["5", 5.0, True, 0],
    "out_channels": ["6", None, 6.0],
    "upsample_type": [None, 0],
}


@pytest.mark.parametrize("name", WRONG_TYPES)
@every_model
def test_config_of_wrong_types_is_refused_by_name(kind, name):
    for value in WRONG_TYPES[name]:
        with pytest.raises(ValueError, match=name):
            tiny_model(kind, **{name: value})


@pytest.mark.parametrize("name", WRONG_TYPES_OF_UNET)
def test_unet_config_of_wrong_types_is_refused_by_name(name):
    for value in WRONG_TYPES_OF_UNET[name]:
        with pytest.raises(ValueError, match=name):
            tiny_unet(**{name: value})


WRONG_IMAGES = {
    "array": images().numpy(),
    "list": images().tolist(),
    "number": 1.5,
    "complex": images().to(torch.complex64),
    "integers": images().long(),
    "truth values": images() > 0,
    "sparse": images().to_sparse(),
    "one image": images()[0],
    "five dimensions": images()[None],
    "channels": images()[:, :1],
    "no pixels": images()[..., :0],
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
@every_model
def test_images_of_another_kind_are_refused(kind, name):
    with pytest.raises(ValueError, match=r"`sample` must be .*\(batch, 3, height, width\)"):
        predict(tiny_model(kind), WRONG_IMAGES[name])


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_low_resolution_images_of_another_kind_are_refused(name):
    with pytest.raises(ValueError, match=r"`low_res` must be .*\(batch, 3, height, width\)"):
        tiny_unet(low_res_conditioning=True)(images(), 5, LABELS, WRONG_IMAGES[name])


def test_another_number_of_low_resolution_images_is_refused():
    with pytest.raises(ValueError, match="`low_res` must have as many images as `sample`, 2, but got 1"):
        tiny_unet(low_res_conditioning=True)(images(), 5, LABELS, images(1))


WRONG_NUMBERS = [None, "5", b"5", {}, ["5"], object(), 1j, torch.tensor([1j, 2j]), True, [], [1, 2, 3], [[1, 2]]]


@every_model
def test_timesteps_of_another_kind_or_number_are_refused(kind):
    model = tiny_model(kind)
    for timestep in WRONG_NUMBERS:
        with pytest.raises(ValueError, match="`timestep` must be"):
            predict(model, timestep=timestep)


@pytest.mark.parametrize("labels", WRONG_NUMBERS[1:] + [[0.5, 1.0], torch.tensor([1.0, 2.0])])
def test_labels_of_another_kind_or_number_are_refused(labels):
    with pytest.raises(ValueError, match="class_labels`? must be"):
        predict(tiny_unet(), labels=labels)


@pytest.mark.parametrize("label", [NUM_CLASSES, -1])
def test_label_that_does_not_exist_is_refused(label):
    with pytest.raises(ValueError, match=rf"`class_labels` must be in \[0, {NUM_CLASSES - 1}\], but got \[{label}\]"):
        predict(tiny_unet(), labels=torch.tensor([label]))


@pytest.mark.parametrize("kind", [list, np.array, torch.Tensor.int])
def test_numbers_may_be_lists_arrays_and_short_integers(kind):
    def as_kind(tensor):
        return kind(tensor if kind is torch.Tensor.int else tensor.tolist())

    unet = tiny_unet()
    assert torch.equal(predict(unet, timestep=as_kind(TIMESTEPS), labels=as_kind(LABELS)), predict(unet))
