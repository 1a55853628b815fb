"""Runs of stock schedulers that keep images or predictions of earlier evaluations."""

import copy

import torch
from diffusers import DPMSolverSinglestepScheduler, SchedulerMixin, UniPCMultistepScheduler

from diffusers_adm.diffusion import NoiseSchedule, epsilon_from_x_0, read_table
from diffusers_adm.solvers.algorithms import EpsilonSolver


class SigmaSolver(EpsilonSolver):
    """
    One run of a scheduler that counts its steps and may keep earlier predictions.

    Args:
        scheduler: Scheduler that the run belongs to.
        schedule: Evaluations of the run, least noisy first.
        prepared: Local copy of the scheduler whose steps have been set. Each descending part of the run begins with a copy of it.
        timesteps: Timesteps of the copy, in the order of the schedule.
        visits: Indices into the schedule, in the order of the run.
        starts: Evaluations with which a step begins. `None` means all.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        schedule: NoiseSchedule,
        prepared: SchedulerMixin,
        timesteps: torch.Tensor,
        visits: list[int] | None = None,
        starts: list[int] | None = None,
    ):
        super().__init__(scheduler, schedule, prepared, timesteps, visits, starts=starts)
        self.prepared = prepared
        self.begin_part(self.visits[0])

    def begin_part(self, index: int) -> None:
        """Begins with a copy of the scheduler without earlier predictions. The argument is that of `Solver.begin_part`."""
        self.scheduler = begun_at(self.prepared, len(self.schedule) - 1 - index)

    @property
    def epsilon_factors(self) -> torch.Tensor:
        """Factor of epsilon in the images of the scheduler at each evaluation, `(evaluations,)`."""
        return self.schedule.noise_scale

    def change_epsilon(self, change: torch.Tensor, index: int) -> None:
        """Changes images and predictions that the scheduler keeps. The arguments are those of `Solver.change_epsilon`."""
        scheduler = self.scheduler
        if getattr(scheduler, "last_sample", None) is not None:  # of the previous evaluation, for a corrector
            scheduler.last_sample = (
                scheduler.last_sample + read_table(self.epsilon_factors, index + 1, change) * change
            )
        if keeps_epsilon(scheduler):
            scheduler.model_outputs = [None if one is None else one + change for one in scheduler.model_outputs]
        evaluations = self.evaluations_since_start(index)
        if evaluations:
            start = index + evaluations
            scheduler.sample = scheduler.sample + read_table(self.epsilon_factors, start, change) * change
            if getattr(scheduler, "prev_derivative", None) is not None:
                scheduler.prev_derivative = scheduler.prev_derivative + change

    def evaluations_since_start(self, index: int) -> int:
        """Returns how many evaluations an evaluation is after the first one of its step."""
        place = len(self.schedule) - 1 - index
        if isinstance(self.scheduler, DPMSolverSinglestepScheduler):
            return min(self.scheduler.order_list[place] - 1, place - self.scheduler.begin_index)
        return int(index not in self.starts)


def keeps_epsilon(scheduler: SchedulerMixin) -> bool:
    """Returns whether a scheduler keeps predictions of epsilon. Others keep predictions of x_0, or none."""
    if isinstance(scheduler, UniPCMultistepScheduler):  # a config may also have the entries of another class
        return not scheduler.config.predict_x0
    kinds = ("deis", "dpmsolver", "sde-dpmsolver", "noise_prediction")
    return hasattr(scheduler, "model_outputs") and scheduler.config.algorithm_type in kinds


def begun_at(prepared: SchedulerMixin, place: int) -> SchedulerMixin:
    """
    Returns a copy of a scheduler that begins in the middle of its steps.

    Args:
        prepared: Scheduler whose steps have been set, and none has been taken.
        place: Number of the first step, in the order of the scheduler.
    """
    begun = copy.deepcopy(prepared)
    begun.set_begin_index(place)
    return begun


class VarianceExplodingSolver(SigmaSolver):
    """One run of a scheduler whose noised images are x_0 + sigma * epsilon, without a factor below 1 on x_0."""

    @property
    def epsilon_factors(self) -> torch.Tensor:
        """Factor of epsilon in the images of the scheduler at each evaluation, `(evaluations,)`."""
        return self.schedule.sigma

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns x_{t-1}, one step of the scheduler towards the guided x_0."""
        before = self.schedule.x_0_from_x_t[index].item()  # sqrt(1 + sigma^2)
        if index:
            after = self.schedule.x_0_from_x_t[index - 1].item()
        else:
            after = (1 + self.scheduler.sigmas[-1].item() ** 2) ** 0.5
        epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)
        return self.scheduler.step(epsilon, self.timesteps[index], x_t * before, **step_kwargs).prev_sample / after


class PNDMSolver(EpsilonSolver):
    """One run of PNDM's pseudo linear multistep method. The scheduler's `step` is given epsilon instead of x_0."""

    @property
    def entries(self) -> dict[int, float]:
        """Timestep of each step of the run at which the run may begin. The second evaluation belongs to the first step."""
        return {step: timestep for step, timestep in super().entries.items() if step != 1}

    def begin_at(self, step: int) -> None:
        """Leaves out the steps of the run before a step. The step that is now the first is taken twice."""
        if step:
            first = self.visits[step]
            lower = list(range(first - 1, -1, -1))
            self._visit([first, *lower[:1], *lower])

    def jumps_to(self, step: int) -> bool:
        """Returns False, because an index that is visited twice stands for the two evaluations of the first step."""
        return False

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """Returns x_{t-1}, one step of the scheduler towards the guided x_0."""
        epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)
        return super().advance(epsilon, index, x_t, **step_kwargs)

    def change_epsilon(self, change: torch.Tensor, index: int) -> None:
        """Changes images and predictions that the scheduler keeps. The arguments are those of `Solver.change_epsilon`."""
        self.scheduler.ets = [one + change for one in self.scheduler.ets]
        if self.scheduler.counter == 1:  # the second evaluation of the first step
            factor = read_table(self.schedule.noise_scale, self.visits[0], change)
            self.scheduler.cur_sample = self.scheduler.cur_sample + factor * change
