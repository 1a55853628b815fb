"""Solvers: one run of a diffusers scheduler, which samples as the original code does and applies guidance in each step."""

from .algorithms import DDPMSolver, Denoised, EpsilonSolver, Solver
from .karras import Churn, KarrasSolver
from .preconditioned import SIGMA_SCHEDULERS, build_sigma_solver, check_sigma_scheduler
from .schedulers import (
    GUIDED_SETTINGS,
    SUPPORTED_SCHEDULERS,
    build_solver,
    check_scheduler,
    full_config,
    takes_respacing,
)
from .visits import Restart


__all__ = [
    "Churn",
    "DDPMSolver",
    "Denoised",
    "EpsilonSolver",
    "GUIDED_SETTINGS",
    "KarrasSolver",
    "Restart",
    "SIGMA_SCHEDULERS",
    "SUPPORTED_SCHEDULERS",
    "Solver",
    "build_sigma_solver",
    "build_solver",
    "check_scheduler",
    "check_sigma_scheduler",
    "full_config",
    "takes_respacing",
]
