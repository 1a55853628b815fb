"""Training runs of an ablation: their options, and the checks that come before the first run."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline
from diffusers_adm.command_line import RunFailed, suggest_nearest
from diffusers_adm.evaluation.labels import Labels
from diffusers_adm.evaluation.sampling import run_options
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.launch import join_processes
from diffusers_adm.options import option_values, options_of
from diffusers_adm.training import train_unet
from diffusers_adm.training.checkpoint_folders import checkpoint_step, list_checkpoints
from diffusers_adm.training.checkpoint_parts import read_progress
from diffusers_adm.training.checkpointing import VALIDATED
from diffusers_adm.training.configuration import contradictions, read_table, table_as_words
from diffusers_adm.training.objective import sampling_defaults
from diffusers_adm.training.options import OptimisationOptions, UNetTrainingOptions
from diffusers_adm.training.pretrained import check_pretrained
from diffusers_adm.training.setup import build_unet, divide_batch


# Options of the optimisation that may vary. All others are the budget, which is equal for all variants.
FREE = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_epsilon",
)  # fmt: skip
# Options of the model that training starts from, on which the results depend.
PRETRAINED = ("pretrained_model_name_or_path", "pretrained_subfolder", "pretrained_flags")
# Groups of options that must be equal for all variants, because they say where images come from and what is written.
EQUAL_GROUPS = ("source", "format", "selection", "validation", "output", "hub")


@dataclass(frozen=True)
class AblationRun:
    """
    Training run of an ablation.

    Args:
        variant: Name of the variant.
        seed: Seed of training and samples.
        options: Options of the training.
    """

    variant: str
    seed: int
    options: UNetTrainingOptions

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.options.output.output_dir

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps."""
        return self.options.optimisation.max_train_steps

    @property
    def images_per_step(self) -> int:
        """Number of images per optimizer step of all processes."""
        optimisation, processes = self.options.optimisation, join_processes().num_processes
        return optimisation.train_batch_size * optimisation.gradient_accumulation_steps * processes

    @property
    def finished(self) -> bool:
        """Whether all steps were taken and the last one was validated."""
        checkpoints = list_checkpoints(self.folder)
        if not checkpoints or not (self.folder / "pipeline").is_dir():
            return False
        last = checkpoints[-1]
        return checkpoint_step(last) == self.num_steps and (last / VALIDATED).exists()

    def check_started(self, num_images: int, class_names: list[str] | None) -> None:
        """
        Checks that an earlier command, if it began this run, would have had the same results.

        Args:
            num_images: Number of training images.
            class_names: Names of the classes, or `None` for an unconditional UNet.

        Raises:
            ValueError: If the run was begun with other options, from another model, with other images or by other processes.
        """
        for checkpoint in list_checkpoints(self.folder)[-1:]:
            text = (checkpoint / "options.yaml").read_text(encoding="utf-8")
            now, then = option_values(self.options), read_table(text, "options.yaml")
            differing = contradictions(self.options, text, exact=True)
            differing += [
                f"--{name} {now[name]} (was {then[name]})" for name in PRETRAINED if now[name] != then.get(name)
            ]
            if differing:
                raise ValueError(
                    f"{self.folder} was begun with other options: {', '.join(differing)}. Pass the same options, or another"
                    " --output."
                )
            progress = read_progress(checkpoint)
            if (progress["num_images"], progress["class_names"]) != (num_images, class_names):
                raise ValueError(
                    f"{self.folder} was begun with {progress['num_images']} images of the classes {progress['class_names']}, but got"
                    f" {num_images} images of {class_names}. Pass the same images, or another --output."
                )
            num_processes = progress["num_processes"]
            if self.options.optimisation.total_batch_size is None and num_processes != join_processes().num_processes:
                raise ValueError(
                    f"{self.folder} was begun by {num_processes} processes. Launch as many, because each step has"
                    " --train_batch_size images per process."
                )

    def train(self) -> None:
        """
        Trains up to the last step, from the latest checkpoint if there is one.

        Raises:
            KeyboardInterrupt: If the run was asked to stop. Its checkpoint is saved.
            ValueError: If the run fails, for example because the loss is not finite.
        """
        if self.options.optimisation.compile:
            torch.compiler.reset()  # the code of a UNet is compiled only for some architectures in a process
        try:
            train_unet.main(self.options)
        except RunFailed as error:
            raise ValueError(f"Variant {self.variant} with seed {self.seed} failed: {error}") from error
        if not self.finished:
            join_processes().print("Run the same ablate command again to continue.", flush=True)
            raise KeyboardInterrupt


@dataclass(frozen=True)
class AblationSamples:
    """
    Samples to draw from each run.

    Args:
        num_images: Number of images per run.
        batch_size: Number of images per batch.
        labels: Labels of the images, see [`draw_samples`].
        scheduler: Name of the scheduler, or `None` for the pipeline's.
        call: Arguments of the pipeline's call.
    """

    num_images: int
    batch_size: int
    labels: str
    scheduler: str | None
    call: dict[str, Any]


