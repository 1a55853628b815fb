"""diffusers' schedulers, made to sample as the original code does, with a place for guidance in each step."""

from .algorithms import DDPMSolver, Denoised, EpsilonSolver, Solver
from .schedulers import (
    GUIDED_SETTINGS,
    SUPPORTED_SCHEDULERS,
    build_solver,
    check_scheduler,
    takes_respacing,
    visited_steps,
)
