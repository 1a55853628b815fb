"""Moving averages of weights."""

import re

import pytest
import torch
from accelerate import PartialState
from torch import nn

from diffusers_adm.training.averages import MovingAverages
from diffusers_adm.training.options import AverageOptions


@pytest.fixture
def model():
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    return model


def moved(model, options, steps=3):
    """Averages after steps that each add 1 to the weights."""
    averages = MovingAverages(model, options, torch.device("cpu"), max_train_steps=1000)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(1)
        averages.update()
    return averages


def test_average_of_rate_0_is_the_current_weights_in_runs_of_any_length(model, caplog):
    PartialState()
    MovingAverages(model, AverageOptions(ema_decay=(0.0,)), torch.device("cpu"), max_train_steps=2)
    assert not caplog.text


@pytest.mark.parametrize("offload", [False, True])
def test_rates_are_constant_from_the_first_step(model, offload):
    averages = moved(model, AverageOptions(ema_decay=(0.5, 0.9), offload_ema=offload))
    for decay in (0.5, 0.9):
        expected = 1.0
        for weight in (2, 3, 4):
            expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(averages[decay].shadow_params[0], torch.full((2, 3), expected))


def test_weights_come_back_after_an_average_took_their_place(model):
    averages = moved(model, AverageOptions(ema_decay=(0.5,)))
    with averages.applied(0.5):
        assert torch.equal(model.weight, averages[0.5].shadow_params[0])
    assert model.weight.eq(4).all()


def test_saved_averages_go_on_as_the_others(model, tmp_path):
    options = AverageOptions(ema_decay=(0.9,), use_ema_warmup=True)
    averages = moved(model, options)
    averages.save(tmp_path)
    copy = MovingAverages(model, options, torch.device("cpu"), max_train_steps=1000)
    copy.load(tmp_path, num_updates=3)
    for each in (averages, copy):
        each.update()
    assert all(map(torch.equal, copy[0.9].shadow_params, averages[0.9].shadow_params))


def test_without_rates_there_is_nothing_to_update(model):
    assert moved(model, AverageOptions(ema_decay=())).decays == ()


@pytest.mark.parametrize("steps", [20, 600, 40_000])
def test_the_rate_that_is_suggested_fits_the_run(model, steps, caplog):
    PartialState(cpu=True)  # which the log requires

    def build(decay: float) -> None:
        MovingAverages(model, AverageOptions(ema_decay=(decay,)), torch.device("cpu"), steps)

    build(0.9999)
    suggested = float(re.search(r"such as --ema_decay ([\d.]+)\.$", caplog.text.strip())[1])
    caplog.clear()
    build(suggested)
    assert 0 < suggested < 1 and not caplog.text
