"""Model card of a trained model, and upload to the Hub."""

import shutil
import threading
import time
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from diffusers_adm.atomic_files import atomic_write
from diffusers_adm.hub.cards import KINDS, PIPELINE_TAGS, TAGS, example_call, usage
from diffusers_adm.hub.upload import replaced_files
from diffusers_adm.training.configuration import as_command_line
from diffusers_adm.training.metrics import NUM_QUARTERS, read_metrics
from diffusers_adm.training.options import TrainingOptions
from diffusers_adm.training.output_options import HubOptions
from diffusers_adm.training.plan import device_name, images_per_step


logger = get_logger(__name__)

# Files that are uploaded. Training state and raw weights are left out.
PUBLISHED = [
    "README.md",
    "model_index.json",
    "*.py",
    "*/*.py",
    "*.json",
    "*/*.json",
    "*.safetensors",
    "*/*.safetensors",
    "samples/*",
]
ATTEMPTS = 3
# Next step of the user, by the class that was saved.
NEXT_STEPS = {
    "ClassifierGuidedPipeline": "diffusers-adm sample --model {folder} --num_samples 16 --batch_size 16 --output {run}/drawn",
    "ADMUpsamplePipeline": "diffusers-adm sample --model {folder} --low_res SMALL.npz --num_samples 16 --batch_size 16 --output {run}/drawn",
    "NoisyClassifier": 'ClassifierGuidedPipeline.from_pretrained("UNET/pipeline",'
    ' classifier=NoisyClassifier.from_pretrained("{folder}"))',
}


