"""Low-rank adapters: one that does not fit is refused before anything changes, and layers trained whole switch with the others."""

from pathlib import Path

import pytest
import torch
from model_calls import images, predict
from peft import LoraConfig
from tiny_models import tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.models.adapters import AdapterMixin
from diffusers_adm.openai.tensors import load_published
from diffusers_adm.pipelines.stock import as_ddpm_pipeline
from diffusers_adm.training.pretrained import add_adapter


# peft warns of every second adapter.
several_adapters = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
every_kind = pytest.mark.parametrize("make", [tiny_unet, tiny_classifier])


def move_trainable(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Changes the weights that are trained, as a training run does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def train(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A model with an adapter whose weights are no longer the first ones."""
    add_adapter(model, rank=2)
    return move_trainable(model, seed)


def train_factors(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """A model with an adapter that has no layers that are trained whole."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["conv1", "to_qkv"]))
    return move_trainable(model, seed)


@pytest.fixture
def adapters(tmp_path) -> dict[str, Path]:
    """Folders of three adapters of the tiny UNet. The first two have layers that are trained whole."""
    folders = {name: tmp_path / name for name in ("first", "second", "factors")}
    train(tiny_unet(), seed=1).save_lora_adapter(folders["first"])
    train(tiny_unet(), seed=2).save_lora_adapter(folders["second"])
    train_factors(tiny_unet()).save_lora_adapter(folders["factors"])
    return folders


def load(adapters: dict[str, Path], *names: str) -> AdapterMixin:
    """Returns the tiny UNet with adapters under their names."""
    model = tiny_unet()
    for name in names:
        model.load_lora_adapter(adapters[name], adapter_name=name)
    return model


def alone(adapters: dict[str, Path], name: str) -> torch.Tensor:
    """Returns what the tiny UNet computes with one adapter."""
    return predict(load(adapters, name))


def assert_same(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def check_saved(model: AdapterMixin, expected: torch.Tensor, folder: Path) -> None:
    """Checks what a model computes, before and after it is saved, and that the saved model computes it too."""
    assert_same(predict(model), expected)
    model.save_pretrained(folder)
    assert_same(predict(model), expected)
    assert_same(predict(type(model).from_pretrained(folder)), expected)


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


@every_kind
@pytest.mark.parametrize(
    ("disable", "enable"), [("disable_lora", "enable_lora"), ("disable_adapters", "enable_adapters")]
)
def test_disabled_adapter_leaves_the_model(make, disable, enable, tmp_path):
    base, model = predict(make()), train(make())
    adapted = predict(model)
    assert (adapted - base).abs().max() > 0.1
    getattr(model, disable)()
    check_saved(model, base, tmp_path / "disabled")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    getattr(model, enable)()
    check_saved(model, adapted, tmp_path / "enabled")


@every_kind
@pytest.mark.parametrize(
    "remove",
    [lambda model: model.unload_lora(), lambda model: model.delete_adapters("default")],
    ids=["unload_lora", "delete_adapters"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_removed_adapter_leaves_the_model_or_the_fused_weights(make, remove, fused, tmp_path):
    plain, model = make(), train(make())
    expected = predict(model if fused else plain)
    if fused:
        model.fuse_lora()
    remove(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    check_saved(model, expected, tmp_path)


def test_fused_adapter_that_is_disabled_is_removed_from_the_weights(tmp_path):
    model = train(tiny_unet())
    model.fuse_lora()
    model.disable_lora()
    model.unload_lora()
    check_saved(model, predict(tiny_unet()), tmp_path)


def test_unloaded_model_has_the_tensors_of_the_original_code():
    sizes = {"norm_num_groups": 32, "model_channels": 32}
    plain, model = tiny_unet(**sizes), train(tiny_unet(**sizes))
    model.unload_lora()
    tensors = model.to_openai_state_dict()
    expected = plain.to_openai_state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_unloaded_model_takes_another_adapter(adapters, tmp_path):
    model = load(adapters, "first")
    model.unload_lora()
    model.load_lora_adapter(adapters["second"])
    check_saved(model, alone(adapters, "second"), tmp_path)


@several_adapters
@pytest.mark.parametrize("activate", ["set_adapters", "set_adapter"])
def test_each_of_two_adapters_computes_what_it_computes_alone(adapters, activate, tmp_path):
    model = load(adapters, "first", "second")
    check_saved(model, alone(adapters, "second"), tmp_path / "loaded")
    for name in ("first", "second", "first"):
        getattr(model, activate)(name)
        check_saved(model, alone(adapters, name), tmp_path / name)
    model.disable_lora()
    check_saved(model, predict(tiny_unet()), tmp_path / "disabled")
    model.set_adapters([])
    model.enable_lora()
    check_saved(model, predict(tiny_unet()), tmp_path / "none")


@several_adapters
def test_adapter_that_is_added_for_training_is_trained(adapters):
    model = load(adapters, "first")
    model.add_adapter(LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["conv_out"]))
    assert_same(predict(model), predict(tiny_unet()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".default." in name for name in trained)
    assert any("conv_out.modules_to_save" in name for name in trained)


@several_adapters
def test_adapter_with_whole_layers_is_combined_with_low_rank_factors(adapters, tmp_path):
    expected = load(adapters, "first")
    expected.fuse_lora()
    expected.unload_lora()
    expected.load_lora_adapter(adapters["factors"], adapter_name="factors")
    expected.set_adapters("factors", 0.5)
    model = load(adapters, "first", "factors")
    check_saved(model, alone(adapters, "factors"), tmp_path / "factors")
    model.set_adapters(["first", "factors"], [1.0, 0.5])
    check_saved(model, predict(expected), tmp_path / "both")
    model.fuse_lora()
    model.unload_lora()
    check_saved(model, predict(expected), tmp_path / "fused")


@several_adapters
@pytest.mark.parametrize(
    "combine",
    [
        lambda model: model.set_adapters(["first", "second"]),
        lambda model: model.set_adapter(["first", "second"]),
        lambda model: model.fuse_lora(adapter_names=["first", "second"]),
    ],
    ids=["set_adapters", "set_adapter", "fuse_lora"],
)
def test_two_adapters_with_whole_layers_are_not_combined(adapters, combine):
    model = load(adapters, "first", "second")
    with pytest.raises(ValueError, match=r"Only one adapter .* low-rank factors.*\['first', 'second'\]") as caught:
        combine(model)
    assert "\n" not in str(caught.value)
    assert_same(predict(model), alone(adapters, "second"))


@several_adapters
def test_fused_adapter_stays_in_use_until_it_is_unfused(adapters, tmp_path):
    first, second = alone(adapters, "first"), alone(adapters, "second")
    model = load(adapters, "first", "second")
    model.fuse_lora(adapter_names=["first"])
    check_saved(model, first, tmp_path / "fused")
    with pytest.raises(ValueError, match="Only one adapter"):
        model.fuse_lora(adapter_names=["second"])
    model.set_adapters("second")
    check_saved(model, first, tmp_path / "still fused")
    with pytest.raises(ValueError, match=r"unfuse_lora.*\['first'\]"):
        model.delete_adapters("first")
    check_saved(model, first, tmp_path / "not deleted")
    model.unfuse_lora()
    check_saved(model, second, tmp_path / "unfused")


@several_adapters
def test_deleted_adapter_gives_way_to_the_other(adapters, tmp_path):
    model = load(adapters, "first", "second")
    model.delete_adapters("first")
    assert not any(".first." in name for name in model.state_dict())
    check_saved(model, alone(adapters, "second"), tmp_path / "second")
    model.load_lora_adapter(adapters["first"], adapter_name="first")
    model.delete_adapters("first")
    check_saved(model, alone(adapters, "second"), tmp_path / "second again")
    model.delete_adapters(["second"])
    check_saved(model, predict(tiny_unet()), tmp_path / "none")
    model.load_lora_adapter(adapters["first"])
    check_saved(model, alone(adapters, "first"), tmp_path / "first")


@several_adapters
def test_active_adapter_stays_active_when_another_is_deleted(adapters, tmp_path):
    model = load(adapters, "first", "second")
    model.load_lora_adapter(adapters["first"], adapter_name="third")
    model.delete_adapters("first")
    check_saved(model, alone(adapters, "first"), tmp_path)


@several_adapters
def test_low_rank_factors_stay_when_the_adapter_with_whole_layers_is_deleted(adapters, tmp_path):
    factors = alone(adapters, "factors")
    check_saved(load(adapters, "factors"), factors, tmp_path / "alone")
    model = load(adapters, "first", "factors")
    model.delete_adapters("first")
    assert not any("original_module" in name for name in model.state_dict())
    check_saved(model, factors, tmp_path / "left")


@several_adapters
def test_unknown_adapter_is_refused(adapters):
    model = load(adapters, "first")
    with pytest.raises(ValueError, match=r"loaded adapters \['first'\], but got \['frist'\]"):
        model.set_adapters("frist")
    assert_same(predict(model), alone(adapters, "first"))


@pytest.mark.parametrize("kind", [str, Path])
def test_missing_folder_is_named(kind, tmp_path):
    missing = kind(tmp_path / "missing" / "folder")
    with pytest.raises(ValueError, match=f"^There is no folder '{missing}'"):
        tiny_unet().load_lora_adapter(missing)


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"^The adapter cannot be loaded from '{tmp_path}'"):
        tiny_unet().load_lora_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "prefix", "message"),
    [
        ({}, None, "contain 'lora', but got no tensors"),
        ({"conv_out.bias": torch.zeros(6)}, None, r"contain 'lora', but got \['conv_out.bias'\]"),
        ({"conv_out.lora_A.weight": torch.zeros(2, 8, 3, 3)}, "unet", "begin with 'unet.' and contain 'lora'"),
    ],
    ids=["empty", "whole layers", "prefix"],
)
def test_adapter_without_factors_is_refused(tensors, prefix, message):
    model = tiny_unet()
    with pytest.raises(ValueError, match=message):
        model.load_lora_adapter(tensors, prefix=prefix)
    assert_same(predict(model), predict(tiny_unet()))


@pytest.mark.parametrize("kwargs", [{}, {"variant": "fp16"}])
def test_arguments_of_saving_can_be_positional(kwargs, tmp_path):
    model = train(tiny_unet())
    model.save_pretrained(tmp_path, True, None, True, **kwargs)
    assert_same(predict(ADMUNet2DModel.from_pretrained(tmp_path, **kwargs)), predict(model))
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        model.save_pretrained(tmp_path, True, None, False)
    with pytest.raises(TypeError, match="multiple values for argument 'is_main_process'"):
        model.save_pretrained(tmp_path, True, is_main_process=True)


@pytest.mark.parametrize("enabled", [True, False])
def test_stock_pipeline_has_the_adapter_in_its_weights(enabled, tmp_path):
    unet = train(tiny_unet(num_class_embeds=None))
    if not enabled:
        unet.disable_lora()
    stock = as_ddpm_pipeline(tiny_pipeline(unet, with_classifier=False))
    timesteps = torch.tensor([998, 17])
    stock.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = unet(images(), timesteps).sample[:, :3]
        for plain in (stock.unet, ADMUNet2DModel.from_pretrained(tmp_path / "unet")):
            assert_same(plain(images(), timesteps).sample, expected)
