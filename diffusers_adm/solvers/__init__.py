"""diffusers' schedulers, made to sample as the published code does, with a place for guidance in each step."""

from .algorithms import (
    GUIDED_SETTINGS,
    SUPPORTED_SCHEDULERS,
    DDPMSolver,
    build_solver,
    check_scheduler,
    takes_respacing,
    visited_steps,
)
