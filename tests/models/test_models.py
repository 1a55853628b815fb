"""What diffusers' users rely on: the two models behave as any model of diffusers, and each option does what it says."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors.torch import load_file
from tiny_models import NUM_CLASSES, SIZE, draw_parameters, images, tiny_classifier, tiny_unet

from diffusers_adm import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.guidance import classifier_gradient
from diffusers_adm.models.blocks import (
    ADMAttentionBlock,
    ADMBlock,
    ADMDownsample2D,
    ADMResnetBlock2D,
    ADMUpBlock,
    ADMUpsample2D,
)
from diffusers_adm.models.noisy_classifier import POOLS, NoisyClassifierOutput


KINDS = ("unet", *POOLS)
TIMESTEPS = torch.tensor([998, 17])
LABELS = torch.tensor([3, 1])
CPU = torch.device("cpu")

every_model = pytest.mark.parametrize("kind", KINDS)
every_pool = pytest.mark.parametrize("pool", POOLS)


def tiny_model(kind: str, **changes) -> torch.nn.Module:
    """A UNet, or a classifier with the pooling that `kind` names."""
    return tiny_unet(**changes) if kind == "unet" else tiny_classifier(kind, **changes)


def run(model: torch.nn.Module, sample: torch.Tensor, timestep=TIMESTEPS, labels: torch.Tensor = LABELS):
    """The output tensor of either model."""
    if hasattr(model, "class_embedding"):
        return model(sample, timestep, labels).sample
    return model(sample, timestep).logits


@torch.no_grad()
def predict(model: torch.nn.Module, sample: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    return run(model, images() if sample is None else sample, **kwargs)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def float8_rounded(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose convolutions and linear layers, but for the embeddings', hold values that float8 can hold."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "embedding" not in name:
                for parameter in module.parameters():
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    return model


def block_calls(model: torch.nn.Module) -> Counter:
    """A counter that follows how often each block runs."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ADMBlock):
            calls[name] = 0
            # Before the block: a recomputation stops as soon as it has what it needs.
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


# Saving and loading


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
    with pytest.raises(ValueError, match=f"multiples of 2: got {size[0]}x{size[1]}"):
        predict(tiny_model(kind), images(height=size[0], width=size[1]))


@every_model
def test_other_numbers_of_channels_are_refused(kind):
    for sample in (images()[:, :2], images()[0]):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\) is needed"):
            tiny_model(kind)(sample, 5)


@pytest.mark.parametrize("size", [(16, 16), (16, 4), (4, 8)])
def test_attention_pool_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"4x4, got {size[0] // 2}x{size[1] // 2}"):
        predict(tiny_classifier("attention"), images(height=size[0], width=size[1]))


# Training memory


@every_model
def test_gradient_checkpointing_saves_memory_and_changes_nothing(kind):
    def train_step(model):
        saved, weights = 0, {parameter.data_ptr() for parameter in model.parameters()}

        def count(tensor):
            nonlocal saved
            if tensor.data_ptr() not in weights:
                saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = run(model, images())
        output.square().mean().backward()
        return output.detach(), [parameter.grad for parameter in model.parameters()], saved

    plain, checkpointed = tiny_model(kind).train(), tiny_model(kind).train()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    calls = block_calls(checkpointed)
    output, gradients, saved = train_step(plain)
    other_output, other_gradients, other_saved = train_step(checkpointed)

    assert torch.equal(other_output, output)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)
    assert set(calls.values()) == {2}, "each block must run a second time in the backward pass"
    assert other_saved < saved / 2

    checkpointed.disable_gradient_checkpointing()
    calls.clear()
    train_step(checkpointed)
    assert set(calls.values()) == {1}


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


# Memory when sampling


@every_model
def test_layerwise_casting_keeps_norms_and_embeddings_and_rounds_the_rest(kind):
    model = tiny_model(kind)
    expected = predict(float8_rounded(model))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        safe = "norm" in name or "embedding" in name
        assert parameter.dtype == (torch.float32 if safe else torch.float8_e4m3fn), name
    assert model.dtype == torch.float32
    output = predict(model)
    assert output.isfinite().all()
    assert torch.equal(output, expected)