def check_hub(hub: HubOptions, accelerator: Accelerator, dry_run: bool) -> None:
    """
    Creates the repository before the first step, and checks that it can be written to.

    Args:
        hub: Repository and token.
        accelerator: Accelerator of the run.
        dry_run: Whether to check only the token, without creating anything.

    Raises:
        ValueError: If there is no token, or the Hub refuses the repository.
    """
    if not hub.push_to_hub or not accelerator.is_main_process:
        return
    try:
        api = HfApi(token=hub.hub_token)
        if dry_run:
            api.whoami()
            return
        # Without --hub_private_repo, the settings of the account or organisation decide.
        private = True if hub.hub_private_repo else None
        repo_id = api.create_repo(hub.hub_model_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        if hub.hub_revision is not None:
            api.create_branch(repo_id, branch=hub.hub_revision, exist_ok=True)
    except Exception as error:  # the Hub, its client and the network raise many types
        raise ValueError(
            f"The Hub refuses --hub_model_id {hub.hub_model_id}, or cannot be reached ({' '.join(str(error).split())}). Check the"
            " network, and log in with `hf auth login` or pass --hub_token."
        ) from error


def publish(hub: HubOptions, folder: Path, output_dir: Path) -> bool:
    """
    Uploads a folder in up to three attempts. If all fail, a message gives the command that uploads it.

    Args:
        hub: Repository and token.
        folder: Folder that `save_pretrained` has written, with its model card.
        output_dir: Folder of the run. It keeps a folder of the same name.

    Returns:
        Whether the folder was uploaded.
    """
    for attempt in range(ATTEMPTS):
        try:
            HfApi(token=hub.hub_token).upload_folder(
                repo_id=hub.hub_model_id,
                folder_path=folder,
                revision=hub.hub_revision,
                allow_patterns=PUBLISHED,
                delete_patterns=replaced_files(folder),
                commit_message=f"Upload {folder.name}",
            )
        except Exception as error:  # the Hub, its client and the network raise many types
            logger.warning("Upload attempt %d of %d to %s failed: %s", attempt + 1, ATTEMPTS, hub.hub_model_id, error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(hub.hub_retry_seconds * 2**attempt)
        else:
            return True
    revision = "" if hub.hub_revision is None else f" --revision {hub.hub_revision}"
    logger.error(
        "The upload failed, but the files are kept. Upload them with `hf upload %s %s%s`.",
        hub.hub_model_id, output_dir / folder.name, revision,
    )  # fmt: skip
    return False


class BackgroundPush:
    """
    Uploads a folder of a run in the background.

    Args:
        hub: Repository and token.
        output_dir: Folder of the run.
    """

    def __init__(self, hub: HubOptions, output_dir: Path):
        self.hub = hub
        self.output_dir = output_dir
        self.thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """Uploads the current content of a folder, unless the previous upload is still running."""
        if self.thread is not None and self.thread.is_alive():
            logger.warning("The previous upload is still running, so this one is skipped.")
            return
        copies = self.output_dir / "partial-push"
        shutil.rmtree(copies, ignore_errors=True)  # left by a killed run
        copy = shutil.copytree(folder, copies / folder.name)  # the run may overwrite the folder during the upload

        def push() -> None:
            publish(self.hub, copy, self.output_dir)
            shutil.rmtree(copies, ignore_errors=True)

        # A daemon thread, so that a run that is stopped does not wait for the Hub.
        self.thread = threading.Thread(target=push, daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Waits for the running upload, which must end before the next one begins."""
        if self.thread is not None:
            self.thread.join()


def print_results(run: Path, folder: Path, class_name: str) -> None:
    """
    Prints the paths of the results of a run, and the next command.

    Args:
        run: Folder of the run.
        folder: Folder of the trained model.
        class_name: Class that was saved, see [`write_card`].
    """
    results = {
        "model": folder,
        "model card": folder / "README.md",
        "metrics": run / "metrics.jsonl",
        "pictures": run / "samples",
    }
    for name, path in results.items():
        if path.exists():
            print(f"{name + ':':<13}{path}")
    print(f"{'next:':<13}{NEXT_STEPS[class_name].format(folder=folder, run=run)}", flush=True)


def write_card(
    options: TrainingOptions,
    accelerator: Accelerator,
    folder: Path,
    class_name: str,
    num_images: int | None,
    classes: list[str] | None,
    steps: int,
) -> None:
    """
    Writes the model card `README.md` into the folder of a model, from the facts of the run. Adds the sample grid of the last step.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run.
        folder: Folder that `save_pretrained` has written.
        class_name: Class that was saved: "ClassifierGuidedPipeline", "ADMUpsamplePipeline" or "NoisyClassifier".
        num_images: Number of training images, or `None` for a stream.
        classes: Names of the classes, or `None` without labels.
        steps: Number of optimizer steps of the run.
    """
    metrics: dict[str, float] = {}
    for entry in read_metrics(options.output.output_dir / "metrics.jsonl"):
        metrics.update(entry)
    for name in ("step", "time"):
        metrics.pop(name, None)
    hub = options.hub
    name = (hub.hub_model_id or options.output.output_dir.name).split("/")[-1]
    dataset = _without_folders(options.source.dataset_name or options.source.train_data_dir)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[class_name],
        tags=[*TAGS, "diffusers-training"],
        datasets=_hub_id(options.source.dataset_name),
        base_model=_hub_id(options.architecture.pretrained_model_name_or_path),
        model_name=name,
        eval_results=_held_out_results(metrics, dataset) or None,
    )
    identity = f'"{hub.hub_model_id or "path/to/this/folder"}"'
    if hub.hub_revision is not None:
        identity += f', revision="{hub.hub_revision}"'
    body = f"""# {name}

{KINDS[class_name]} of the ADM family
([Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233)), trained by `diffusers_adm`.
{_add_picture(options.output.output_dir / "samples" / f"step-{steps}.png", folder)}
{usage(class_name, identity, example_call(class_name, None if classes is None else classes[0]))}

{_describe_training(options, accelerator, num_images, classes, steps, metrics)}

## Limits

The model reproduces the biases and errors of its training images, and may reproduce some of the images. It was made for research on
generative models, and has not been evaluated for any other use. Do not use it to depict people or to deceive.
"""
    with atomic_write(folder / "README.md") as partial:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(partial)


def _held_out_results(metrics: dict[str, float], dataset: str) -> list[EvalResult]:
    prefix = "validation_accuracy"
    names = {prefix: "accuracy on held-out images, all timesteps"}
    for quarter in range(NUM_QUARTERS):
        name = f"accuracy on held-out images, quarter {quarter} of the timesteps (0: least noise)"
        names[f"{prefix}_quarter_{quarter}"] = name
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=name,
            metric_value=metrics[metric],
        )
        for metric, name in names.items()
        if metric in metrics
    ]


def _add_picture(grid: Path, folder: Path) -> str:
    """Copies a sample grid, if it was drawn, to the folder of a model. Returns the part of the card that shows it."""
    if not grid.exists():
        return ""
    (folder / "samples").mkdir(exist_ok=True)
    shutil.copyfile(grid, folder / "samples" / "grid.png")
    return (
        "\n![Images of the averaged weights on the left, and of the current weights on the right.](samples/grid.png)\n"
    )


def _describe_training(
    options: TrainingOptions,
    accelerator: Accelerator,
    num_images: int | None,
    classes: list[str] | None,
    steps: int,
    metrics: dict[str, float],
) -> str:
    """Returns the part of the model card about data, length, options and metrics of a run."""
    images = "A stream of images" if num_images is None else f"{num_images} images"
    dataset = _without_folders(options.source.dataset_name or options.source.train_data_dir)
    optimisation, resolution = options.optimisation, options.format.resolution
    rows = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
    classes_line = (
        "No classes."
        if classes is None
        else f"{len(classes)} classes: {', '.join(classes[:20])}" + (", ..." if len(classes) > 20 else ".")
    )
    return f"""## Training

{images} of {resolution}x{resolution} pixels from `{dataset}`. {classes_line} {_describe_start(options)}
{steps} steps of {images_per_step(optimisation, accelerator)} images, on {accelerator.num_processes} x {device_name(accelerator)}, precision
`{accelerator.mixed_precision}`, with these options:

```
{" ".join(as_command_line(options))}
```

| metric after the last step | value |
| --- | --- |
{rows}"""


def _describe_start(options: TrainingOptions) -> str:
    """Returns a sentence about the weights that training started from, if the options name any."""
    name = options.architecture.pretrained_model_name_or_path
    if name is None:  # random weights, or a resumed run without the option
        return ""
    return f"Training started from the weights of `{_without_folders(name)}`, whose license applies too."


def _without_folders(name: str) -> str:
    """Returns the name of a dataset or model. Of a path, it is the last part, because cards name no folders of the machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def _hub_id(name: str | None) -> str | None:
    """Returns a name if it is an id on the Hub, or `None` for a folder or a file format."""
    return name if name is not None and "/" in name and not Path(name).exists() else None
