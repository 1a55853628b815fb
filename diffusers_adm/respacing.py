"""Which of the training timesteps a sampling run visits. Integers only.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4 for strides over sections; Song et al. 2020
(arXiv 2010.02502), section 4.2 for the integer stride of DDIM.
"""

from diffusers_adm.checks import is_integer


RESPACING_FORMS = "a string of the form '', '250', '90,60,60,20,20' or 'ddim25'"


def respaced_timesteps(timestep_respacing: str, num_train_timesteps: int) -> list[int]:
    """
    The timesteps that a published respacing string keeps.

    Args:
        timestep_respacing: `""` keeps all; `"250"` keeps 250, both ends included; `"90,60,60,20,20"` divides the
            timesteps into sections of equal length, first timesteps first, and keeps so many of each; `"ddim25"` keeps
            25 at an integer stride from 0.
        num_train_timesteps: How many timesteps the model was trained with.

    Returns:
        Kept timesteps, in ascending order, each in [0, num_train_timesteps).

    Raises:
        ValueError: If the string is not of these forms, or asks for what the timesteps do not hold.
    """
    if not isinstance(timestep_respacing, str):
        raise ValueError(f"timestep_respacing={timestep_respacing!r} is not {RESPACING_FORMS}.")
    if timestep_respacing == "":
        return list(range(num_train_timesteps))
    if timestep_respacing.startswith("ddim"):
        count = _parse_count(timestep_respacing[len("ddim") :], timestep_respacing)
        stride = integer_stride(count, num_train_timesteps)
        if stride is None:
            raise ValueError(
                f"timestep_respacing={timestep_respacing!r}: no integer stride visits {count} of"
                f" {num_train_timesteps} timesteps."
            )
        return list(range(0, num_train_timesteps, stride))

    counts = [_parse_count(part, timestep_respacing) for part in timestep_respacing.split(",")]
    if not any(counts):
        raise ValueError(f"timestep_respacing={timestep_respacing!r} keeps no timestep.")
    length, longer_sections = divmod(num_train_timesteps, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = length + (section < longer_sections)
        if count > size:
            raise ValueError(
                f"timestep_respacing={timestep_respacing!r}: section {section + 1} has {size} of the"
                f" {num_train_timesteps} timesteps, not {count}."
            )
        # The published code adds up a float stride and rounds each sum; i * stride would round some of them otherwise.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += size
    return timesteps


def integer_stride(count: int, num_train_timesteps: int) -> int | None:
    """The least stride at which `range(0, num_train_timesteps, stride)` has `count` (> 1) elements; `None` if none has."""
    for stride in range(1, num_train_timesteps):
        if len(range(0, num_train_timesteps, stride)) == count:
            return stride
    return None


def evenly_spaced_timesteps(count: int, num_train_timesteps: int) -> list[int]:
    """
    `count` timesteps from 0 for DDIM: at an integer stride where one gives that number, else round(i * T / count).

    Raises:
        ValueError: If `count` is not an integer in [1, num_train_timesteps].
    """
    _check_count(count, num_train_timesteps)
    stride = integer_stride(count, num_train_timesteps)
    if stride is not None:
        return list(range(0, num_train_timesteps, stride))
    return [round(i * num_train_timesteps / count) for i in range(count)]


def trailing_timesteps(count: int, num_train_timesteps: int) -> list[int]:
    """
    Returns `count` timesteps that end at the last one, in ascending order: diffusers' `timestep_spacing="trailing"` (Lin et al.
    2023, arXiv 2305.08891, Table 2).

    Args:
        count: Number of timesteps.
        num_train_timesteps: Number of timesteps that the model was trained with.

    Raises:
        ValueError: If `count` is not an integer in [1, num_train_timesteps].
    """
    _check_count(count, num_train_timesteps)
    return [round((i + 1) * num_train_timesteps / count) - 1 for i in range(count)]


def _parse_count(text: str, timestep_respacing: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"timestep_respacing={timestep_respacing!r} is not {RESPACING_FORMS}.")
    return int(text)


def _check_count(count: int, num_train_timesteps: int) -> None:
    if not (is_integer(count) and is_integer(num_train_timesteps) and 1 <= count <= num_train_timesteps):
        raise ValueError(f"{count!r} steps cannot be taken: the model has {num_train_timesteps!r} timesteps.")
