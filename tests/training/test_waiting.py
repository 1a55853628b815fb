"""Reads of a training step. On an accelerator, each value that is read back waits for all operations before it.

Models on the meta device stand for an accelerator, because a value cannot be read from it at all.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import SIZE, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet
from torch import nn

from diffusers_adm.denoiser import Denoiser
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.losses import drop_labels
from diffusers_adm.training.consistency import ConsistencyObjective, StoredPathObjective
from diffusers_adm.training.consistency_options import ConsistencyOptions, TeacherOptions
from diffusers_adm.training.metrics import LossMeans
from diffusers_adm.training.objective import ClassifierObjective, DenoisingObjective, NoiseLevelObjective
from diffusers_adm.training.objective_options import NoiseLevelOptions, ObjectiveOptions
from diffusers_adm.training.options import DiffusionOptions


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    image = torch.empty(4, 3, SIZE, SIZE, device="meta")
    return {
        "image": image,
        "target": image,
        "label": torch.empty(4, dtype=torch.long, device="meta"),
        "sigma": torch.empty(4, device="meta"),
    }


def conditions(batch: dict) -> dict[str, torch.Tensor]:
    return {"class_labels": drop_labels(batch["label"], null_class=5, probability=0.1)}


def consistency_options() -> SimpleNamespace:
    return SimpleNamespace(
        consistency=ConsistencyOptions(closer_every=1),
        teacher=TeacherOptions(teacher_steps=2),
        diffusion=DiffusionOptions(),
    )


def denoising(**options) -> DenoisingObjective:
    objective = DenoisingObjective(ObjectiveOptions(**options), tiny_scheduler(), Accelerator(cpu=True), conditions)
    objective.schedule, objective.sampler = objective.schedule.to("meta"), objective.sampler.to("meta")
    return objective


def with_teacher() -> ConsistencyObjective:
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), classifier=tiny_classifier())
    teacher = Denoiser(pipeline.to("meta"), guidance_scale=1.0, cfg_weight=1.0)
    return ConsistencyObjective(consistency_options(), conditions, lambda: 1, teacher)


GIVEN_SIGMA = {"out_channels": 3, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
OBJECTIVES = {
    "hybrid": denoising,
    "vlb": lambda: denoising(loss="vlb"),
    "loss-second-moment": lambda: denoising(schedule_sampler="loss-second-moment"),
    "classifier": lambda: ClassifierObjective(NoiseSchedule.from_config(tiny_scheduler().config).to("meta")),
    "noise levels": lambda: NoiseLevelObjective(
        SimpleNamespace(noise_levels=NoiseLevelOptions(), objective=ObjectiveOptions(), diffusion=DiffusionOptions()),
        conditions,
    ),
    "consistency": lambda: ConsistencyObjective(consistency_options(), conditions, lambda: 1),
    "consistency with a teacher": with_teacher,
    "stored paths": lambda: StoredPathObjective(consistency_options(), conditions),
}


def model_of(name: str) -> nn.Module:
    if name == "classifier":
        return tiny_classifier()
    if name in ("hybrid", "vlb", "loss-second-moment"):
        return tiny_unet(use_null_class=True)
    preconditioning = "edm" if name == "noise levels" else "consistency"
    return tiny_unet(use_null_class=True, preconditioning=preconditioning, **GIVEN_SIGMA)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_its_means_read_nothing_back(name, batch):
    model, objective, means = model_of(name).to("meta"), OBJECTIVES[name](), LossMeans(1000)
    for _ in range(2):
        terms = objective(model, batch)
        terms.loss.mean().backward()
        means.add(terms)
        means.keep_step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert means.sums.is_meta
