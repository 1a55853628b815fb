"""Respacing: the training timesteps that a sampling run visits. All timesteps are integers.

Sources:
- strides over sections: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4
- integer stride of DDIM: Song et al. 2020 (arXiv 2010.02502), section 4.2
"""

from diffusers_adm.checks import is_integer


RESPACING_FORMS = "a string of the form '', '250', '90,60,60,20,20' or 'ddim25'"


def respaced_timesteps(timestep_respacing: str, num_train_timesteps: int) -> list[int]:
    """
    Returns the timesteps that a respacing string of the original code keeps, in ascending order.

    Args:
        timestep_respacing: Respacing string. `""` keeps all timesteps. `"250"` keeps 250 evenly spaced ones, including the first
            and the last. `"90,60,60,20,20"` divides the timesteps into five sections of equal length and keeps that number in each,
            lowest timesteps first. `"ddim25"` keeps 25 at an integer stride from 0.
        num_train_timesteps: Number of timesteps that the model was trained with.

    Raises:
        ValueError: If the string has none of these forms, or keeps more timesteps than there are.
    """
    if not isinstance(timestep_respacing, str):
        raise ValueError(f"`timestep_respacing` must be {RESPACING_FORMS}, but got {timestep_respacing!r}.")
    if timestep_respacing == "":
        return list(range(num_train_timesteps))
    if timestep_respacing.startswith("ddim"):
        count = _parse_count(timestep_respacing[len("ddim") :], timestep_respacing)
        stride = integer_stride(count, num_train_timesteps)
        if stride is None:
            raise ValueError(
                f"`timestep_respacing` 'ddimN' requires an integer stride that keeps exactly N of {num_train_timesteps} timesteps,"
                f" but got {timestep_respacing!r}. Choose another N."
            )
        return list(range(0, num_train_timesteps, stride))

    counts = [_parse_count(part, timestep_respacing) for part in timestep_respacing.split(",")]
    if not any(counts):
        raise ValueError(f"`timestep_respacing` must keep at least one timestep, but got {timestep_respacing!r}.")
    length, longer_sections = divmod(num_train_timesteps, len(counts))
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = length + (section < longer_sections)
        if count > size:
            raise ValueError(
                f"`timestep_respacing` must keep at most {size} timesteps in section {section + 1} of {num_train_timesteps} timesteps,"
                f" but got {timestep_respacing!r}."
            )
        # Repeated addition, because the original code rounds such sums. i * stride would give other timesteps.
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += size
    return timesteps


def integer_stride(count: int, num_train_timesteps: int) -> int | None:
    """
    Returns the smallest stride at which `range(0, num_train_timesteps, stride)` has `count` elements. `None` means that there is
    no such stride above 0 and below `num_train_timesteps`. `count` must be above 1.
    """
    for stride in range(1, num_train_timesteps):
        if len(range(0, num_train_timesteps, stride)) == count:
            return stride
    return None


def evenly_spaced_timesteps(count: int, num_train_timesteps: int) -> list[int]:
    """
    Returns `count` timesteps of DDIM, in ascending order from 0. They have an integer stride if there is one that gives `count`
    timesteps. Otherwise timestep i is round(i * num_train_timesteps / count).

    Args:
        count: Number of timesteps.
        num_train_timesteps: Number of timesteps that the model was trained with.

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
    Returns `count` timesteps in ascending order, which end at the last training timestep. This is `timestep_spacing="trailing"` of
    diffusers (Lin et al. 2023, arXiv 2305.08891, Table 2).

    Args:
        count: Number of timesteps.
        num_train_timesteps: Number of timesteps that the model was trained with.

    Raises:
        ValueError: If `count` is not an integer in [1, num_train_timesteps].
    """
    _check_count(count, num_train_timesteps)
    return [round((i + 1) * num_train_timesteps / count) - 1 for i in range(count)]


def consistency_steps(timestep_respacing: str, num_train_timesteps: int, given: str | None = None) -> list[int]:
    """
    Returns the steps of a consistency model at which it is evaluated, in ascending order from 0, the highest noise level.

    Args:
        timestep_respacing: Steps in the format of `--ts` of the original code, such as `"0,22,39"`. The last number has no effect
            if there are several.
        num_train_timesteps: Number of steps that the numbers count, at least 2.
        given: Argument that holds the steps, for the message.

    Raises:
        ValueError: If the string has another form, see `check_consistency_steps`.
    """
    parts = [part.strip() for part in str(timestep_respacing).split(",")]
    steps = [int(part) if part.isdecimal() else -1 for part in parts]
    check_consistency_steps(steps, num_train_timesteps, given or f"timestep_respacing={timestep_respacing!r}")
    return steps[:-1] or steps


def check_consistency_steps(steps: list[int], num_train_timesteps: int, given: str) -> None:
    """Raises a `ValueError` that names the given argument, unless steps rise from 0 to at most `num_train_timesteps - 1`."""
    if not steps or steps[0] != 0 or steps != sorted(set(steps)) or steps[-1] >= num_train_timesteps:
        middle, last = num_train_timesteps // 2, num_train_timesteps - 1
        raise ValueError(
            f"{given} must be steps of a consistency model: different integers below {num_train_timesteps} that include 0, the"
            f" highest noise level, such as [{middle}, 0] or '0,{middle},{last}'."
        )


def _parse_count(text: str, timestep_respacing: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"`timestep_respacing` must be {RESPACING_FORMS}, but got {timestep_respacing!r}.")
    return int(text)


def _check_count(count: int, num_train_timesteps: int) -> None:
    if not (is_integer(count) and is_integer(num_train_timesteps) and 1 <= count <= num_train_timesteps):
        raise ValueError(
            f"The number of steps must be an integer in [1, {num_train_timesteps!r}], because the model has as many timesteps, but got"
            f" {count!r}."
        )
