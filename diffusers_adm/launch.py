"""Start of the processes of a distributed launch."""

import datetime
import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes() -> PartialState:
    """
    Joins the processes of a launch. Call it before any other function of accelerate. A process waits for up to a day while another
    process does work alone, such as downloading a dataset.

    Raises:
        ValueError: If several processes were launched and cannot be joined.
    """
    # The variable is read here, because `PartialState` does not read it, unlike `Accelerator`.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes == 1 < launched:
        raise ValueError(
            f"{launched} processes were launched, but they cannot be joined on {state.device}, so each would do all the work. Launch"
            " one process, or set ACCELERATE_USE_CPU=true."
        )
    return state
