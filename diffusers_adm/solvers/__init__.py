"""Solvers: one run of a diffusers scheduler, which samples as the original code does and applies guidance in each step."""

from .algorithms import DDPMSolver, Denoised, EpsilonSolver, Solver
from .karras import SIGMA_SCHEDULERS, Churn, KarrasSolver, build_sigma_solver, check_sigma_scheduler
from .schedulers import (
    GUIDED_SETTINGS,
    SUPPORTED_SCHEDULERS,
    build_solver,
    check_scheduler,
    takes_respacing,
    visited_steps,
)


__all__ = [
    "Churn",
    "DDPMSolver",
    "Denoised",
    "EpsilonSolver",
    "GUIDED_SETTINGS",
    "KarrasSolver",
    "SIGMA_SCHEDULERS",
    "SUPPORTED_SCHEDULERS",
    "Solver",
    "build_sigma_solver",
    "build_solver",
    "check_scheduler",
    "check_sigma_scheduler",
    "takes_respacing",
    "visited_steps",
]
