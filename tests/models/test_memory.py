"""Memory of the two models: gradient checkpointing, layerwise casting and group offloading."""

import pytest
import torch
from model_calls import (
    CPU,
    OFFLOADS,
    block_calls,
    every_model,
    float8_rounded,
    predict,
    relative_error,
    run,
    tiny_model,
)
from tiny_models import images

from diffusers_adm.models.blocks import (
    ADMBlock,
)


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
