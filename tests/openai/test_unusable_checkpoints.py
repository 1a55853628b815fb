"""Checkpoints that cannot be used are refused with the reason."""

import os
import pickle

import pytest
import torch
from golden_cases import (
    draw_weights,
    load_case,
    model_class,
    published_flags,
)

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier


def test_unknown_checkpoint_without_flags_is_refused(pipeline_files):
    unet, classifier, flags = pipeline_files
    for checkpoint in (unet, draw_weights(load_case("unet_class_conditional")[0])):
        with pytest.raises(ValueError, match="`flags` are required"):
            ADMUNet2DModel.from_openai(checkpoint)
    with pytest.raises(ValueError, match="`flags` are required"):
        ClassifierGuidedPipeline.from_openai(unet, classifier)


def test_missing_released_file_says_where_it_is_to_be_had(tmp_path):
    with pytest.raises(ValueError, match="https://openaipublic.*/jul-2021/256x256_diffusion.pt"):
        ADMUNet2DModel.from_openai(tmp_path / "256x256_diffusion.pt")
    with pytest.raises(ValueError, match="does not exist"):
        ADMUNet2DModel.from_openai(tmp_path / "mine.pt", "--image_size 32")
    with pytest.raises(ValueError, match="is a folder. Saved models need no conversion"):
        ADMUNet2DModel.from_openai(tmp_path, "--image_size 32")


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.99])
def test_truncated_file_is_refused(pipeline_files, kept):
    unet, _, flags = pipeline_files
    content = unet.read_bytes()
    unet.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="damaged, incomplete"):
        ADMUNet2DModel.from_openai(unet, flags)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    save({"time_embed.0.weight": Malicious(tmp_path / "made")}, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="holds code"):
        ADMUNet2DModel.from_openai(tmp_path / "unet.pt", "--image_size 32")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"step": 3}, "int under 'step'"),
        ({"state_dict": {"a": torch.zeros(1)}}, "dict under 'state_dict'"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, "torch.int64 under 'a'"),
        (torch.zeros(3), "must hold a state dict"),
        ([torch.zeros(3)], "must hold a state dict"),
        ({}, "must hold a state dict"),
    ],
)
def test_file_of_anything_but_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match=message):
        ADMUNet2DModel.from_openai(tmp_path / "unet.pt", "--image_size 32")


def test_old_torch_format_is_read(tmp_path):
    description, _ = load_case("unet_class_conditional")
    published = draw_weights(description)
    torch.save(published, tmp_path / "unet.pt", _use_new_zipfile_serialization=False)
    model = ADMUNet2DModel.from_openai(tmp_path / "unet.pt", published_flags(description))
    assert torch.equal(model.conv_out.weight, published["out.2.weight"])


@pytest.mark.parametrize("case", ["unet_class_conditional", "classifier_attention"])
def test_missing_tensor_is_named(case):
    description, _ = load_case(case)
    published = draw_weights(description)
    for name in list(published)[::7]:
        incomplete = {other: tensor for other, tensor in published.items() if other != name}
        with pytest.raises(ValueError, match=name):
            model_class(case).from_openai(incomplete, published_flags(description))


def test_left_over_and_misshapen_tensors_are_named():
    description, _ = load_case("unet_class_conditional")
    published, flags = draw_weights(description), published_flags(description)
    with pytest.raises(ValueError, match="left over: extra.weight"):
        ADMUNet2DModel.from_openai(published | {"extra.weight": torch.zeros(1)}, flags)
    with pytest.raises(ValueError, match=r"of another shape: out.0.bias \(31,\) instead of \(32,\)"):
        ADMUNet2DModel.from_openai(published | {"out.0.bias": torch.zeros(31)}, flags)


def test_a_classifier_is_not_a_unet_and_a_unet_not_a_classifier():
    with pytest.raises(ValueError, match="must hold a UNet, but holds a classifier"):
        ADMUNet2DModel.from_openai(draw_weights(load_case("classifier_spatial")[0]), "--image_size 32")
    with pytest.raises(ValueError, match="must hold a classifier, but holds a UNet"):
        NoisyClassifier.from_openai(draw_weights(load_case("unet_class_conditional")[0]), "--image_size 32")
    with pytest.raises(ValueError, match="lacks the tensor 'time_embed.0.weight'"):
        ADMUNet2DModel.from_openai({"layer1.conv.weight": torch.zeros(3, 3)}, "--image_size 32")


@pytest.mark.parametrize("cls", [ADMUNet2DModel, NoisyClassifier, ClassifierGuidedPipeline, ADMUpsamplePipeline])
def test_checkpoint_in_the_place_of_a_saved_model_is_told_how_to_convert(cls, pipeline_files):
    unet, _, _ = pipeline_files
    with pytest.raises(ValueError, match=f"is a file. .* `diffusers-adm convert --unet {unet} --output DIR`"):
        cls.from_pretrained(unet)
