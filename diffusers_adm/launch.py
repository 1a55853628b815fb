"""Processes of a launch."""

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> PartialState:
    """
    Joins the processes of a launch. It must be called before anything else of accelerate, which then knows them. A process
    waits up to a day for work that another does alone, such as downloading a dataset.

    Raises:
        ValueError: If several were launched and cannot be joined.
    """
    # `PartialState` joins no processes on a CPU by itself. Only `Accelerator` reads the variable by itself.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes == 1 < launched:
        raise ValueError(
            f"{launched} processes were launched, which cannot be joined on {state.device}: each would do all the work. Launch one"
            " process, or set ACCELERATE_USE_CPU=true."
        )
    return state
