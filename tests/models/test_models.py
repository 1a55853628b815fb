"""Both models are saved, loaded and called in the same way as models of diffusers."""

import json

import numpy as np
import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from model_calls import (
    LABELS,
    TIMESTEPS,
    every_model,
    predict,
    relative_error,
    run,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import NUM_CLASSES, SIZE, draw_parameters, images, tiny_classifier

from diffusers_adm import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.models.blocks import (
    ADMAttentionBlock,
    ADMResnetBlock2D,
)


# Saving and loading


@every_model
def test_incomplete_weights_are_refused_by_name(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["encoder.conv_in.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing, such as encoder.conv_in.bias"):
        type(model).from_pretrained(tmp_path)


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_of_other_shapes_are_refused_although_they_are_to_be_ignored(kind, low_cpu_mem_usage, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    classes = {"num_class_embeds" if kind == "unet" else "num_classes": 7}
    with pytest.raises(ValueError, match=r"instead of \(7.*--pretrained_model_name_or_path"):
        type(model).from_pretrained(
            tmp_path, ignore_mismatched_sizes=True, low_cpu_mem_usage=low_cpu_mem_usage, **classes
        )
    # Nothing is to be ignored.
    assert torch.equal(predict(type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)), predict(model))


@every_model
def test_config_of_numpy_numbers_is_saved_as_plain_numbers(kind, tmp_path):
    numbers = {
        "sample_size": np.int64(8),
        "channel_mult": (np.float32(1), np.int32(2)),
        "attention_resolutions": [np.int16(4)],
        "dropout": np.float32(0.5),
        "output_scale_factor": np.float64(1),
        "num_class_embeds" if kind == "unet" else "num_classes": np.int64(NUM_CLASSES),
    }
    model = tiny_model(kind, **numbers)
    assert type(model.config.sample_size) is int and type(model.config.dropout) is float
    assert [type(mult) for mult in model.config.channel_mult] == [float, int]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in numbers} == {**numbers, "channel_mult": [1, 2]}
    assert torch.equal(predict(loaded), predict(model))


@every_model
def test_saved_model_loads_with_equal_outputs(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == set(model.state_dict())

    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    for name, value in json.loads(model.to_json_string()).items():
        assert json.loads(loaded.to_json_string())[name] == value, name
    assert torch.equal(predict(loaded), predict(model))


@every_model
def test_sharded_save_loads_with_equal_outputs(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert torch.equal(predict(type(model).from_pretrained(tmp_path)), predict(model))


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_load_and_save_keep_the_dtype(kind, dtype, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "full")
    half = type(model).from_pretrained(tmp_path / "full", dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors").exists()
    again = type(model).from_pretrained(tmp_path / "half", variant="fp16", dtype=dtype)
    sample = images().to(dtype)
    assert torch.equal(predict(again, sample), predict(half, sample))


@every_model
def test_model_spread_over_memory_and_disk_gives_equal_outputs(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": size * 9 // 10}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    spread = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", use_safetensors=True
    )
    assert torch.equal(predict(spread), predict(model))


def test_module_paths_that_saved_pipelines_record_stay_as_they_are():
    assert ADMUNet2DModel.__module__ == "diffusers_adm.models.unet_adm"
    assert NoisyClassifier.__module__ == "diffusers_adm.models.noisy_classifier"
    # diffusers' loader looks up there what the class derives from.
    import diffusers_adm.models.noisy_classifier
    import diffusers_adm.models.unet_adm

    assert hasattr(diffusers_adm.models.unet_adm, "ModelMixin")
    assert hasattr(diffusers_adm.models.noisy_classifier, "ModelMixin")


@every_model
def test_config_survives_json(kind):
    changes = {"channel_mult": (0.5, 1, 2), "attention_resolutions": (4, 2), "output_scale_factor": 2**0.5}
    model = tiny_model(kind, **changes, norm_num_groups=2, attention_head_dim=4)
    config = json.loads(model.to_json_string())
    loaded = draw_parameters(type(model).from_config(config), seed=0)
    again = draw_parameters(model, seed=0)
    assert [(name, p.shape) for name, p in loaded.named_parameters()] == [
        (name, p.shape) for name, p in again.named_parameters()
    ]
    assert torch.equal(predict(loaded), predict(again))


def test_default_config_is_the_released_64x64_model():
    with torch.device("meta"):
        unet, classifier = ADMUNet2DModel(), NoisyClassifier()
    # The paper's Table 4 gives 296 million parameters.
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == 296
    assert unet.config.sample_size == classifier.config.sample_size == 64
    assert unet.learns_variance and unet.null_class is None


# Calls


@every_model
def test_return_dict_false_gives_the_same_in_a_tuple(kind):
    model = tiny_model(kind)
    arguments = (images(), TIMESTEPS) + ((LABELS,) if kind == "unet" else ())
    with torch.no_grad():
        output = model(*arguments, return_dict=False)
    assert type(output) is tuple and len(output) == 1
    assert torch.equal(output[0], predict(model))


@every_model
def test_output_shape(kind):
    shape = (2, 6, SIZE, SIZE) if kind == "unet" else (2, NUM_CLASSES)
    assert predict(tiny_model(kind)).shape == shape


@every_model
def test_timestep_may_be_a_number_a_0d_tensor_or_one_an_image(kind):
    model = tiny_model(kind)
    expected = predict(model, timestep=torch.tensor([321, 321]))
    for timestep in (321, torch.tensor(321), torch.tensor([321])):
        assert torch.equal(predict(model, timestep=timestep), expected)
    assert not torch.allclose(predict(model, timestep=322), expected)


@every_model
def test_batch_rows_are_independent(kind):
    model = tiny_model(kind)
    sample, timestep, labels = images(3), torch.tensor([5, 400, 999]), torch.tensor([0, 4, 2])
    together = predict(model, sample, timestep=timestep, labels=labels)
    for row in range(3):
        alone = predict(model, sample[row : row + 1], timestep=timestep[row : row + 1], labels=labels[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
    assert relative_error(together[0], together[1]) > 1e-2


@every_model
def test_eval_mode_is_deterministic_and_leaves_no_trace(kind):
    model = tiny_model(kind, dropout=0.5)
    sample = images()
    before = sample.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(predict(model, sample), predict(model, sample))
    assert torch.equal(sample, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())


@every_model
def test_dropout_acts_in_training_only(kind):
    model = tiny_model(kind, dropout=0.5)
    expected = predict(model)
    assert torch.equal(expected, predict(tiny_model(kind, dropout=0.0)))
    torch.manual_seed(0)
    assert relative_error(predict(model.train()), expected) > 1e-2


@every_model
def test_every_parameter_gets_a_gradient(kind):
    model = tiny_model(kind).train()
    run(model, images()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_model
def test_fresh_model_starts_with_its_residual_branches_closed(kind):
    model = tiny_model(kind)
    fresh = type(model).from_config(model.config)
    for module in fresh.modules():
        if isinstance(module, ADMResnetBlock2D):
            assert not module.conv2.weight.any()
        if isinstance(module, ADMAttentionBlock):
            assert not module.attn.to_out.weight.any()
    if kind == "unet":
        assert not predict(fresh.eval()).any()


@pytest.mark.parametrize("kind", ["unet", "adaptive", "spatial", "spatial_v2"])
def test_image_of_any_size_that_the_downsampling_divides(kind):
    model = tiny_model(kind)
    output = predict(model, images(height=12, width=6))
    assert output.shape == ((2, 6, 12, 6) if kind == "unet" else (2, NUM_CLASSES))
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", ["unet", "adaptive", "spatial", "spatial_v2"])
def test_height_and_width_are_treated_alike(kind):
    # With kernels that are their own transpose, the transposed image has the transposed output.
    model = tiny_model(kind)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.mT) / 2)
    sample = images(height=12, width=6)
    output, transposed = predict(model, sample), predict(model, sample.mT)
    torch.testing.assert_close(transposed, output.mT if kind == "unet" else output, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("size", [(9, 8), (8, 9)])
def test_size_that_the_downsampling_does_not_divide_is_refused(kind, size):
    with pytest.raises(ValueError, match=f"multiples of 2, but got {size[0]}x{size[1]}"):
        predict(tiny_model(kind), images(height=size[0], width=size[1]))


@every_model
def test_other_numbers_of_channels_are_refused(kind):
    for sample in (images()[:, :2], images()[0]):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), but got"):
            tiny_model(kind)(sample, 5)


@pytest.mark.parametrize("size", [(16, 16), (16, 4), (4, 8)])
def test_attention_pool_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"4x4, but got features of {size[0] // 2}x{size[1] // 2}"):
        predict(tiny_classifier("attention"), images(height=size[0], width=size[1]))


# Attention


class MeanProcessor:
    """Attends to all positions alike."""

    def __call__(self, attn, hidden_states):
        value = attn.to_qkv(hidden_states).chunk(3, dim=-1)[2]
        return attn.to_out(value.mean(dim=1, keepdim=True).expand_as(value))


@every_model
def test_attention_processors_are_listed_and_can_be_replaced(kind):
    model = tiny_model(kind)
    names = [name for name, module in model.named_modules() if isinstance(module, AttentionModuleMixin)]
    assert len(names) >= 2
    processors = model.attn_processors
    assert set(processors) == {f"{name}.processor" for name in names}

    expected = predict(model)
    model.set_attn_processor(MeanProcessor())
    assert {type(processor) for processor in model.attn_processors.values()} == {MeanProcessor}
    assert relative_error(predict(model), expected) > 1e-3
    model.set_attn_processor(dict(processors))
    assert torch.equal(predict(model), expected)


@pytest.fixture
def restored_attention_backend():
    # diffusers makes the backend that a model is given the default of all.
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


@every_model
def test_attention_backend_can_be_chosen(kind, restored_attention_backend):
    model = tiny_model(kind)
    expected = predict(model)
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert {processor._attention_backend.value for processor in model.attn_processors.values()} == {backend}
        torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-5)
    model.set_attention_backend("_native_efficient")
    with pytest.raises(RuntimeError, match="No viable backend"):  # on the CPU: so it was asked
        predict(model)
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


@every_model
def test_fusing_projections_that_are_fused_already_changes_nothing(kind):
    model = tiny_model(kind)
    expected = predict(model)
    model.fuse_qkv_projections()
    assert torch.equal(predict(model), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(predict(model), expected)
