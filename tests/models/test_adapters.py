"""Low-rank adapters: one that does not fit is refused before anything changes."""

import pytest
import torch
from model_calls import predict
from tiny_models import tiny_classifier, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.openai.tensors import load_published
from diffusers_adm.training.pretrained import add_adapter


def train(model: torch.nn.Module) -> torch.nn.Module:
    """A model with an adapter whose weights are no longer the first ones."""
    add_adapter(model, rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("trained", "other", "message"),
    [
        (
            tiny_unet(),
            tiny_unet(num_class_embeds=7),
            r"class_embedding.weight has the shape \(5, 32\), but .* needs \(7, 32\)",
        ),
        (tiny_unet(), tiny_unet(num_class_embeds=None), "class_embedding.weight .* no such layer"),
        (tiny_unet(), tiny_unet(in_channels=1, out_channels=2), "conv_out.bias"),
        (tiny_unet(), tiny_unet(model_channels=16), "The adapter does not fit this ADMUNet2DModel"),
        (tiny_classifier(), tiny_classifier(num_classes=7), "pooling.*The adapter|The adapter.*pooling"),
    ],
    ids=["classes", "unconditional", "channels", "widths", "classifier"],
)
def test_adapter_of_another_model_is_refused_and_changes_nothing(trained, other, message, tmp_path, caplog):
    train(trained).save_lora_adapter(tmp_path)
    weights = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        other.load_lora_adapter(tmp_path)
    assert "\n" not in str(caught.value) and not caplog.records
    assert not getattr(other, "peft_config", None)
    assert weights.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_model_is_saved_as_it_is_used(fused, enabled, tmp_path):
    model = train(tiny_unet())
    if fused:
        model.fuse_lora()
    if not enabled:
        model.disable_lora()
    model.save_pretrained(tmp_path)  # first, because a forward pass unmerges an adapter that is disabled
    expected = predict(model)
    torch.testing.assert_close(predict(ADMUNet2DModel.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_the_original_code_have_the_adapter_in_them():
    model = train(tiny_unet(norm_num_groups=32, model_channels=32))
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    merged = load_published(ADMUNet2DModel, config, model.to_openai_state_dict())
    torch.testing.assert_close(predict(merged), predict(model), rtol=1e-4, atol=1e-4)


def test_adapter_that_fits_loads(tmp_path):
    model = train(tiny_unet())
    model.save_lora_adapter(tmp_path)
    loaded = tiny_unet()
    loaded.load_lora_adapter(tmp_path)
    torch.testing.assert_close(predict(loaded), predict(model))