def read_variants(path: Path) -> dict[str, dict[str, Any]]:
    """
    Reads a YAML or JSON file of variants: a table of names, each with a table of options of `train_unet`.

    Raises:
        ValueError: If the file has another form, a name cannot name a folder, or an option does not exist or must be equal for all
            variants.
    """
    source = f"--variants {path}"
    if not path.is_file():
        raise ValueError(f"--variants must be a file, but there is no file {path}.")
    variants = read_table(path.read_text(encoding="utf-8"), source)
    known = options_of(UNetTrainingOptions)
    free = _free_options()
    for name, changes in variants.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{source}: names must be texts of letters, digits and any of _.+-, but got {name!r}.")
        if not isinstance(changes, dict):
            raise ValueError(f"{source}: {name} must be a table of options, {{}} for none, but got {changes!r}.")
        for option in changes:
            if option not in known:
                raise ValueError(
                    f"{source}: {name} has an unknown option {option!r}{suggest_nearest(str(option), known)}"
                )
            if option not in free:
                raise ValueError(f"{source}: {name} changes {option}, which must be equal for all variants.")
    if len(variants) < 2:
        raise ValueError(f"{source} must have at least 2 variants, but has {len(variants)}.")
    return variants


def _free_options() -> set[str]:
    groups = [field for field in fields(UNetTrainingOptions) if "group" in field.metadata]
    varied = [field.metadata["group"].options for field in groups if field.name not in EQUAL_GROUPS]
    free = set().union(*(options_of(options) for options in varied if options is not OptimisationOptions), FREE)
    return free - {"class_conditional"}


def plan_runs(
    base: UNetTrainingOptions, variants: dict[str, dict[str, Any]], seeds: tuple[int, ...], output: Path
) -> list[AblationRun]:
    """
    Returns the runs in their order: all variants with the first seed, then all with the next seed.

    Args:
        base: Options that all runs share.
        variants: Options that each variant changes.
        seeds: Seeds.
        output: Folder of all runs.

    Raises:
        ValueError: If the options of a variant contradict each other.
    """
    # Options that the base's preset sets are given one by one, because a variant may unset them.
    shared = (
        option_values(base) | dict.fromkeys(("preset", "config", "num_epochs")) | {"resume_from_checkpoint": "latest"}
    )
    runs = []
    for seed in seeds:
        for name, changes in variants.items():
            folder = output / name / f"seed-{seed}"
            table = {**shared, **changes, "seed": seed, "output_dir": str(folder)}
            options = train_unet.parse_args(table_as_words(UNetTrainingOptions, table, f"Variant {name}"))
            divide_batch(options.optimisation, join_processes().num_processes)
            runs.append(AblationRun(name, seed, options))
    return runs


def check_runs(
    runs: list[AblationRun], num_images: int, class_names: list[str] | None, samples: AblationSamples
) -> dict[str, ADMUNet2DModel]:
    """
    Checks that all UNets can be built and sampled from, and that no run was begun with other options.

    Args:
        runs: Runs to check.
        num_images: Number of training images.
        class_names: Names of the classes, or `None` for unconditional UNets.
        samples: Samples to draw from each run.

    Returns:
        UNet of each variant on the meta device, which stores no weights.

    Raises:
        ValueError: If a variant or a run does not pass. The message names it.
    """
    unets = {}
    for run in runs:
        run.check_started(num_images, class_names)
        if run.variant in unets:
            continue
        try:
            with torch.device("meta"):
                unet = build_unet(run.options, len(class_names) if class_names else None).eval()
            if not list_checkpoints(run.folder):
                check_pretrained(unet, run.options.architecture)
            pipeline = drawing_pipeline(run, unet, samples, class_names)
            options = run_options(pipeline, samples.call)
            Labels(samples.labels, pipeline, options, run.seed, samples.num_images)
        except ValueError as error:
            raise ValueError(f"Variant {run.variant}: {error}") from error
        unets[run.variant] = unet
    return unets


def drawing_pipeline(
    run: AblationRun, unet: ADMUNet2DModel, samples: AblationSamples, class_names: list[str] | None = None
) -> ClassifierGuidedPipeline:
    """Returns the pipeline that draws the samples of a run. Its arguments are those of `check_runs`, and a UNet."""
    id2label = dict(enumerate(class_names)) if class_names else None
    pipeline = ClassifierGuidedPipeline(unet, id2label=id2label, **sampling_defaults(run.options))
    set_scheduler(pipeline, samples.scheduler)
    return pipeline


def describe_budget(run: AblationRun) -> str:
    """Returns a sentence about the budget that all runs have."""
    return f"All runs have {run.num_steps} steps of {run.images_per_step} images."
