"""Checkpoints of the original code, with their flags, model and diffusion process."""

import functools
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers import SchedulerMixin

from diffusers_adm.checks import check_dtype
from diffusers_adm.choices import BETA_SCHEDULES
from diffusers_adm.openai.architecture import Shapes, classifier_config, read_shapes, unet_config
from diffusers_adm.openai.files import Checkpoint, read_state_dict
from diffusers_adm.openai.flags import Flags, check_flags, parse_flags
from diffusers_adm.openai.released import check_layout, find_released, imagenet_class_names
from diffusers_adm.openai.released_rows import ReleasedCheckpoint
from diffusers_adm.openai.schedulers import build_scheduler, build_sigma_scheduler, sampler_of
from diffusers_adm.openai.tensors import load_published


class PublishedCheckpoint:
    """
    Checkpoint of a UNet, an upsampler or a classifier of the original code. The file is read once per model that is loaded, and the
    flags are parsed at most once.

    Args:
        source: Path of a file that `torch.save` wrote, or a state dict. If the file holds one model, its tensors may be under a key,
            and their names may have a prefix.
        flags: Model flags of the original command line. Released files are recognised by name and need no flags.
    """

    def __init__(self, source: Checkpoint, flags: str | Flags | None = None):
        self.source = source
        self._flags = flags

    @classmethod
    def of(cls, checkpoint: "Checkpoint | PublishedCheckpoint", flags: str | None = None) -> "PublishedCheckpoint":
        """
        Returns a checkpoint as an object.

        Args:
            checkpoint: Path, state dict, or checkpoint that is already an object.
            flags: Model flags of the original command line. They must be `None` for an object, which has its own flags.

        Raises:
            ValueError: If flags are given together with an object.
        """
        if not isinstance(checkpoint, cls):
            return cls(checkpoint, flags)
        if flags is not None:
            raise ValueError(
                f"`flags` must be None, because a PublishedCheckpoint has its own flags, but got {flags!r}. Pass them to its"
                " constructor."
            )
        return checkpoint

    @cached_property
    def released(self) -> ReleasedCheckpoint | None:
        """Row in the table of released checkpoints. `None` for other checkpoints."""
        return find_released(self.source)

    @cached_property
    def given_flags(self) -> Flags | None:
        """Flags that were given, without the flags from the table of released checkpoints."""
        flags = self._flags
        return flags if flags is None or isinstance(flags, Flags) else parse_flags(flags)

    @cached_property
    def flags(self) -> Flags:
        """
        Flags of the model and its diffusion process. Given flags override those of the released checkpoint.

        Raises:
            ValueError: If the flags are missing or not supported.
        """
        if self.released is None and self.given_flags is None:
            source = "a state dict" if isinstance(self.source, Mapping) else repr(os.fspath(self.source))
            raise ValueError(
                f"`flags` are required, because {source} is not a released file. Pass the model flags of the original command line:"
                " tensor shapes do not determine --image_size, --num_heads or --num_head_channels, --use_new_attention_order,"
                " --noise_schedule and others. `diffusers-adm released` lists released files, which need no flags."
            )
        if self.released is not None and self.released.unsupported is not None and self.given_flags is None:
            raise ValueError(f"{self.released.file} cannot be converted, because {self.released.unsupported}.")
        released = {} if self.released is None else parse_flags(self.released.flags)
        flags = Flags({**released, **(self.given_flags or {})})
        check_flags(flags)
        return flags

    @cached_property
    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        Tensors with their names in the original code.

        Raises:
            ValueError: If the file is missing or damaged, holds other values than tensors by name, or has the name of a released
                file but other tensors.
        """
        tensors = read_state_dict(self.source)
        if self.released is not None:
            try:
                shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                check_layout(shapes, self.released, f"{str(self.source)!r}")
            except ValueError as error:
                raise ValueError(f"{error} Rename the file, and pass its flags.") from error
        return tensors

    @cached_property
    def shapes(self) -> Shapes:
        """
        Shapes of the tensors.

        Raises:
            ValueError: If the tensors are not those of a model of the original code.
        """
        return read_shapes(self.state_dict)

    @cached_property
    def config(self) -> dict[str, Any]:
        """
        Config of the model. Entries that do not follow from the shapes are taken from the flags.

        Raises:
            ValueError: If the flags contradict the checkpoint, or the checkpoint is not of a model of the original code.
        """
        flags = self.flags  # read first, so that invalid flags are reported before a large file is read
        if self.shapes.network == "UNet":
            return unet_config(self.shapes, flags)
        config = classifier_config(self.shapes, flags)
        if self.released is not None:  # the schedule of training, which flags for sampling must not change
            config["num_train_timesteps"] = round(1000 / flags.timestep_scale)
            config["beta_schedule"] = BETA_SCHEDULES[parse_flags(self.released.flags)["noise_schedule"]]
        names = self.id2label
        if names is not None and len(names) == config["num_classes"]:
            config["id2label"] = names
        return config

    @cached_property
    def kind(self) -> str:
        """
        Kind of the model: "unet", "upsampler" or "classifier".

        Raises:
            ValueError: If the flags contradict the checkpoint, or the checkpoint is not of a model of the original code.
        """
        if self.shapes.network == "classifier":
            return "classifier"
        return "upsampler" if self.config["low_res_conditioning"] else "unet"

    @property
    def id2label(self) -> dict[int, str] | None:
        """Name of each class by its number. `None` for a model without classes or with classes of unknown names."""
        if self.released is None or not self.released.imagenet_labels:
            return None
        if self.kind != "classifier" and self.config["num_class_embeds"] is None:
            return None
        return dict(enumerate(imagenet_class_names()))

    @property
    def guidance_scale(self) -> float:
        """Guidance scale for sampling: the given one, otherwise that of the released checkpoint, otherwise 1."""
        published = None if self.released is None else self.released.guidance_scale
        return self.flags.get("classifier_scale", 1.0 if published is None else published)

    @property
    def num_inference_steps(self) -> int:
        """Number of steps for sampling if no respacing is given."""
        if not self.shapes.preconditioned:
            return 250
        return 1 if sampler_of(self.flags) == "onestep" else self.flags["steps"]

    @property
    def timestep_respacing(self) -> str | None:
        """Respacing for sampling: the given one, otherwise that of the released checkpoint, otherwise `None`."""
        if self.shapes.preconditioned:
            return self.flags["ts"] if sampler_of(self.flags) == "multistep" else None
        published = None if self.released is None else self.released.timestep_respacing
        return self.flags.get("timestep_respacing", published)

    def scheduler(self) -> SchedulerMixin:
        """
        Builds the scheduler of diffusers that samples as the scripts of the original code do.

        Raises:
            ValueError: If the flags do not describe a diffusion process.
        """
        if self.shapes.preconditioned:
            return build_sigma_scheduler(self.flags)
        learns_variance = self.config["out_channels"] == 2 * self.config["in_channels"]
        return build_scheduler(self.flags, learns_variance)

    def load(
        self, model_class: type[torch.nn.Module], network: str, dtype: torch.dtype | None = None
    ) -> torch.nn.Module:
        """
        Builds the model in eval mode. Tensors keep their device. The model shares no memory with the checkpoint: tensors of a state
        dict are copied, and those of a file are mapped into memory for this model alone.

        Args:
            model_class: Class of the model.
            network: Kind of network of the class: "UNet" or "classifier".
            dtype: Data type of the weights. `None` keeps the data type of the checkpoint, or the widest one if it has several.

        Raises:
            ValueError: If the checkpoint cannot be read or holds another kind of network, the flags contradict it, or `dtype` is
                not a floating-point type.
        """
        check_dtype(dtype)
        flags = self.flags  # read first, so that invalid flags are reported before a large file is read
        if self.shapes.network != network:
            has = "has" if self.shapes.network == "UNet" else "lacks"
            raise ValueError(
                f"The checkpoint must hold a {network}, but holds a {self.shapes.network}, because it {has} output_blocks."
            )
        new_order = network == "UNet" and flags["use_new_attention_order"]
        model = load_published(model_class, self.config, self.state_dict, new_order)
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in model.parameters()))
        model = model.to(dtype)
        if isinstance(self.source, Mapping):
            given = {tensor.untyped_storage().data_ptr() for tensor in self.state_dict.values()}
            for weight in model.parameters():
                if weight.untyped_storage().data_ptr() in given:
                    weight.data = weight.data.clone()
        else:  # another model must not share the memory, so that it reads the file again
            del self.state_dict
        return model

    def classifier(self, source: "Checkpoint | PublishedCheckpoint") -> "PublishedCheckpoint":
        """Returns the checkpoint of a classifier whose flags are in the same command line."""
        if isinstance(source, PublishedCheckpoint):
            return source
        return PublishedCheckpoint(source, None if self.given_flags is None else self.given_flags.of_classifier())
