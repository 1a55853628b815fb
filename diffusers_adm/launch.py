"""Processes of a distributed launch."""

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> PartialState:
    """
    Joins the processes of a launch. It must be called before anything else of accelerate. A process waits up to a day for work that
    only one process does, such as downloading a dataset.

    Raises:
        ValueError: If several processes were launched and cannot be joined.
    """
    # Passed to `PartialState`, because only `Accelerator` reads the variable itself.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes == 1 < launched:
        raise ValueError(
            f"{launched} processes were launched, but they cannot be joined on {state.device}, and each would do all the work. Launch"
            " one process, or set ACCELERATE_USE_CPU=true."
        )
    return state
