"""The card of a trained model, and its way to the Hub."""

import argparse
import shutil
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from diffusers_adm.hub.cards import KINDS, PIPELINE_TAGS, usage
from diffusers_adm.hub.saved_files import CODE_PATTERNS
from diffusers_adm.training.arguments import as_options
from diffusers_adm.training.metrics import read_metrics


logger = get_logger(__name__)

# What a push holds: no training state and no raw weights.
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


def check_hub(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """
    Makes the repository before the first step, and asks whether it can be written to, so that what the Hub refuses is known
    then.

    Raises:
        ValueError: If there is no id, no token, or the Hub refuses it.
    """
    if not args.push_to_hub or not accelerator.is_main_process:
        return
    if args.hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id, such as me/my-model.")
    try:
        api = HfApi(token=args.hub_token)
        repo_id = api.create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        if args.hub_revision is not None:
            api.create_branch(repo_id, branch=args.hub_revision, exist_ok=True)
    except Exception as error:  # of the Hub, its client or the network
        raise ValueError(
            f"--push_to_hub: the Hub refuses --hub_model_id {args.hub_model_id}: log in by `hf auth login` or give"
            f" --hub_token ({' '.join(str(error).split())})."
        ) from error


def publish(args: argparse.Namespace, folder: Path) -> bool:
    """
    Uploads a folder, some times over if need be. Whether it arrived; if not, a message says how to do it by hand.

    Args:
        args: Of the script.
        folder: What `save_pretrained` has written, and its card.
    """
    for attempt in range(ATTEMPTS):
        try:
            HfApi(token=args.hub_token).upload_folder(
                repo_id=args.hub_model_id,
                folder_path=folder,
                revision=args.hub_revision,
                allow_patterns=PUBLISHED,
                delete_patterns=CODE_PATTERNS,
                commit_message=f"Upload {folder.name}",
            )
        except Exception as error:  # whatever the Hub, its client and the network come up with
            logger.warning("Push %d of %d to %s failed: %s", attempt + 1, ATTEMPTS, args.hub_model_id, error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(args.hub_retry_seconds * 2**attempt)
        else:
            return True
    kept = args.output_dir / folder.name
    logger.error("Nothing is lost: push it by `hf upload %s %s`.", args.hub_model_id, kept)
    return False


class BackgroundPush:
    """
    Uploads what a run has so far, while it goes on.

    Args:
        args: As of `publish`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """Uploads a folder as it is now; not if the push before is still under way."""
        if self.thread is not None and self.thread.is_alive():
            logger.warning("The push before is still under way: this one is left out.")
            return
        copies = folder.parent / "partial-push"
        shutil.rmtree(copies, ignore_errors=True)  # of a run that was killed
        copy = shutil.copytree(folder, copies / folder.name)  # the run writes the folder anew

        def push() -> None:
            publish(self.args, copy)
            shutil.rmtree(copies, ignore_errors=True)

        # A daemon: a run that is stopped does not wait for the Hub.
        self.thread = threading.Thread(target=push, daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Waits for the push that is under way, lest it comes after the next."""
        if self.thread is not None:
            self.thread.join()


def write_card(
    args: argparse.Namespace,
    accelerator: Accelerator,
    folder: Path,
    class_name: str,
    num_images: int | None,
    classes: list[str] | None,
    steps: int,
) -> None:
    """
    Writes `README.md` into a model's folder, from the run's own facts, and the last grid beside it.

    Args:
        args: Parsed options.
        accelerator: Of the run.
        folder: What `save_pretrained` has written.
        class_name: Of what was saved: "ClassifierGuidedPipeline", "ADMUpsamplePipeline" or "NoisyClassifier".
        num_images: Trained on; `None` for a stream.
        classes: Their names.
        steps: That were taken.
    """
    metrics: dict[str, float] = {}
    for entry in read_metrics(args.output_dir / "metrics.jsonl"):
        metrics.update(entry)
    metrics.pop("step", None)
    name = (args.hub_model_id or args.output_dir.name).split("/")[-1]
    dataset = args.dataset_name or Path(args.train_data_dir).name
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=f"accuracy on held-out images, quarter {metric[-1]} of the timesteps (0: least noise)",
            metric_value=value,
        )
        for metric, value in metrics.items()
        if metric.startswith("validation_accuracy_quarter_")
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[class_name],
        tags=["adm", "guided-diffusion", "classifier-guidance", "diffusers-training"],
        datasets=_hub_id(args.dataset_name),
        base_model=_hub_id(args.pretrained_model_name_or_path),
        model_name=name,
        eval_results=results or None,
    )
    grids = sorted((args.output_dir / "samples").glob("step-*.png"), key=lambda path: path.stat().st_mtime)
    picture = ""
    if grids:
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(grids[-1], folder / "samples" / "grid.png")
        picture = (
            "\n![Drawn with the moving average of the weights, and right of it with the weights.](samples/grid.png)\n"
        )
    identity = f'"{args.hub_model_id or folder.name}"'
    if args.hub_revision is not None:
        identity += f', revision="{args.hub_revision}"'
    call = {
        "ClassifierGuidedPipeline": "image = model().images[0]",
        "ADMUpsamplePipeline": f'image = model("small.png"{"" if classes is None else f", class_labels=[{classes[0]!r}]"}).images[0]',
        "NoisyClassifier": "logits = model(noised_images, timestep).logits",
    }[class_name]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type.upper()
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    figures = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
    options = " ".join(as_options(args))
    classes_line = (
        "No classes."
        if classes is None
        else f"{len(classes)} classes: {', '.join(classes[:20])}" + (", ..." if len(classes) > 20 else ".")
    )
    body = f"""# {name}

{KINDS[class_name]} of the ADM family
([Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233)), trained by `diffusers_adm`.
{picture}
{usage(class_name, identity, call)}

## Training

{"A stream of images" if num_images is None else f"{num_images} images"} of {args.resolution}x{args.resolution} pixels from `{dataset}`. {classes_line}
{steps} steps of {batch} images, on {accelerator.num_processes} x {device}, precision
`{accelerator.mixed_precision}`, with these options:

```
{options}
```

| after these steps | |
| --- | --- |
{figures}

## Limits

The model knows its training images alone: it repeats their biases and mistakes, and may repeat some of the images. It was made for
research on generative models; nobody has examined whether it is fit for anything else, and it should not be used to depict people or
to deceive.
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")


def _hub_id(name: str | None) -> str | None:
    """A name, unless it is of a folder or of a format of files."""
    return name if name is not None and "/" in name and not Path(name).exists() else None
