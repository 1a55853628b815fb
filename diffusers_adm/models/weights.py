"""Weights of a model: their completeness when they are loaded, and their data type."""

import os
from typing import Self

import torch

from diffusers_adm.openai.files import check_is_saved_model


class CompleteWeightsMixin:
    """Model of diffusers that is loaded with all its weights or not at all. It comes before `ModelMixin` among the bases."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self | tuple[Self, dict]:
        """
        Loads a saved model.

        Args:
            pretrained_model_name_or_path: Folder, or id of a repository on the Hub.
            kwargs: Arguments of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: If a file is given in the place of a folder, or weights are missing. diffusers itself leaves them
                without values.
        """
        check_is_saved_model(pretrained_model_name_or_path)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"The weights of {cls.__name__} in {str(pretrained_model_name_or_path)!r} are incomplete: {len(missing)} of"
                f" {len(model.state_dict())} tensors are missing, such as {', '.join(missing[:3])}. Save or download them again."
            )
        return (model, info) if with_info else model


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """
    Casts the weights one after the other. Narrower weights take the place of the old ones, so that a large checkpoint
    needs only its own memory. For a file that is mapped into memory, this changes only the process's own pages.

    Args:
        model: Model whose weights are cast.
        dtype: Data type of the weights afterwards.
    """
    for parameter in model.parameters():
        old = parameter.data
        parameter.data = old.to(dtype)
        if parameter.element_size() < old.element_size():
            place = old.flatten().view(dtype)[: old.numel()].view(old.shape)
            parameter.data = place.copy_(parameter.data)
