"""The processes of a launch."""

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> PartialState:
    """
    Joins the processes of a launch; to be called before anything else of accelerate, which then knows them. One waits up
    to a day for what another does alone, such as to fetch a dataset.

    Raises:
        ValueError: If several were launched and cannot be joined.
    """
    # By itself `PartialState` joins no processes on a CPU, and of the two only `Accelerator` reads the variable.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes == 1 < launched:
        raise ValueError(
            f"{launched} processes were launched, which cannot be joined on {state.device}: each would do all the work. Launch one"
            " process, or set ACCELERATE_USE_CPU=true."
        )
    return state