@every_model
def test_layerwise_casting_computes_in_half_precision(kind):
    model = tiny_model(kind)
    expected = predict(float8_rounded(model))
    model = model.to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    output = predict(model, images().bfloat16())
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.1


OFFLOADS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf": {"offload_type": "leaf_level"},
}


@every_model
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_group_offloading_gives_equal_outputs(kind, offload, to_disk, tmp_path):
    model = tiny_model(kind)
    expected = predict(model)
    path = str(tmp_path) if to_disk else None
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **OFFLOADS[offload])
    if to_disk:
        assert list(tmp_path.glob("*.safetensors"))
    for _ in range(2):
        assert torch.equal(predict(model), expected)


@every_model
def test_block_offloading_holds_one_block_at_a_time(kind):
    # Blocks that no group of their own holds would be moved to the accelerator all at once.
    model = tiny_model(kind)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **OFFLOADS["block"])
    for name, module in model.named_modules():
        if isinstance(module, ADMBlock):
            hooks = getattr(module, "_diffusers_hook", None)
            assert hooks is not None and hooks.get_hook("group_offloading") is not None, name


@every_model
def test_names_of_blocks_that_diffusers_is_told_exist(kind):
    model = tiny_model(kind)
    classes = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= classes | {"ADMAttentionPool"}
    assert ("ADMAttentionPool" in model._no_split_modules) == (kind != "unet")
    assert model._repeated_blocks and set(model._repeated_blocks) <= classes
    if kind == "unet":
        assert "ADMUpBlock" in model._no_split_modules, "the skip connection is concatenated within"


# Compilation. The eager backend traces and guards as any other does, without the wait for a C++ compiler.


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield torch._dynamo.config
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_compiles_without_graph_break_or_recompilation(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with fresh_dynamo.patch(error_on_recompile=True), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(compiled, images()), expected)
        torch.testing.assert_close(
            run(compiled, images(seed=7), TIMESTEPS - 5, LABELS - 1),
            predict(model, images(seed=7), timestep=TIMESTEPS - 5, labels=LABELS - 1),
        )


@pytest.mark.parametrize("kind", ["unet", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_compiles_once_for_all_sizes(kind, fresh_dynamo):
    model = tiny_model(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with fresh_dynamo.patch(error_on_recompile=True), torch.no_grad():
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            for height, width in ((8, 8), (12, 16), (16, 12)):
                sample = images(height=height, width=width)
                torch.testing.assert_close(run(compiled, sample), predict(model, sample))


WIDTHS = {
    # The released models' multipliers, 1 / 32 as wide; attention at the same levels.
    "64x64": {"sample_size": 64, "channel_mult": (1, 2, 3, 4), "attention_resolutions": (32, 16, 8)},
    "256x256": {"sample_size": 64, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 4, 2)},
    "512x512": {"sample_size": 64, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4), "attention_resolutions": (4, 2, 1)},
}


@pytest.mark.parametrize("kind", ["unet", "attention"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_regional_compilation_stays_within_the_recompile_limit(kind, widths, fresh_dynamo):
    model = tiny_model(kind, layers_per_block=2, **WIDTHS[widths])
    sample = images(height=64, width=64)
    expected = predict(model, sample)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(predict(model, sample), expected, rtol=1e-4, atol=1e-4)
    assert 0 < len(compiled) <= fresh_dynamo.recompile_limit
    first = len(compiled)
    predict(model, sample)
    assert len(compiled) == first


@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_model_can_be_exported(kind):
    model = tiny_model(kind)
    arguments = (images(), TIMESTEPS) + ((LABELS,) if kind == "unet" else ())
    dynamic = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})[: len(arguments)]
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False)
    sample, timestep, labels = images(3), torch.tensor([4, 5, 6]), torch.tensor([0, 1, 2])
    output = program.module()(*(sample, timestep, labels)[: len(arguments)])
    torch.testing.assert_close(output[0], predict(model, sample, timestep=timestep, labels=labels))


