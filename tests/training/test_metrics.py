"""Means of loss terms, and the file of metrics."""

import json

import pytest
import torch
from accelerate import Accelerator

from diffusers_adm.training.metrics import LossMeans, append_metrics, drop_metrics_after, read_metrics
from diffusers_adm.training.objective import LossTerms


def terms(loss, timestep):
    loss = torch.tensor(loss)
    return LossTerms(loss, {"double": 2 * loss}, torch.tensor(timestep))


def test_means_are_over_images_in_all_and_by_quarter():
    means = LossMeans(num_timesteps=8)
    means.add(terms([1.0, 2.0], [0, 7]))
    means.add(terms([3.0], [1]))
    means.keep_step()
    values = means.take(Accelerator(cpu=True))
    assert values == pytest.approx(
        {
            "loss": 2.0, "loss_quarter_0": 2.0, "loss_quarter_3": 2.0,
            "double": 4.0, "double_quarter_0": 4.0, "double_quarter_3": 4.0,
        }
    )  # fmt: skip
    assert list(values)[0] == "loss" and means.take(Accelerator(cpu=True)) == {}


def test_means_of_timesteps_that_are_not_drawn_evenly_are_those_of_even_ones():
    # The losses 4 and 1 of the two halves. The first is drawn four times as often.
    loss, weight = torch.tensor([4.0, 4.0, 4.0, 4.0, 1.0]), torch.tensor([0.625] * 4 + [2.5])
    means = LossMeans(num_timesteps=4)
    means.add(LossTerms(loss * weight, {}, torch.tensor([0, 1, 0, 1, 3]), weight))
    means.keep_step()
    quarters = {"loss_quarter_0": 4.0, "loss_quarter_1": 4.0, "loss_quarter_3": 1.0}
    assert means.take(Accelerator(cpu=True)) == pytest.approx({"loss": 2.5, **quarters})


def test_steps_that_are_dropped_do_not_count():
    means = LossMeans(num_timesteps=4)
    means.add(terms([1.0], [0]))
    means.keep_step()
    means.add(terms([float("nan")], [0]))
    means.drop_step()
    assert means.finite() and means.take(Accelerator(cpu=True))["loss"] == 1.0


def test_entries_that_will_be_written_again_are_dropped_and_so_are_cut_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for step in (1, 2, 3):
        append_metrics(path, step, {"loss": 0.5})
        append_metrics(path, step, {"validation_loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    drop_metrics_after(path, 2, validated=True)
    whole = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == [1, 1, 2, 2]
    drop_metrics_after(path, 2, validated=False)
    assert path.read_text().splitlines() == whole[:3]
