"""diffusers' schedulers, made to sample as the published code does, with a place for guidance in each step.

A solver is a local copy of a scheduler for one run; the scheduler itself is never changed.
"""

import inspect
from numbers import Integral, Real

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_adm.diffusion import (
    PREDICTION_TYPES,
    NoiseSchedule,
    epsilon_from_x_0,
    fixed_log_variance,
    learned_log_variance,
    posterior_mean,
    read_table,
    split_learned_variance,
    x_0_from_epsilon,
    x_0_from_prediction,
)
from diffusers_adm.guidance import shift_epsilon, shift_mean
from diffusers_adm.respacing import evenly_spaced_timesteps, respaced_timesteps


# Those that evaluate the network twice a step, but once in the last.
TWO_STAGE = (HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
# Those whose images keep their size, and have noise of standard deviation sigma added.
VARIANCE_EXPLODING = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, *TWO_STAGE)
SUPPORTED_SCHEDULERS = (
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    SASolverScheduler,
    PNDMScheduler,
    *VARIANCE_EXPLODING,
)
# What the authors of fast solvers advise for guided sampling of pixels (README of github.com/LuChengTHU/dpm-solver; diffusers' page
# of UniPC): second order, and dynamic thresholding. A `sample_max_value` of 1, the default, would make that clipping.
_THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1000.0}
GUIDED_SETTINGS = {
    DPMSolverMultistepScheduler: {"algorithm_type": "dpmsolver++", "solver_order": 2, **_THRESHOLDING},
    # Strong guidance and the corrector do not go together in the first step.
    UniPCMultistepScheduler: {"solver_type": "bh2", "solver_order": 2, "disable_corrector": [0], **_THRESHOLDING},
}
VARIANCE_TYPES = ("learned_range", "fixed_large", "fixed_small", "fixed_small_log")


