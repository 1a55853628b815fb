"""Precision and memory of a run: gradients, half precision, offloading and layerwise casting."""

import pytest
import torch
from pipeline_calls import SCALE, STEPS, differ, draw, every_solver, seeded, solver_pipeline
from tiny_models import SIZE, images, tiny_pipeline


CPU = torch.device("cpu")


@every_solver
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_pipeline_under_inference_mode_and_with_gradients_on(solver, mode):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    with mode():
        output = draw(pipeline, **call)
        drawn = draw(pipeline, None, batch_size=2, guidance_scale=[0.0, SCALE], **call)
    assert torch.equal(output, expected) and not output.requires_grad
    assert drawn.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_solver
def test_half_precision_keeps_the_samplers_maths_in_float32(solver, dtype):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    pipeline.to(dtype)
    inputs, latents = [], []
    pipeline.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))

    def callback(_, step, timestep, kwargs):
        latents.append(kwargs["latents"].dtype)
        return kwargs

    output = draw(pipeline, callback_on_step_end=callback, **call)
    assert inputs == [dtype] * STEPS and latents == [torch.float32] * STEPS
    assert output.dtype == torch.float32 and output.isfinite().all()
    assert (output - expected).norm() < 0.25 * expected.norm()
    noise = torch.randn(2, 3, SIZE, SIZE, generator=(generator := seeded()))
    assert torch.equal(draw(pipeline, latents=noise, generator=generator, **call), output), "x_T was rounded"


OFFLOADS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_guided_run_is_the_same_under_group_offloading(solver, offload, to_disk, tmp_path):
    pipeline, call = solver_pipeline(solver)
    expected = draw(pipeline, **call)
    for name in ("unet", "classifier"):
        path = str(tmp_path / name) if to_disk else None
        getattr(pipeline, name).enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_to_disk_path=path, **OFFLOADS[offload]
        )
    assert torch.equal(draw(pipeline, **call), expected)
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, **call), expected)


def test_pipeline_wide_group_offloading_gives_the_same():
    pipeline = tiny_pipeline()
    expected = draw(pipeline)
    pipeline.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert torch.equal(draw(pipeline), expected)


@every_solver
def test_guided_run_under_layerwise_casting_is_that_of_the_rounded_weights(solver):
    rounded, call = solver_pipeline(solver)
    plain = draw(rounded, **call)
    for model in (rounded.unet, rounded.classifier):
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "embedding" not in name:
                    for parameter in module.parameters():
                        parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    expected = draw(rounded, **call)
    assert differ(expected, plain)

    pipeline, _ = solver_pipeline(solver)
    for model in (pipeline.unet, pipeline.classifier):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(draw(pipeline, **call), expected)
    with torch.inference_mode():
        assert torch.equal(draw(pipeline, **call), expected)


@pytest.mark.gpu
@every_solver
def test_model_cpu_offload_gives_the_same(solver):
    pipeline, call = solver_pipeline(solver)
    device = torch.accelerator.current_accelerator()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = draw(pipeline.to(device), generator=generators, **call).cpu()
    pipeline.to("cpu")
    pipeline.enable_model_cpu_offload(device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    output = draw(pipeline, generator=generators, **call).cpu()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert {model.device.type for model in (pipeline.unet, pipeline.classifier)} == {"cpu"}


def test_predictions_under_layerwise_casting_have_the_gradients_of_the_rounded_weights():
    pipeline, x_t = tiny_pipeline(), images()
    for parameter in pipeline.unet.parameters():
        parameter.data = parameter.data.bfloat16().float()

    def gradient() -> torch.Tensor:
        x = x_t.clone().requires_grad_()
        return torch.autograd.grad(pipeline.predict(x, 500, [1, 3]).x_0.square().sum(), x)[0]

    expected = gradient()
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    torch.testing.assert_close(gradient(), expected)
