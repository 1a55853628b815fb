"""Checks of arguments that models, functions and pipelines share."""

import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType

import torch


def is_integer(value: object) -> bool:
    """Returns whether a value is an integer. Booleans do not count as integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Returns whether a value is a real number, which may be infinite. Booleans and NaN do not count as numbers."""
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


TYPE_CHECKS: dict[type, tuple[str, Callable[[object], bool]]] = {
    int: ("an integer", is_integer),
    float: ("a number", is_number),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, str)),
    NoneType: ("None", lambda value: value is None),
}


def check_types(function: Callable, arguments: Mapping[str, object]) -> None:
    """
    Checks arguments against the annotations of a function.

    Args:
        function: Function whose annotations are checked. Only numbers, booleans, strings, tuples of them and `None` are checked.
        arguments: Arguments by name. Names without an annotation are ignored.

    Raises:
        ValueError: If the type of an argument does not fit its annotation. An integer is accepted as a number.
    """
    for name, annotation in typing.get_type_hints(function).items():
        if name in arguments and not _fits_annotation(arguments[name], annotation):
            raise ValueError(f"`{name}` must be {_type_words(annotation)}, but got {arguments[name]!r}.")


def _fits_annotation(value: object, annotation: object) -> bool:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in TYPE_CHECKS:
        return TYPE_CHECKS[annotation][1](value)
    if origin in (UnionType, typing.Union):
        return any(_fits_annotation(value, part) for part in parts)
    if origin is tuple:  # JSON turns tuples into lists
        return isinstance(value, (tuple, list)) and all(_fits_annotation(entry, parts[0]) for entry in value)
    return origin is not typing.Literal or type(value) in {type(part) for part in parts}


def _type_words(annotation: object) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in TYPE_CHECKS:
        return TYPE_CHECKS[annotation][0]
    if origin is tuple:
        return f"a list, each entry of which is {_type_words(parts[0])}"
    return " or ".join(_type_words(part) if origin is not typing.Literal else repr(part) for part in parts)


def plain_numbers(value: typing.Any) -> typing.Any:
    """Replaces numbers of NumPy by `int` and `float`, also inside tuples, lists and dicts, because JSON supports no others."""
    if isinstance(value, (tuple, list)):
        entries = [plain_numbers(entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if isinstance(value, dict):
        return {name: plain_numbers(entry) for name, entry in value.items()}
    if is_integer(value):
        return int(value)
    return float(value) if is_number(value) else value


def check_dtype(dtype: torch.dtype | None) -> None:
    """
    Checks the data type of weights.

    Args:
        dtype: Data type. `None` means the default.

    Raises:
        ValueError: If it is not a floating-point type.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type, such as torch.float16, but got {dtype!r}.")


def check_images(name: str, images: torch.Tensor, channels: int | str = "channels") -> None:
    """
    Checks the type and shape of images.

    Args:
        name: Name of the argument.
        images: Images, `(batch, channels, height, width)`.
        channels: Required number of channels. A word instead of a number means any number of channels.

    Raises:
        ValueError: If the images are not a dense tensor of floating-point numbers, have a wrong shape, or have no pixels.
    """
    is_tensor = isinstance(images, torch.Tensor)
    if is_tensor and images.is_floating_point() and images.layout == torch.strided and images.ndim == 4:
        if 0 not in images.shape[2:] and (isinstance(channels, str) or images.shape[1] == channels):
            return
    got = f"{images.layout}, {images.dtype}, {tuple(images.shape)}" if is_tensor else type(images).__name__
    raise ValueError(
        f"`{name}` must be a dense tensor of floating-point numbers, (batch, {channels}, height, width), but got"
        f" {got.replace('torch.strided, ', '')}."
    )


def one_per_level(name: str, given: int | tuple[int, ...], num_levels: int) -> list[int]:
    """
    Returns a number of each level of a model.

    Args:
        name: Name of the argument.
        given: One number for all levels, or one per level, at least 1.
        num_levels: Number of levels.

    Raises:
        ValueError: If a number is below 1, or their number is not `num_levels`.
    """
    numbers = [given] * num_levels if is_integer(given) else list(given)
    if len(numbers) != num_levels or min(numbers) < 1:
        raise ValueError(
            f"`{name}` must be one number of at least 1 for all levels or one for each of {num_levels}, but got {given}."
        )
    return numbers


def as_numbers(name: str, given: torch.Tensor | float | list) -> torch.Tensor:
    """
    Returns timesteps or labels as a tensor.

    Args:
        name: Name of the argument.
        given: Number, list, array or tensor.

    Raises:
        ValueError: If the values are not real numbers.
    """
    try:
        if type(given) in (int, float):
            # `as_tensor` of a number would be a constant, for which a compiled model is compiled anew.
            given = torch.tensor([given]).squeeze(0)
        numbers = given if isinstance(given, torch.Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` must be numbers, one for all images or one per image, but got {given!r}."
        ) from error
    if numbers.is_complex() or numbers.dtype == torch.bool:
        raise ValueError(f"`{name}` must be real numbers, but got {numbers.dtype}.")
    return numbers


def one_per_image(name: str, given: torch.Tensor | float | list, images: torch.Tensor) -> torch.Tensor:
    """
    Returns timesteps or labels as a tensor on the device of the images, `()`, `(1,)` or `(batch,)`.

    Args:
        name: Name of the argument.
        given: One number for all images, or one per image, as a number, a list, an array or a tensor.
        images: Images, `(batch, ...)`.

    Raises:
        ValueError: If the values are not real numbers, or are neither one number nor one number per image.
    """
    numbers = as_numbers(name, given)
    if numbers.ndim > 1 or (numbers.ndim == 1 and numbers.shape[0] not in (1, images.shape[0])):
        raise ValueError(
            f"`{name}` must be one number for all images or one per image, ({images.shape[0]},), but got the shape"
            f" {tuple(numbers.shape)}."
        )
    return numbers.to(images.device)