class Solver:
    """
    One run of a scheduler.

    Args:
        scheduler: What the run is asked of.
        schedule: The timesteps that it visits.
    """

    def __init__(self, scheduler: SchedulerMixin, schedule: NoiseSchedule):
        config = scheduler.config
        self.schedule = schedule
        self.prediction_type = config.prediction_type
        # What the published code calls clip_denoised; schedulers without the option clip too, as it does by default.
        # A config keeps the options of other classes that it came from: not all that say so can threshold.
        can_threshold = "thresholding" in inspect.signature(type(scheduler).__init__).parameters
        clips = config.get("clip_sample", True) and not (can_threshold and config.thresholding)
        self.clip_range = config.get("clip_sample_range", 1.0) if clips else None

    def predict(
        self, model_output: torch.Tensor, index: int, x_t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The clean images that a network predicts, clipped as the scheduler says, and the learned variance where there is one.

        Args:
            model_output: Of the network at x_t, `(batch, channels or 2 * channels, height, width)`, float32.
            index: Of the step in the schedule: 0 is the least noisy, so a run counts it down.
            x_t: `(batch, channels, height, width)`, float32.
        """
        prediction, fraction = split_learned_variance(model_output, x_t.shape[1])
        x_0 = x_0_from_prediction(self.schedule, x_t, index, prediction, self.prediction_type)
        if self.clip_range is not None:
            x_0 = x_0.clamp(-self.clip_range, self.clip_range)
        return x_0, fraction


class DDPMSolver(Solver):
    """
    One run of ancestral sampling; guidance shifts the mean (Algorithm 1 of Dhariwal & Nichol 2021).

    Args:
        scheduler: What the run is asked of.
        schedule: The timesteps that it visits.

    Raises:
        ValueError: If the scheduler's `variance_type` is not supported.
    """

    def __init__(self, scheduler: DDPMScheduler, schedule: NoiseSchedule):
        super().__init__(scheduler, schedule)
        self.scheduler = respaced_copy(scheduler, schedule, prediction_type="sample", clip_sample=False)
        variance_type = scheduler.config.variance_type
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type={variance_type!r} is not supported: {VARIANCE_TYPES} are.")
        self.learns_variance = variance_type == "learned_range"
        self.fixed_log_variance = None if self.learns_variance else fixed_log_variance(schedule, variance_type)

    def log_variance(self, fraction: torch.Tensor | None, index: int, x_t: torch.Tensor) -> torch.Tensor | float:
        """Of the step, one number or of x_t's shape."""
        if self.learns_variance:
            return learned_log_variance(self.schedule, index, fraction)
        return read_table(self.fixed_log_variance, index, x_t)

    def mean(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor) -> torch.Tensor:
        """Of the step, before guidance."""
        return posterior_mean(self.schedule, x_t, index, x_0)

    def step(
        self,
        x_0: torch.Tensor,
        fraction: torch.Tensor | None,
        index: int,
        x_t: torch.Tensor,
        gradient: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Draws x_{t-1}.

        Args:
            x_0: Predicted clean images: clipped before guidance, and never after.
            fraction: The learned variance, or `None`.
            index: Of the step in the schedule.
            x_t: Noised images.
            gradient: Of log p(y | x_t) times the guidance scale, same shape; `None` without guidance.
            generator: Of the noise, one for all images or one an image.
        """
        model_output = torch.cat([x_0, fraction], dim=1) if self.learns_variance else x_0
        x_prev = self.scheduler.step(model_output, index, x_t, generator=generator).prev_sample
        if gradient is None:
            return x_prev
        return shift_mean(x_prev, self.log_variance(fraction, index, x_t), gradient)


class EpsilonSolver(Solver):
    """
    One run of any other scheduler; guidance shifts epsilon (Algorithm 2 of Dhariwal & Nichol 2021).

    Args:
        scheduler: What the run is asked of.
        schedule: The timesteps that it visits.
        prepared: The local copy that takes the steps: it is given x_0 and does not clip it.
        timesteps: What the copy calls the schedule's timesteps, in the same order.
        **step_kwargs: Of the copy's `step`.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        schedule: NoiseSchedule,
        prepared: SchedulerMixin,
        timesteps: list[int] | torch.Tensor,
        **step_kwargs,
    ):
        super().__init__(scheduler, schedule)
        self.scheduler = prepared
        self.timesteps = timesteps
        self.step_kwargs = step_kwargs
        self.takes_generator = "generator" in inspect.signature(prepared.step).parameters

    def step(
        self,
        x_0: torch.Tensor,
        fraction: torch.Tensor | None,
        index: int,
        x_t: torch.Tensor,
        gradient: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Draws x_{t-1}; arguments as in `DDPMSolver.step`."""
        if gradient is not None:
            # From x_0, which may have been clipped, and not from what the network said.
            epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)
            epsilon = shift_epsilon(epsilon, read_table(self.schedule.noise_scale, index, x_t), gradient)
            x_0 = x_0_from_epsilon(self.schedule, x_t, index, epsilon)
        step_kwargs = {**self.step_kwargs, "generator": generator} if self.takes_generator else self.step_kwargs
        return self.advance(x_0, index, x_t, **step_kwargs)

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """x_{t-1}, towards the guided x_0."""
        return self.scheduler.step(x_0, self.timesteps[index], x_t, **step_kwargs).prev_sample


class VarianceExplodingSolver(EpsilonSolver):
    """One run of a scheduler that adds noise to images instead of fading them: x = x_0 + sigma * epsilon."""

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """x_{t-1}, towards the guided x_0."""
        before = self.schedule.x_0_from_x_t[index].item()  # sqrt(1 + sigma^2)
        after = (
            self.schedule.x_0_from_x_t[index - 1].item()
            if index
            else (1 + self.scheduler.sigmas[-1].item() ** 2) ** 0.5
        )
        epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)
        return self.scheduler.step(epsilon, self.timesteps[index], x_t * before, **step_kwargs).prev_sample / after


class PNDMSolver(EpsilonSolver):
    """One run of pseudo linear multistep, which is told epsilon."""

    def advance(self, x_0: torch.Tensor, index: int, x_t: torch.Tensor, **step_kwargs) -> torch.Tensor:
        """x_{t-1}, towards the guided x_0."""
        epsilon = epsilon_from_x_0(self.schedule, x_t, index, x_0)
        return super().advance(epsilon, index, x_t, **step_kwargs)


def ddim_solver(scheduler: DDIMScheduler, schedule: NoiseSchedule, eta: float) -> EpsilonSolver:
    """DDIM over any list of timesteps."""
    prepared = respaced_copy(
        scheduler,
        schedule,
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="leading",
        steps_offset=0,
    )
    prepared.set_timesteps(len(schedule))
    if not scheduler.config.set_alpha_to_one:
        # In float64 too, or the last variance is below zero.
        prepared.final_alpha_cumprod = NoiseSchedule.from_config(scheduler.config).alpha_bar[0]
    timesteps = list(range(len(schedule)))
    # Where the copy thresholds x_0, epsilon is what that implies.
    return EpsilonSolver(
        scheduler, schedule, prepared, timesteps, eta=eta, use_clipped_model_output=scheduler.config.thresholding
    )


def sigma_solver(scheduler: SchedulerMixin, num_inference_steps: int) -> EpsilonSolver:
    """
    A solver that keeps its own noise levels (`sigmas`) and places its own timesteps; each evaluation of the network is one of
    the run's steps.

    Raises:
        ValueError: If it would visit a timestep twice.
    """
    exploding = isinstance(scheduler, VARIANCE_EXPLODING)
    # The copy is told x_0, or the epsilon that it implies; it neither clips nor splits off a variance.
    off = {"variance_type": None, "clip_sample": False}
    changes = {name: value for name, value in off.items() if name in scheduler.config}
    if isinstance(scheduler, DPMSolverSinglestepScheduler):
        changes["lower_order_final"] = True  # as it says itself, with a warning
    prediction_type = "epsilon" if exploding else "sample"
    prepared = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type, **changes)
    prepared.set_timesteps(num_inference_steps)  # on the CPU, where reading one waits for nothing
    prepared.set_begin_index(0)
    prepared.is_scale_input_called = True  # the network is given x_t as it was trained on it
    if isinstance(scheduler, (EulerAncestralDiscreteScheduler, KDPM2AncestralDiscreteScheduler)):
        make_ancestral_levels_exact(prepared)
    levels = noise_levels(prepared)
    steps = torch.cat([levels[:-1:2], levels[-1:]]) if isinstance(scheduler, TWO_STAGE) else levels
    # DEIS and SASolver may end where they were, at the lowest level.
    if not ((steps[:-1].diff() < 0).all() and steps[-1] <= steps[-2]):
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: {type(scheduler).__name__} would visit a timestep twice; take"
            " fewer."
        )
    timesteps = prepared.timesteps.flip(0)
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps  # MPS has no float64
    # The solver's own noise levels: with Karras sigmas they lie between those of the training timesteps.
    sigmas = levels[:-1].double().flip(0)
    schedule = NoiseSchedule.from_alpha_bar(1 / (1 + sigmas**2), timesteps)
    solver_class = VarianceExplodingSolver if exploding else EpsilonSolver
    return solver_class(scheduler, schedule, prepared, timesteps)


def make_ancestral_levels_exact(
    prepared: EulerAncestralDiscreteScheduler | KDPM2AncestralDiscreteScheduler,
) -> None:
    """In float64: in float32 a step that removes nearly all noise may add more than it should end with."""
    prepared.sigmas = prepared.sigmas.double()
    if isinstance(prepared, KDPM2AncestralDiscreteScheduler):
        # A step goes down to sigma_next^2 / sigma before it adds noise; its geometric middle is then sigma_next. Of these
        # tables the scheduler reads the even places, where the next one holds sigma_next.
        sigma_next = prepared.sigmas.roll(-1)
        prepared.sigmas_interpol = sigma_next
        prepared.sigmas_down = sigma_next**2 / prepared.sigmas
        prepared.sigmas_up = (sigma_next**2 - prepared.sigmas_down**2).sqrt()
        prepared.timesteps[1::2] = prepared.timesteps[2::2].clone()


def noise_levels(scheduler: SchedulerMixin) -> torch.Tensor:
    """The sigma of each evaluation of a run, and that of its end; those of DPM-Solver-2 lie between two steps every other time."""
    levels = scheduler.sigmas[: len(scheduler.timesteps) + 1].clone()
    if isinstance(scheduler, KDPM2DiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[1 : len(levels) - 1 : 2]
    if isinstance(scheduler, KDPM2AncestralDiscreteScheduler):
        levels[1:-1:2] = scheduler.sigmas_interpol[: len(levels) - 2 : 2]
    return levels


def pndm_solver(scheduler: PNDMScheduler, schedule: NoiseSchedule) -> PNDMSolver:
    """Pseudo linear multistep. Its first step is taken again, once the network has been evaluated at its end."""
    prepared = respaced_copy(
        scheduler,
        schedule,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,  # or the last evaluation would lead nowhere
    )
    prepared.set_timesteps(len(schedule))
    places = prepared.timesteps.flip(0)
    evaluated = NoiseSchedule.from_alpha_bar(schedule.alpha_bar[places], schedule.timesteps[places])
    return PNDMSolver(scheduler, evaluated, prepared, places)


def respaced_copy(scheduler: SchedulerMixin, schedule: NoiseSchedule, **changes) -> SchedulerMixin:
    """
    A scheduler for which the visited timesteps are all there are, numbered from 0: its previous timestep is then always
    the one before in the list, which a stock scheduler gets wrong for most lists.
    """
    copy = type(scheduler).from_config(
        scheduler.config, num_train_timesteps=len(schedule), trained_betas=schedule.beta.tolist(), **changes
    )
    copy.alphas_cumprod = schedule.alpha_bar  # in float64, where its own is rounded
    return copy


def build_solver(
    scheduler: SchedulerMixin,
    num_inference_steps: int | None,
    timestep_respacing: str | None,
    eta: float,
    timesteps: list[int] | None = None,
) -> DDPMSolver | EpsilonSolver:
    """
    Prepares a scheduler for one run.

    Args:
        scheduler: One of `SUPPORTED_SCHEDULERS`; left as it is.
        num_inference_steps: Number of steps, in [1, num_train_timesteps].
        timestep_respacing: A published respacing string, for DDPM and DDIM; wins over `num_inference_steps`.
        eta: Of DDIM, in [0, 1]: 0 is deterministic, 1 as noisy as DDPM.
        timesteps: Those to visit, in any order, for DDPM and DDIM; wins over both.

    Raises:
        ValueError: If the scheduler is not supported, or cannot be told what is asked of it.
    """
    check_scheduler(scheduler)
    config = scheduler.config
    if not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise ValueError(f"eta={eta!r} is not a number in [0, 1].")
    if eta and not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"eta={eta} is an option of DDIMScheduler, not of {type(scheduler).__name__}.")
    num_train_timesteps = config.num_train_timesteps
    if timesteps is not None and not (
        isinstance(timesteps, (list, tuple))
        and timesteps
        and all(isinstance(timestep, Integral) and not isinstance(timestep, bool) for timestep in timesteps)
        and all(0 <= timestep < num_train_timesteps for timestep in timesteps)
    ):
        raise ValueError(
            f"timesteps={timesteps} is not a list of one or more integers in [0, {num_train_timesteps - 1}]."
        )
    if (
        timesteps is None
        and timestep_respacing is None
        and not (isinstance(num_inference_steps, Integral) and 1 <= num_inference_steps <= num_train_timesteps)
    ):
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not in [1, {num_train_timesteps}], the integers up to the"
            " number of the model's timesteps."
        )
    if not takes_respacing(scheduler):
        if timestep_respacing is not None or timesteps is not None:
            given = f"timesteps={timesteps}" if timesteps is not None else f"timestep_respacing={timestep_respacing!r}"
            raise ValueError(
                f"{given} is for DDPMScheduler and DDIMScheduler;"
                f" {type(scheduler).__name__} places its own num_inference_steps."
            )
        if isinstance(scheduler, PNDMScheduler):
            timesteps = evenly_spaced_timesteps(num_inference_steps, num_train_timesteps)
            return pndm_solver(scheduler, NoiseSchedule.from_config(config, timesteps))
        return sigma_solver(scheduler, num_inference_steps)

    if timesteps is not None:
        timesteps = sorted(set(timesteps))
    elif timestep_respacing is not None:
        timesteps = respaced_timesteps(timestep_respacing, num_train_timesteps)
    elif isinstance(scheduler, DDIMScheduler):
        timesteps = evenly_spaced_timesteps(num_inference_steps, num_train_timesteps)
    else:
        timesteps = respaced_timesteps(str(num_inference_steps), num_train_timesteps)
    schedule = NoiseSchedule.from_config(config, timesteps)
    if isinstance(scheduler, DDIMScheduler):
        return ddim_solver(scheduler, schedule, eta)
    return DDPMSolver(scheduler, schedule)


def visited_steps(schedule: NoiseSchedule, timesteps: list[int] | None) -> list[int]:
    """
    The steps of a run in their order: down the schedule, or as the timesteps say.

    Raises:
        ValueError: If they skip one on the way down.
    """
    if timesteps is None:
        return list(reversed(range(len(schedule))))
    index_of = {timestep: index for index, timestep in enumerate(schedule.timesteps.tolist())}
    visits = [index_of[timestep] for timestep in timesteps]
    for before, after in zip(visits, visits[1:]):
        if after < before - 1:
            skipped = schedule.timesteps[before - 1].item()
            raise ValueError(
                f"timesteps: from {schedule.timesteps[before]} down to {schedule.timesteps[after]} skips {skipped}, which is"
                " visited elsewhere. On the way down each step leads to the next lower of all that are visited."
            )
    if not visits or visits[-1] != 0:
        raise ValueError(f"timesteps={timesteps} must end with the least noisy of them.")
    return visits


def takes_respacing(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler can be told which timesteps to visit."""
    return isinstance(scheduler, (DDPMScheduler, DDIMScheduler))


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError unless the scheduler is one that is known to sample right."""
    if not isinstance(scheduler, SUPPORTED_SCHEDULERS):
        names = ", ".join(supported.__name__ for supported in SUPPORTED_SCHEDULERS)
        raise ValueError(f"{type(scheduler).__name__} is not supported; these schedulers are: {names}.")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={scheduler.config.prediction_type!r} is not one of {PREDICTION_TYPES}.")
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas=True is for flow matching; these are diffusion models.")
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
        raise ValueError(
            "skip_prk_steps=False is not supported: the Runge-Kutta steps of PNDMScheduler mistake the noise level where their"
            " stride is odd. skip_prk_steps=True is."
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr=True is not supported: epsilon says nothing of x_0 at zero SNR.")
