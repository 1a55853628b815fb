"""Pipelines of this package's UNet for tools that know only diffusers."""

import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from tiny_models import SIZE, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.pipelines.stock import as_ddpm_pipeline


def test_tools_find_the_unet_once_the_package_is_imported(tmp_path):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    as_ddpm_pipeline(pipeline).save_pretrained(tmp_path / "model")
    # As the wrappers of deepinv do, which ask for no trust.
    script = """
import sys
import torch
import diffusers_adm
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
sample = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(pipeline.unet(sample, torch.tensor([7, 900]), return_dict=False)[0], sys.argv[2])
assert type(pipeline).__name__ == "DDPMPipeline"
assert pipeline.scheduler.config.variance_type == "fixed_large"
assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
"""
    sample = images()
    torch.save(sample, tmp_path / "sample.pt")
    subprocess.run([sys.executable, "-c", script, tmp_path / "model", tmp_path / "sample.pt"], check=True)
    with torch.no_grad():
        expected = pipeline.unet(sample, torch.tensor([7, 900])).sample[:, :3]
    torch.testing.assert_close(torch.load(tmp_path / "sample.pt", weights_only=True), expected, rtol=1e-5, atol=1e-6)


def test_unet_of_default_channels_loses_its_variance_too():
    unet = ADMUNet2DModel(num_class_embeds=None, model_channels=32, channel_mult=(1, 2), attention_resolutions=())
    assert as_ddpm_pipeline(tiny_pipeline(unet, with_classifier=False)).unet.config.out_channels == 3


def test_pipeline_stays_as_it_is():
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None))
    stock = as_ddpm_pipeline(pipeline)
    assert isinstance(stock, DDPMPipeline)
    assert pipeline.unet.config.out_channels == 6 and pipeline.scheduler.config.variance_type == "learned_range"
    assert stock.unet.encoder.conv_in.weight.data_ptr() == pipeline.unet.encoder.conv_in.weight.data_ptr()
    assert stock.unet.config.sample_size == SIZE


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_stock_pipelines_of_every_scheduler_draw(scheduler_class):
    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), tiny_scheduler(scheduler_class), with_classifier=False)
    stock = as_ddpm_pipeline(pipeline)
    stock.set_progress_bar_config(disable=True)
    assert stock(num_inference_steps=2, output_type="np").images.shape == (1, SIZE, SIZE, 3)
    assert stock.scheduler.config.beta_end == pipeline.scheduler.config.beta_end


def test_unet_that_needs_labels_is_refused():
    with pytest.raises(ValueError, match="must be unconditional or have a null class"):
        as_ddpm_pipeline(tiny_pipeline())