@pytest.mark.slow
@every_model
def test_compiles_with_the_default_backend(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    with fresh_dynamo.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(predict(compiled._orig_mod), expected)
            with torch.no_grad():
                torch.testing.assert_close(run(compiled, images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_regional_compilation_with_the_default_backend(kind, fresh_dynamo):
    model = tiny_model(kind)
    expected = predict(model)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_guidance_through_a_compiled_classifier(fresh_dynamo):
    classifier = tiny_classifier()
    expected = classifier_gradient(classifier, images(), TIMESTEPS, LABELS)
    classifier.compile(fullgraph=True)
    gradient = classifier_gradient(classifier, images(), TIMESTEPS, LABELS)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# Precision


@every_model
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision_is_near_full(kind, dtype, tolerance):
    model = tiny_model(kind)
    expected = predict(model)
    output = predict(model.to(dtype), images().to(dtype))
    assert output.dtype == dtype
    assert relative_error(output, expected) < tolerance


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("weights", ["float32", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_normalisation_is_that_of_float32_rounded_once(dtype, weights, memory_format):
    norm = draw_parameters(tiny_unet().norm_out)
    # A mean that bfloat16 holds to one digit, and whose square float16 does not hold.
    values = (300 + images(channels=8, height=32, width=32)).to(dtype).contiguous(memory_format=memory_format)
    if weights == "half":
        norm = norm.to(dtype)
    output = norm(values)
    expected = copy.deepcopy(norm).float()(values.float())
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_normalisation_of_half_precision_values_too_large_to_square():
    norm = draw_parameters(tiny_unet().norm_out)
    values = 1e4 * images(channels=8)
    torch.testing.assert_close(norm.half()(values.half()).float(), norm.float()(values), rtol=1e-2, atol=1e-2)


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model_tells_timestep_998_from_999(kind, dtype):
    # bfloat16 rounds both to 1000.
    model, sample = tiny_model(kind, model_channels=32).to(dtype), images().to(dtype)
    assert not torch.equal(predict(model, sample, timestep=998), predict(model, sample, timestep=999))
    assert not torch.equal(
        predict(model, sample, timestep=torch.tensor([998, 998])),
        predict(model, sample, timestep=torch.tensor([999, 999])),
    )


@every_model
def test_channels_last_gives_the_same(kind):
    model = tiny_model(kind)
    expected = predict(model)
    model = model.to(memory_format=torch.channels_last)
    output = predict(model, images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# Options of the architecture


def resnet_block(**changes) -> ADMResnetBlock2D:
    config = {
        "in_channels": 8,
        "out_channels": 16,
        "emb_channels": 32,
        "norm_num_groups": 4,
        "dropout": 0.0,
        "time_scale_shift": "scale_shift",
        "output_scale_factor": 1.0,
    }
    return draw_parameters(ADMResnetBlock2D(**{**config, **changes}))


@every_model
def test_output_scale_factor_divides_every_residual_sum(kind):
    factor = 2**0.5
    hidden_states, emb = images(channels=8), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, rescaled = resnet_block(), resnet_block(output_scale_factor=factor)
        torch.testing.assert_close(rescaled(hidden_states, emb) * factor, plain(hidden_states, emb))
        plain, rescaled = (draw_parameters(ADMAttentionBlock(8, 2, 4, scale)) for scale in (1.0, factor))
        torch.testing.assert_close(rescaled(hidden_states) * factor, plain(hidden_states))

    model = tiny_model(kind, output_scale_factor=factor)
    blocks = [module for module in model.modules() if isinstance(module, (ADMResnetBlock2D, ADMAttentionBlock))]
    assert blocks and {block.output_scale_factor for block in blocks} == {factor}
    assert relative_error(predict(model), predict(tiny_model(kind))) > 1e-2


@every_model
def test_downsample_type_conv_halves_by_strided_convolutions(kind):
    model = tiny_model(kind, downsample_type="conv")
    resamplers = [module for module in model.encoder.modules() if isinstance(module, ADMDownsample2D)]
    assert [module.conv.stride for module in resamplers] == [(2, 2)]
    assert not any(getattr(module, "resample", None) == "down" for module in model.modules())
    assert predict(model).isfinite().all()
    plain = tiny_model(kind)
    assert [module.resample for module in plain.modules() if getattr(module, "resample", None) == "down"] == ["down"]


def test_upsample_type_conv_doubles_by_a_convolution():
    model = tiny_unet(upsample_type="conv")
    assert sum(isinstance(module, ADMUpsample2D) for module in model.up_blocks.modules()) == 1
    assert not any(getattr(module, "resample", None) == "up" for module in model.modules())
    assert predict(model).shape == (2, 6, SIZE, SIZE)
    assert sum(getattr(module, "resample", None) == "up" for module in tiny_unet().modules()) == 1


def test_residual_block_resamples_both_of_its_paths():
    hidden_states, emb = images(channels=8), torch.zeros(2, 32)
    for resample, size in (("down", 4), ("up", 16), (None, 8)):
        block = resnet_block(resample=resample)
        with torch.no_grad():
            assert block(hidden_states, emb).shape == (2, 16, size, size)
            block.conv2.weight.zero_(), block.conv2.bias.zero_()  # leaves the shortcut alone
            if resample == "down":
                expected = block.conv_shortcut(F.avg_pool2d(hidden_states, 2))
            elif resample == "up":
                expected = block.conv_shortcut(hidden_states).repeat_interleave(2, 2).repeat_interleave(2, 3)
            else:
                expected = block.conv_shortcut(hidden_states)
            torch.testing.assert_close(block(hidden_states, emb), expected)


def test_adaptive_group_norm_scales_after_normalisation_and_addition_adds_before():
    hidden_states, emb = images(channels=8), torch.zeros(2, 32)
    adaptive, added = resnet_block(), resnet_block(time_scale_shift="default")
    assert adaptive.time_emb_proj.out_features == 2 * added.time_emb_proj.out_features == 32
    with torch.no_grad():
        # What is added alike to all channels of a group is gone after normalisation.
        added.time_emb_proj.bias.fill_(0.0)
        expected = added(hidden_states, emb)
        added.time_emb_proj.bias.fill_(3.0)
        torch.testing.assert_close(added(hidden_states, emb), expected, rtol=1e-3, atol=1e-4)
        added.time_emb_proj.bias.copy_(torch.arange(16))
        assert relative_error(added(hidden_states, emb), expected) > 1e-2

        # A scale of -1 leaves nothing of the features: the branch is the shift's image alone.
        adaptive.time_emb_proj.bias.copy_(torch.cat([-torch.ones(16), torch.full((16,), 0.7)]))
        shift = adaptive.conv2(adaptive.act(torch.full((2, 16, SIZE, SIZE), 0.7)))
        torch.testing.assert_close(adaptive(hidden_states, emb), adaptive.conv_shortcut(hidden_states) + shift)


@every_model
def test_addition_runs_and_differs(kind):
    model = tiny_model(kind, resnet_time_scale_shift="default")
    blocks = [module for module in model.modules() if isinstance(module, ADMResnetBlock2D)]
    assert all(block.time_emb_proj.out_features == block.conv1.out_channels for block in blocks)
    assert relative_error(predict(model, timestep=10), predict(model, timestep=900)) > 1e-3


@every_model
def test_heads_are_counted_by_width_or_by_number(kind):
    def heads(model):
        return {
            (module.to_qkv.in_features, module.heads)
            for module in model.modules()
            if isinstance(module, AttentionModuleMixin)
        }

    both_levels = {"attention_resolutions": (8, 4)}
    by_width = tiny_model(kind, attention_head_dim=4, **both_levels)
    by_number = tiny_model(kind, attention_head_dim=None, num_attention_heads=2, **both_levels)
    assert heads(by_width) == {(8, 2), (16, 4)}
    assert heads(by_number) == {(8, 2), (16, 2)}
    assert relative_error(predict(by_width), predict(by_number)) > 1e-4


def test_attention_stands_at_the_resolutions_asked_for_and_in_the_middle():
    def levels(model):
        return [block.attention is not None for block in model.encoder.down_blocks]

    # Two blocks, one that halves; two blocks, one that halves; two blocks. A halving block has no attention.
    layout = {"channel_mult": (1, 1, 2), "layers_per_block": 2, "attention_head_dim": 4}
    unet = tiny_unet(**layout, attention_resolutions=(4,))
    assert levels(unet) == [False] * 3 + [True, True, False] + [False] * 2
    assert [block.attention is not None for block in unet.up_blocks] == [False] * 3 + [True] * 3 + [False] * 3
    assert [block.attention is not None for block in unet.encoder.mid_blocks] == [True, False]
    assert levels(tiny_unet(**layout, attention_resolutions=())) == [False] * 8


@every_model
def test_fractional_multipliers_set_the_widths(kind):
    model = tiny_model(kind, channel_mult=(0.5, 1, 1.5), norm_num_groups=2, attention_head_dim=4)
    widths = {module.conv1.out_channels for module in model.encoder.modules() if isinstance(module, ADMResnetBlock2D)}
    assert model.encoder.conv_in.out_channels == 4 and widths == {4, 8, 12}
    assert predict(model).isfinite().all()


def test_null_class_is_an_extra_row_that_stands_for_no_label():
    model = tiny_unet(use_null_class=True)
    assert model.null_class == NUM_CLASSES and model.class_embedding.num_embeddings == NUM_CLASSES + 1
    null = predict(model, labels=torch.full((2,), NUM_CLASSES))
    assert torch.equal(predict(model, labels=None), null)
    assert relative_error(predict(model), null) > 1e-2


def test_label_changes_a_conditional_model_and_is_refused_by_an_unconditional_one():
    conditional, unconditional = tiny_unet(), tiny_unet(num_class_embeds=None)
    assert conditional.null_class is None and unconditional.null_class is None
    assert relative_error(predict(conditional, labels=LABELS - 1), predict(conditional)) > 1e-2
    assert predict(unconditional, labels=None).isfinite().all()
    with pytest.raises(ValueError, match="class_labels are missing"):
        predict(conditional, labels=None)
    with pytest.raises(ValueError, match="unconditional"):
        predict(unconditional)


def test_low_resolution_image_conditions_an_upsampler():
    model = tiny_unet(low_res_conditioning=True)
    assert model.encoder.conv_in.in_channels == 6
    sample = images()

    @torch.no_grad()
    def upsample(low_res):
        return model(sample, TIMESTEPS, LABELS, low_res=low_res).sample

    small = images(height=4, width=4, seed=5)
    assert upsample(small).shape == (2, 6, SIZE, SIZE)
    assert relative_error(upsample(-small), upsample(small)) > 1e-2
    # It is resized bilinearly, so that a flat image is the same at any size.
    torch.testing.assert_close(upsample(torch.full((2, 3, 4, 2), 0.3)), upsample(torch.full((2, 3, 8, 8), 0.3)))
    with pytest.raises(ValueError, match="missing"):
        upsample(None)
    with pytest.raises(ValueError, match="given"):
        tiny_unet()(sample, TIMESTEPS, LABELS, low_res=small)


def test_learned_variance_doubles_the_output():
    assert tiny_unet().learns_variance
    assert not tiny_unet(out_channels=3).learns_variance
    assert predict(tiny_unet(out_channels=3)).shape == (2, 3, SIZE, SIZE)
    assert predict(tiny_unet(in_channels=1, out_channels=2), images(channels=1)).shape == (2, 2, SIZE, SIZE)


@every_pool
def test_pool_reads_what_it_says(pool):
    classifier = tiny_classifier(pool)
    # The spatial pools read every block's features, the others the last alone.
    means = sum(classifier.encoder.skip_channels) + 16
    if pool in ("spatial", "spatial_v2"):
        assert classifier.pooling.fc1.in_features == means == 8 + 8 + 8 + 16 + 16
        assert isinstance(classifier.pooling.norm, torch.nn.GroupNorm) == (pool == "spatial_v2")
    elif pool == "adaptive":
        assert classifier.pooling.fc.in_features == 16
    else:
        assert classifier.pooling.positional_embedding.shape == (4 * 4 + 1, 16)


BAD_CONFIGS = {
    "heads given twice": ({"attention_head_dim": 8, "num_attention_heads": 2}, "num_attention_heads=2"),
    "heads not given": ({"attention_head_dim": None}, "attention_head_dim=None"),
    "heads that do not divide": ({"attention_head_dim": 5}, "16 channels cannot be divided"),
    "number of heads that does not divide": (
        {"attention_head_dim": None, "num_attention_heads": 3},
        "num_attention_heads=3",
    ),
    "size that cannot be halved": ({"sample_size": 9, "attention_resolutions": ()}, "sample_size=9"),
    "attention where no level is": ({"attention_resolutions": (4, 3)}, r"\[3\] are not among .*\[8, 4\]"),
    "groups that do not divide": ({"norm_num_groups": 3}, "norm_num_groups=3"),
    "multiplier that leaves nothing": ({"channel_mult": (0.1, 1)}, "0 channels"),
    "conditioning": ({"resnet_time_scale_shift": "ada"}, "'ada' is not one of"),
    "downsampling": ({"downsample_type": "pool"}, "'pool' is not one of"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_config_that_describes_no_model_is_refused(kind, name):
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_channels": 4}, "out_channels=4"),
        ({"num_class_embeds": None, "use_null_class": True}, "use_null_class"),
        ({"upsample_type": "bilinear"}, "'bilinear' is not one of"),
    ],
)
def test_unet_config_that_describes_no_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**changes)


def test_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="'max' is not one of"):
        tiny_classifier("max")


# The classifier's gradient


def gradient_of(classifier: torch.nn.Module, sample: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    sample = images() if sample is None else sample
    arguments = {"timestep": TIMESTEPS, "class_labels": LABELS, **kwargs}
    return classifier_gradient(classifier, sample, **arguments)


class LinearClassifier(torch.nn.Module):
    """Its gradient of log p(y | x) is known: W_y - sum_k p_k W_k."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(NUM_CLASSES, 3 * SIZE * SIZE, generator=generator, dtype=torch.float64) / 10
        self.weight = torch.nn.Parameter(weight)

    def forward(self, sample, timestep):
        return NoisyClassifierOutput(logits=sample.flatten(1) @ self.weight.T)


def test_gradient_equals_its_closed_form():
    classifier, sample = LinearClassifier(), images().double()
    with torch.no_grad():
        probability = classifier(sample, TIMESTEPS).logits.softmax(dim=-1)
        expected = (classifier.weight[LABELS] - probability @ classifier.weight).reshape(sample.shape)
    gradient = gradient_of(classifier, sample)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@every_pool
def test_gradient_points_where_the_label_grows_likelier(pool):
    classifier, sample = tiny_classifier(pool), images()

    def log_probability(sample):
        return predict(classifier, sample).double().log_softmax(dim=-1)[torch.arange(2), LABELS]

    gradient = gradient_of(classifier)
    step = 3e-3 * torch.randn(sample.shape, generator=torch.Generator().manual_seed(4))
    change = log_probability(sample + step) - log_probability(sample - step)
    torch.testing.assert_close(change, 2 * (gradient * step).sum(dim=(1, 2, 3)).double(), rtol=2e-2, atol=2e-6)


@every_pool
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_under_no_grad_and_inference_mode(pool, mode):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    assert expected.shape == images().shape and expected.abs().max() > 0
    with mode():
        # All made within, as a pipeline that is called under inference mode makes them.
        gradient = gradient_of(classifier, images(), timestep=TIMESTEPS.clone(), class_labels=LABELS.clone())
    assert torch.equal(gradient, expected)
    assert not gradient.requires_grad


@every_pool
def test_gradient_leaves_weights_as_they_are(pool):
    classifier = tiny_classifier(pool)
    frozen = classifier.encoder.conv_in.weight.requires_grad_(False)
    other = classifier.encoder.conv_in.bias
    other.grad = torch.full_like(other, 2.0)
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    gradients = [parameter.grad for parameter in classifier.parameters()]
    sample = images()
    gradient_of(classifier, sample)
    assert not frozen.requires_grad
    assert flags == [parameter.requires_grad for parameter in classifier.parameters()]
    assert all(before is parameter.grad for before, parameter in zip(gradients, classifier.parameters(), strict=True))
    assert torch.equal(other.grad, torch.full_like(other, 2.0))
    assert not sample.requires_grad and sample.grad is None


@every_pool
def test_gradient_is_the_same_alone_and_in_a_batch(pool):
    classifier, sample = tiny_classifier(pool), images(4)
    timestep, labels = torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 4])
    together = gradient_of(classifier, sample, timestep=timestep, class_labels=labels)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = gradient_of(classifier, sample[rows], timestep=timestep[rows], class_labels=labels[rows])
        assert relative_error(alone, together[rows]) < 1e-4


@every_pool
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("offload", ["block", "leaf"])
def test_gradient_is_the_same_under_group_offloading(pool, offload, to_disk, checkpointing, tmp_path):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    path = str(tmp_path) if to_disk else None
    classifier.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **OFFLOADS[offload]
    )
    if checkpointing:
        classifier.enable_gradient_checkpointing()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(gradient_of(classifier), expected)


@every_pool
def test_gradient_under_layerwise_casting_is_that_of_the_rounded_weights(pool):
    classifier = tiny_classifier(pool)
    expected = gradient_of(float8_rounded(classifier))
    assert relative_error(gradient_of(classifier), expected) > 1e-3
    classifier.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(gradient_of(classifier), expected)


@every_pool
def test_gradient_recomputes_nothing_unless_checkpointing_is_on(pool):
    classifier = tiny_classifier(pool)
    calls = block_calls(classifier)
    expected = gradient_of(classifier)
    assert len(calls) == 5 and set(calls.values()) == {1}

    classifier.enable_gradient_checkpointing()
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(gradient_of(classifier), expected)
    assert len(calls) == 5 and set(calls.values()) == {2}


@every_pool
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_gradient_in_half_precision_is_near_full(pool, dtype, tolerance):
    classifier = tiny_classifier(pool)
    expected = gradient_of(classifier)
    gradient = gradient_of(classifier.to(dtype))
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, expected) < tolerance


def test_float16_gradient_survives_underflow():
    # A classifier that is this sure has gradients below float16's smallest number.
    classifier = LinearClassifier().half()
    classifier.dtype = torch.float16
    sample = images() * 1e-3
    with torch.no_grad():
        classifier.weight.mul_(1e-5)
        weight = classifier.weight.float()
        probability = (sample.half().float().flatten(1) @ weight.T).softmax(dim=-1)
        expected = (weight[LABELS] - probability @ weight).reshape(sample.shape)
    assert expected.abs().median() < 2e-6
    assert relative_error(gradient_of(classifier, sample), expected) < 5e-3


@every_pool
def test_classifier_is_differentiable_under_an_outer_no_grad(pool):
    classifier, sample = tiny_classifier(pool), images().requires_grad_()
    with torch.no_grad():
        with torch.enable_grad():
            total = classifier(sample, TIMESTEPS).logits.sum()
        (gradient,) = torch.autograd.grad(total, sample)
    assert gradient.abs().max() > 0


def test_gradient_takes_any_classifier_with_logits():
    def classifier(sample, timestep):
        return SimpleNamespace(logits=sample.mean(dim=(2, 3)))

    sample = images()
    gradient = classifier_gradient(classifier, sample, TIMESTEPS, torch.tensor([0, 2]))
    expected = (F.one_hot(torch.tensor([0, 2]), 3) - sample.mean(dim=(2, 3)).softmax(dim=-1)) / SIZE**2
    torch.testing.assert_close(gradient, expected[:, :, None, None].expand_as(sample))


def test_up_blocks_hold_the_skip_connections():
    model = tiny_unet()
    widths = [block.resnet.conv1.in_channels for block in model.up_blocks]
    assert all(isinstance(block, ADMUpBlock) for block in model.up_blocks)
    assert widths == [16 + 16, 16 + 8, 16 + 8, 8 + 8]
