"""Moving averages of a model's weights."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from diffusers_adm.training.checkpoint_parts import read_tensors
from diffusers_adm.training.options import AverageOptions


logger = get_logger(__name__)


class MovingAverages:
    """
    Moving averages of a model's weights, one per rate.

    Args:
        model: Model whose weights are averaged, as accelerate has placed it.
        options: Rates of the averages.
        device: Device of the averages, unless the options keep them on the CPU.
        max_train_steps: Number of steps of the run.
    """

    def __init__(self, model: torch.nn.Module, options: AverageOptions, device: torch.device, max_train_steps: int):
        self.model = model
        self.options = options
        self.decays = options.ema_decay
        self.averages = {decay: self._build(decay, device, max_train_steps) for decay in self.decays}

    def _build(self, decay: float, device: torch.device, max_train_steps: int) -> EMAModel:
        options = self.options
        if decay and not options.use_ema_warmup and max_train_steps < 5 / (1 - decay):
            fitting = math.floor(1e4 * max(0, 1 - 10 / max_train_steps)) / 1e4  # averages over half of the run
            logger.warning(
                "The pipeline of the moving average with --ema_decay %g will be close to the initial weights, because it averages over %d"
                " steps, but this run takes %d. Pass a smaller rate, such as --ema_decay %g.",
                decay, round(5 / (1 - decay)), max_train_steps, fitting,
            )  # fmt: skip
        # ADM's rate is constant. `min_decay` and `update_after_step` make it so, because `EMAModel` raises it from 0 otherwise.
        average = EMAModel(
            self._parameters().values(),
            decay=decay,
            min_decay=0.0 if options.use_ema_warmup else decay,
            update_after_step=-1,
            use_ema_warmup=options.use_ema_warmup,
            inv_gamma=options.ema_inv_gamma,
            power=options.ema_power,
            foreach=True,
        )
        average.to("cpu" if options.offload_ema else device)
        return average

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the weights that are trained, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def __getitem__(self, decay: float) -> EMAModel:
        return self.averages[decay]

    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors of all moving averages."""
        return [shadow for average in self.averages.values() for shadow in average.shadow_params]

    def update(self) -> None:
        """Moves all averages towards the current weights."""
        if not self.averages:
            return
        parameters = list(self._parameters().values())
        if self.options.offload_ema:
            parameters = [parameter.detach().cpu().requires_grad_() for parameter in parameters]
        for average in self.averages.values():
            average.step(parameters)

    @contextlib.contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """Replaces the weights by a moving average inside the context."""
        parameters = list(self._parameters().values())
        average = self.averages[decay]
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)

    def save(self, folder: Path) -> None:
        """Writes each moving average to a file of its own in a checkpoint."""
        for decay, average in self.averages.items():
            tensors = {name: shadow.contiguous() for name, shadow in zip(self._parameters(), average.shadow_params)}
            save_file(tensors, folder / f"ema-{decay:g}.safetensors")

    def load(self, folder: Path, num_updates: int) -> None:
        """
        Reads the moving averages of a checkpoint.

        Args:
            folder: Folder of the checkpoint.
            num_updates: Number of updates that the averages have had.

        Raises:
            ValueError: If a file is missing, damaged or from another run.
        """
        for decay, average in self.averages.items():
            shadows = dict(zip(self._parameters(), average.shadow_params))
            saved = read_tensors(folder / f"ema-{decay:g}.safetensors", like=shadows)
            for name, shadow in shadows.items():
                shadow.copy_(saved[name])
            average.optimization_step = num_updates
