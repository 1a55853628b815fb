"""Plan of a dry run, and cost of a forward pass."""

import numpy as np
import pytest
import torch
from golden_cases import meta_state_dict
from PIL import Image as PILImage
from tiny_models import tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS
from diffusers_adm.training import train_unet
from diffusers_adm.training.plan import forward_cost


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((16, 16, 3), 40 * i, dtype=np.uint8)
            PILImage.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_dry_run_prints_the_plan_and_leaves_nothing(folder, tmp_path, capsys):
    options = f"--output_dir {tmp_path / 'out'} --train_data_dir {folder} --preset small-32 --dry_run".split()
    train_unet.main(
        train_unet.parse_args([*options, *"--train_batch_size 3 --total_batch_size 6 --mixed_precision no".split()])
    )
    out = capsys.readouterr().out
    assert "6 = 3 images x 2 accumulated x 1 processes" in out
    assert "saves a checkpoint every 5000 steps, first at step 500" in out
    assert "GFLOPs" in out and "GiB" in out and "million" in out
    assert not (tmp_path / "out").exists()


def test_cost_is_that_of_the_network():
    with torch.device("meta"):
        released = ADMUNet2DModel.from_openai(
            meta_state_dict("256x256_diffusion.pt"), RELEASED_CHECKPOINTS["256x256_diffusion.pt"].flags
        )
    operations, _ = forward_cost(released)
    # 1120 GFLOPs in the text of the DiT paper (arXiv 2212.09748), which counts a multiplication and its addition as one.
    assert operations / 2 == pytest.approx(1120e9, rel=0.02)


def test_activations_are_what_a_backward_pass_keeps():
    model = tiny_unet()
    _, kept = forward_cost(model)
    storages, weights = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([1])).sample
    assert output.requires_grad
    assert kept == pytest.approx(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()), rel=0.1)


def test_total_batch_must_be_divisible(folder, tmp_path):
    options = f"--output_dir {tmp_path / 'out'} --train_data_dir {folder} --preset small-32 --dry_run".split()
    with pytest.raises(ValueError, match="--total_batch_size must be a multiple of 48, .* but got 64"):
        train_unet.main(
            train_unet.parse_args(
                [*options, *"--train_batch_size 48 --total_batch_size 64 --mixed_precision no".split()]
            )
        )
