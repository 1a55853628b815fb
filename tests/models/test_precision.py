"""Precision of the two models: half precision, normalisation, memory format."""

import copy

import pytest
import torch
from model_calls import (
    every_model,
    predict,
    relative_error,
    tiny_model,
)
from tiny_models import draw_parameters, images, tiny_unet


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
