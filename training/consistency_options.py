"""Options of the training of a consistency model."""

import dataclasses
from dataclasses import dataclass

from diffusers_adm.options import above, at_least, option, option_group
from diffusers_adm.training.options import PipelineTrainingOptions


NOISE_EMBEDDINGS = ("timestep", "log_sigma")


@dataclass
class TeacherOptions:
    """Pipeline whose guided predictions a consistency model learns."""

    teacher_model_name_or_path: str | None = option(
        None,
        help="Pipeline whose guided prediction is distilled: a folder, a Hub id, released:NAME or shipped:NAME. Without it, the model"
        " learns from the images alone.",
        unset="no teacher",
        metavar="NAME_OR_PATH",
    )
    guidance_scale: float | None = option(
        None,
        help="Scale of the teacher's classifier guidance, which becomes part of the model. At high noise levels, guidance moves the"
        " predicted images by at most 0.5 (root mean square).",
        unset="that of the teacher's pipeline, or 0 without a classifier",
        check=at_least(0),
    )
    cfg_weight: float = option(
        0.0,
        help="Weight of the teacher's classifier-free guidance, which becomes part of the model.",
        check=at_least(0),
    )
    teacher_steps: int = option(
        1,
        help="Number of the teacher's steps from the higher noise level of a pair to the lower one. The model learns at the beginning"
        " of each step.",
        check=at_least(1),
    )
    num_paths: int | None = option(
        None,
        help="Number of the teacher's paths that are drawn before training, down to --sigma_min, and stored in --output_dir. The model"
        " learns at random points of these paths.",
        unset="new paths in every step",
        check=at_least(1),
    )
    path_levels: tuple[float, ...] | None = option(
        None,
        help="Noise levels where the stored paths begin: --sigma_max, and the level of the second step if there is one, such as 80,0.8."
        " The model then learns only there, and its pipeline draws in one or two steps.",
        unset="random levels, and the model learns at all points of the paths",
    )


@dataclass
class ConsistencyOptions:
    """Noise levels of a consistency model, and the pairs of them that it is trained on."""

    sigma_data: float = option(
        1.0, help="Standard deviation of the images, which are in [-1, 1], for the preconditioning.", check=above(0)
    )
    sigma_min: float = option(0.002, help="Lowest noise level, at which the model returns its input.", check=above(0))
    sigma_max: float = option(80.0, help="Highest noise level, at which sampling begins.", check=above(0))
    log_sigma_mean: float = option(
        -1.1, help="Mean of the logarithm of the higher noise level of a pair, which is at most --sigma_max."
    )
    log_sigma_std: float = option(
        2.0, help="Standard deviation of the logarithm of the higher noise level of a pair.", check=at_least(0)
    )
    closer_every: int | None = option(
        None,
        help="Number of steps after which the distance of the two noise levels of a pair is halved, at most ten times. Up to then, the"
        " lower one is --sigma_min. If you resume a run with another --max_train_steps, pass the value of the run.",
        unset="an eighth of --max_train_steps",
        check=at_least(1),
    )
    sampling_rho: float = option(
        7.0,
        help="Spacing of the noise levels of sampling. The second of two steps begins at about 2 with 7, and at lower levels with"
        " larger numbers.",
        check=above(0),
        resumable=True,
        on_card=True,
    )
    noise_embedding: str = option(
        "timestep",
        help="Form in which the network is given the noise level: the timestep of --noise_schedule, or its logarithm as in EDM.",
        choices=NOISE_EMBEDDINGS,
    )


@dataclass(kw_only=True)
class ConsistencyTrainingOptions(PipelineTrainingOptions):
    """
    Options of a consistency model's training.

    Raises:
        ValueError: If options contradict one another.
    """

    preset: str | None = dataclasses.field(default=None)  # no preset is of this script
    teacher: TeacherOptions = option_group(TeacherOptions, "teacher")
    consistency: ConsistencyOptions = option_group(ConsistencyOptions, "noise levels")

    def __post_init__(self):
        super().__post_init__()
        teacher, levels = self.teacher, self.consistency
        if not 2 * levels.sigma_min < levels.sigma_max:
            raise ValueError(
                f"--sigma_min must be less than half of --sigma_max {levels.sigma_max}, but got {levels.sigma_min}."
            )
        if teacher.teacher_model_name_or_path is None:
            for name in ("guidance_scale", "cfg_weight", "teacher_steps", "num_paths"):
                given = getattr(teacher, name)
                if given != TeacherOptions.__dataclass_fields__[name].default:
                    raise ValueError(
                        f"--{name} {given} requires --teacher_model_name_or_path, the pipeline to distil."
                    )
        if teacher.num_paths is not None and levels.closer_every is not None:
            raise ValueError(
                f"--closer_every has no effect with --num_paths, whose paths end at --sigma_min. Leave out --closer_every"
                f" {levels.closer_every}."
            )
        if teacher.path_levels is not None:
            if teacher.num_paths is None:
                raise ValueError("--path_levels requires --num_paths, because it places stored paths.")
            first, *others = teacher.path_levels or (None,)
            fits = first == levels.sigma_max and len(others) <= 1
            if not fits or not all(2 * levels.sigma_min <= level <= 0.9 * first for level in others):
                raise ValueError(
                    f"--path_levels must be {levels.sigma_max:g} (--sigma_max), or it and a noise level in"
                    f" [{2 * levels.sigma_min:g}, {0.9 * levels.sigma_max:g}] (from twice --sigma_min to 0.9 times --sigma_max), but got"
                    f" {','.join(map(str, teacher.path_levels))}."
                )
            for name in ("log_sigma_mean", "log_sigma_std", "sampling_rho"):
                if getattr(levels, name) != getattr(type(levels), name):
                    raise ValueError(
                        f"--{name} has no effect with --path_levels, which sets the levels. Leave out --{name}"
                        f" {getattr(levels, name)}."
                    )
        if self.architecture.dropout and teacher.num_paths is None:
            raise ValueError(
                f"--dropout requires --num_paths, because otherwise prediction and target would drop different values. Leave out"
                f" --dropout {self.architecture.dropout}."
            )
        if teacher.num_paths is not None and self.selection.streaming:
            raise ValueError("--num_paths does not support --streaming, because images are chosen at random.")
        if teacher.teacher_model_name_or_path is not None and self.classes.label_dropout:
            raise ValueError(
                "--label_dropout has no effect with --teacher_model_name_or_path, because its guidance requires labels. Leave it out."
            )
