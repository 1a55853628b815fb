"""Data types of a model's weights."""

import torch


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
