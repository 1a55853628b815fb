"""Options of what a training run writes and uploads. Notes of the options are described in `diffusers_adm.training.options`."""

from dataclasses import dataclass
from pathlib import Path

from diffusers_adm.options import at_least, option


@dataclass
class OutputOptions:
    """Folder of a run, and steps at which files are written."""

    output_dir: Path = option(help="Folder of the run.", resumable=True)
    checkpointing_steps: int | None = option(
        None,
        help="Number of steps between checkpoints.",
        unset="a tenth of the run, at most 5000, and one early checkpoint",
        check=at_least(1),
        resumable=True,
    )
    checkpoints_total_limit: int = option(
        2, help="Number of latest checkpoints that are kept.", check=at_least(1), resumable=True
    )
    keep_every: int | None = option(
        None,
        help="Keep all checkpoints at multiples of this number of steps.",
        unset="none of them",
        check=at_least(1),
        resumable=True,
    )
    resume_from_checkpoint: str | None = option(
        None,
        help='Folder of a checkpoint to resume from, or "latest".',
        unset="begin a new run",
        metavar="FOLDER",
        resumable=True,
        saved=False,
    )
    logging_steps: int | None = option(
        None,
        help="Number of steps between log entries.",
        unset="a tenth of the run, at most 50",
        check=at_least(1),
        resumable=True,
    )
    validation_steps: int | None = option(
        None,
        help="Number of steps between validations.",
        unset="a tenth of the run, at most 5000, and one early validation",
        check=at_least(1),
        resumable=True,
    )
    report_to: str | None = option(
        None,
        help="Tracker that accelerate supports, such as tensorboard or wandb.",
        metavar="TRACKER",
        resumable=True,
    )


@dataclass
class HubOptions:
    """
    Upload of the trained model to the Hub.

    Raises:
        ValueError: If the id of the repository is missing, or has no owner.
    """

    push_to_hub: bool = option(False, help="Upload the trained model at the end.", resumable=True)
    hub_model_id: str | None = option(
        None,
        help="Repository to upload to, such as me/my-model. --push_to_hub requires it.",
        metavar="REPOSITORY",
        resumable=True,
    )
    hub_token: str | None = option(
        None,
        help="Access token of the Hub.",
        unset="the token of `hf auth login`",
        metavar="TOKEN",
        resumable=True,
        saved=False,
    )
    hub_revision: str | None = option(
        None,
        help="Branch to upload to. It is created if it does not exist.",
        unset="main",
        metavar="BRANCH",
        resumable=True,
    )
    hub_private_repo: bool = option(False, help="Create the repository as a private one.", resumable=True)
    hub_retry_seconds: float = option(
        30.0,
        help="Seconds between the first and the second attempt of an upload. Each further wait is twice as long.",
        resumable=True,
        check=at_least(0),
    )

    def __post_init__(self):
        if self.push_to_hub and "/" not in (self.hub_model_id or ""):
            raise ValueError(
                f"--push_to_hub requires --hub_model_id, such as me/my-model, but got {self.hub_model_id}."
            )
