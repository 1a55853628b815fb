"""The processes of a launch."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def join_processes(**options) -> PartialState:
    """
    All processes of the launch, also where no accelerator is: accelerate joins those of a CPU only if it is told that this
    is one, and would let each do all the work by itself. An `Accelerator` that is made later has the same processes.

    Args:
        options: Of `torch.distributed.init_process_group`, such as `timeout`.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, **options)
