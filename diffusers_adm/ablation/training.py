"""Trainings of an ablation, one after the other, and the evaluation of their samples."""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from diffusers_adm.ablation.results import write_results
from diffusers_adm.ablation.runs import AblationRun, AblationSamples, describe_budget
from diffusers_adm.command_line import noted_failure
from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.launch import join_processes
from diffusers_adm.training.metrics import read_metrics


def run_ablation(
    runs: list[AblationRun],
    costs: dict[str, dict[str, int]],
    folder: Path,
    samples: AblationSamples,
    evaluate: Callable[[Path], dict] | None,
) -> None:
    """
    Trains, samples and evaluates each run, and writes tables and plots after each. Finished parts of an earlier call are kept. All
    launched processes train and draw, and the main process evaluates. With one process, a run that fails does not stop the others.

    Args:
        runs: Runs in their order.
        costs: Number of parameters and of multiplications and additions (MACs) per image of each variant.
        folder: Folder of the results, on a disk that all processes can read and write.
        samples: Samples to draw.
        evaluate: [`PointEvaluator`] of the main process.

    Raises:
        ValueError: If runs failed. With one process, all other runs have been finished.
        KeyboardInterrupt: If a training was asked to stop.
    """
    state = join_processes()
    results: list[dict] = []
    failures: list[str] = []
    for number, run in enumerate(runs):
        if state.is_main_process:
            print(f"Run {number + 1} of {len(runs)}: {run.variant}, seed {run.seed}", flush=True)
        trained = not run.finished
        with noted_failure(f"{run.variant} with seed {run.seed}", failures, alone=state.num_processes == 1):
            if trained:
                run.train()
            state.wait_for_everyone()
            drawn = draw_from_run(run, samples)
            if state.is_main_process:
                evaluation = evaluate(drawn)
                metrics, curve = training_metrics(run)
                metrics = {**evaluation["metrics"], **metrics}
                results.append({"variant": run.variant, "seed": run.seed, "metrics": metrics, "loss_curve": curve})
                about = {"budget": describe_budget(run), "settings": evaluation["settings"]}
                if trained:  # otherwise, the files of an earlier call already have this run
                    write_results(folder, results, costs, about)
        state.wait_for_everyone()
    if results:
        write_results(folder, results, costs, about)
    if failures:
        others = f" All others are in {folder}." if results else ""
        raise ValueError(f"{len(failures)} of {len(runs)} runs failed: {', '.join(failures)}.{others}")


def draw_from_run(run: AblationRun, samples: AblationSamples) -> Path:
    """Draws the samples of a finished training, and returns the path of their file."""
    # TF32 is an option of the training. Samples are drawn without it, also by a command that continues.
    torch.backends.cuda.matmul.allow_tf32 = False
    pipeline = load_pipeline(run.folder / "pipeline", device=join_processes().device)
    set_scheduler(pipeline, samples.scheduler)
    return draw_samples(
        pipeline,
        run.folder / "evaluation",
        samples.num_images,
        samples.batch_size,
        seed=run.seed,
        labels=samples.labels,
        call=samples.call,
        model_name=f"{run.variant}-seed-{run.seed}",
    )


def training_metrics(run: AblationRun) -> tuple[dict[str, float], list[list[float]]]:
    """
    Returns the last held-out loss and the training time in seconds, where they are known, and the held-out loss at each validation as
    pairs of a step and a loss. The time is that of the median speed. It excludes validations, checkpoints and interruptions.
    """
    entries = read_metrics(run.folder / "metrics.jsonl")
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    curve = [[entry["step"], entry["validation_loss"]] for entry in entries if "validation_loss" in entry]
    values = {}
    if speeds:
        values["train_seconds"] = run.num_steps * run.images_per_step / statistics.median(speeds)
    if curve:
        values["validation_loss"] = curve[-1][1]
    return values, curve
