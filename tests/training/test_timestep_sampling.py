"""Which timesteps are drawn, against a plain account of the losses of each."""

import torch
from accelerate import Accelerator
from tiny_models import images, tiny_scheduler, tiny_unet

from diffusers_adm.training.objective import DenoisingObjective
from diffusers_adm.training.objective_options import ObjectiveOptions
from diffusers_adm.training.timestep_sampling import LossSecondMomentSampler, UniformSampler


def warmed_up(num_timesteps=5, history_size=3, batches=40, batch_size=16):
    """A sampler that has seen losses, and the losses of each timestep in their order."""
    sampler = LossSecondMomentSampler(num_timesteps, history_size, uniform_probability=0.1)
    generator = torch.Generator().manual_seed(0)
    seen = [[] for _ in range(num_timesteps)]
    for _ in range(batches):
        timestep = torch.randint(num_timesteps, (batch_size,), generator=generator)
        loss = torch.rand(batch_size, generator=generator) * (timestep + 1)
        sampler.update(timestep, loss)
        for t, value in zip(timestep.tolist(), loss.tolist()):
            seen[t].append(value)
    return sampler, seen


def test_probabilities_are_those_of_the_latest_losses():
    sampler, seen = warmed_up()
    moments = torch.tensor([sum(value**2 for value in losses[-3:]) / 3 for losses in seen]).sqrt()
    torch.testing.assert_close(sampler.probabilities(), 0.9 * moments / moments.sum() + 0.1 / 5)


def test_draws_are_uniform_until_every_timestep_is_known():
    sampler = LossSecondMomentSampler(4, history_size=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.arange(7.0))
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25))
    sampler.update(torch.tensor([3]), torch.tensor([9.0]))
    assert sampler.probabilities()[3] > 0.4


def test_weighted_losses_have_the_uniform_expectation():
    sampler, _ = warmed_up()
    timestep, weight = sampler.sample(200_000, "cpu", torch.Generator().manual_seed(1))
    frequency = torch.bincount(timestep, minlength=5) / len(timestep)
    torch.testing.assert_close(frequency, sampler.probabilities(), atol=5e-3, rtol=0)
    value = torch.tensor([3.0, -1.0, 4.0, 10.0, -5.0])
    torch.testing.assert_close((weight * value[timestep]).mean(), value.mean(), atol=0.05, rtol=0)


def test_uniform_draws_cover_all_timesteps_at_weight_one():
    timestep, weight = UniformSampler(10).sample(1000, "cpu", torch.Generator().manual_seed(0))
    assert torch.bincount(timestep, minlength=10).min() > 60 and timestep.max() == 9
    assert weight.eq(1).all()


def test_losses_that_are_not_finite_are_left_out():
    sampler, _ = warmed_up()
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1, 2]), torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert torch.equal(sampler.probabilities(), before)


def test_state_is_saved_whole():
    sampler, _ = warmed_up()
    copy = LossSecondMomentSampler(5, history_size=3, uniform_probability=0.1)
    copy.load_state_dict(sampler.state_dict())
    for s in (sampler, copy):
        s.update(torch.tensor([1, 1, 4]), torch.tensor([2.0, 3.0, 1.0]))
    assert torch.equal(copy.probabilities(), sampler.probabilities())


def test_logged_parts_have_the_weights_of_the_loss():
    options = ObjectiveOptions(schedule_sampler="loss-second-moment")
    unet = tiny_unet(num_class_embeds=None)
    objective = DenoisingObjective(options, tiny_scheduler(), Accelerator(cpu=True), lambda batch: {})
    objective.sampler.counts.fill_(10)
    objective.sampler.history.copy_(torch.arange(1, 11) * torch.rand(len(objective.sampler.history), 1))
    probabilities = objective.sampler.probabilities()
    terms = objective(unet, {"image": images()})
    torch.testing.assert_close(terms.logged["simple"] + terms.logged["vlb"], terms.loss)
    torch.testing.assert_close(terms.weight, 1 / (len(probabilities) * probabilities[terms.timestep]))
