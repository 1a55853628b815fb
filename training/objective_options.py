"""Options of the prediction, the noise levels and the loss of a UNet."""

from dataclasses import dataclass, fields

from diffusers_adm.choices import PREDICTION_TYPES, TIMESTEP_SAMPLERS
from diffusers_adm.options import above, at_least, option


LOSSES = ("hybrid", "vlb")


@dataclass
class ObjectiveOptions:
    """Prediction and loss of a UNet that is given the timestep."""

    learn_sigma: bool = option(True, help="Train a UNet with learned variance.")
    prediction_type: str = option(
        "epsilon", help="Prediction of the UNet. sample means x_0.", choices=PREDICTION_TYPES
    )
    loss: str = option(
        "hybrid", help="Loss. Without learned variance, hybrid is the simple loss alone.", choices=LOSSES
    )
    vlb_weight: float | None = option(
        None,
        help="Weight of the variational bound in the hybrid loss.",
        unset="--num_train_timesteps / 1000",
        check=at_least(0),
    )
    noise_offset: float = option(
        0.0,
        help="Standard deviation of added noise that is the same at all pixels of a channel. It avoids grey backgrounds in"
        " samples of few steps.",
        check=at_least(0),
    )
    schedule_sampler: str = option(
        "uniform", help="Distribution that timesteps are drawn from.", choices=TIMESTEP_SAMPLERS
    )

    @property
    def predicts_x_0(self) -> bool:
        """Whether the UNet predicts x_0 instead of epsilon."""
        return self.prediction_type == "sample"


def has_preconditioning(values: dict) -> bool:
    """Returns whether the UNet of a run is given the noise level."""
    return values["preconditioning"] is not None


@dataclass
class NoiseLevelOptions:
    """Preconditioning and noise levels of a UNet that is given the noise level (Karras et al. 2022, arXiv 2206.00364, Table 1)."""

    preconditioning: str | None = option(
        None,
        help="Preconditioning of a UNet that is given the noise level and predicts x_0. It is trained with the loss of EDM.",
        unset="none, for a UNet that is given the timestep",
        choices=("edm",),
    )
    sigma_data: float = option(
        0.5,
        help="Standard deviation of the images, which are in [-1, 1], for the preconditioning.",
        check=above(0),
        on_card=has_preconditioning,
    )
    sigma_min: float = option(
        0.002, help="Lowest noise level of sampling.", check=above(0), on_card=has_preconditioning
    )
    sigma_max: float = option(
        80.0, help="Highest noise level of sampling.", check=above(0), on_card=has_preconditioning
    )
    log_sigma_mean: float = option(
        -1.2, help="Mean of the logarithm of the noise levels that training draws.", on_card=has_preconditioning
    )
    log_sigma_std: float = option(
        1.2,
        help="Standard deviation of the logarithm of the noise levels that training draws.",
        check=above(0),
        on_card=has_preconditioning,
    )


def check_objective(objective: ObjectiveOptions, levels: NoiseLevelOptions) -> None:
    """Raises a `ValueError` if options were given that have no effect with the other options."""
    if objective.vlb_weight is not None and not (objective.learn_sigma and objective.loss == "hybrid"):
        raise ValueError(
            f"--vlb_weight {objective.vlb_weight} requires the hybrid loss and a learned variance. Leave it out."
        )
    if levels.preconditioning is None:
        without_effect = [name for name in _changed(levels) if name != "preconditioning"]
        if without_effect:
            raise ValueError(f"--{without_effect[0]} requires a UNet with --preconditioning.")
        return
    if objective.learn_sigma:
        raise ValueError(
            f"--preconditioning {levels.preconditioning} requires --no-learn_sigma, because its loss does not train a variance."
        )
    without_effect = [name for name in _changed(objective) if name not in ("learn_sigma", "noise_offset")]
    if without_effect:
        name = without_effect[0]
        raise ValueError(
            f"--{name} has no effect with --preconditioning {levels.preconditioning}. Leave out --{name}"
            f" {getattr(objective, name)}."
        )


def _changed(options: ObjectiveOptions | NoiseLevelOptions) -> list[str]:
    """Returns the names of the options that differ from their default."""
    return [field.name for field in fields(options) if getattr(options, field.name) != field.default]
