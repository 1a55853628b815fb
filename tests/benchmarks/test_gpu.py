"""The bench of a GPU: its plain UNet, and its tables, in small and on the CPU."""

import pytest
import torch
from tiny_models import NUM_CLASSES, draw_parameters, images

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.benchmarks import gpu
from diffusers_adm.benchmarks.plain_unet import PlainUNet


def test_plain_unet_is_the_unet_in_other_words():
    unet = ADMUNet2DModel(
        32,
        model_channels=32,
        channel_mult=(1, 2, 2),
        layers_per_block=2,
        attention_resolutions=(16, 8),
        attention_head_dim=32,
        num_class_embeds=NUM_CLASSES,
    )
    draw_parameters(unet)
    sample, timestep, labels = images(3, height=32, width=32), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = unet(sample, timestep, class_labels=labels).sample
        torch.testing.assert_close(PlainUNet(unet).eval()(sample, timestep, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_networks_and_sampling_are_measured(monkeypatch, capsys):
    words = "--batch_size 2 --rounds 2 --sample_size 16 --model_channels 64 --classifier_channels 64 --no-compile"
    monkeypatch.setattr("sys.argv", ["gpu", *words.split()])
    monkeypatch.setattr(gpu, "DTYPES", {"float32": torch.float32})
    gpu.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| UNet", "| ---", "| plain", "| package", "| data type", "| ---", "| float32"]
    assert rows[2][3] == "1.00" and float(rows[3][3]) > 0
