"""Stored paths of a teacher."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import SMALL_CONSISTENCY_RUN, checkpoint_tensors, consistency_args

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.denoiser import Denoiser
from diffusers_adm.training import train_consistency
from diffusers_adm.training.consistency import Teacher
from diffusers_adm.training.setup import load_training_images, set_up_accelerator
from diffusers_adm.training.teacher_paths import StoredPaths, draw_paths


def test_stored_paths_are_drawn_once_and_resume_exactly(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), *"--teacher_steps 3 --num_paths 70 --guidance_scale 2".split()]
    train_consistency.main(consistency_args(dataset, start, tmp_path / "once", 4, *more))
    train_consistency.main(consistency_args(dataset, start, tmp_path / "twice", 3, *more))
    files = sorted((tmp_path / "twice" / "paths").glob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    train_consistency.main(
        consistency_args(dataset, start, tmp_path / "twice", 4, *more, "--resume_from_checkpoint", "latest")
    )
    assert len(files) == 2 and [file.stat().st_mtime_ns for file in files] == written
    once, twice = (checkpoint_tensors(tmp_path / name / "checkpoint-4") for name in ("once", "twice"))
    assert once and all(torch.equal(once[name][key], twice[name][key]) for name in once for key in once[name])

    first_rows, other_rows = (load_file(file)["label"][:6] for file in files)
    assert not torch.equal(first_rows, other_rows)  # each file draws its own images
    paths = StoredPaths([load_file(file) for file in files], ["left", "right"])
    assert len(paths) == paths.num_images == 70 * 3
    sigma = torch.stack([paths[index]["sigma"] for index in range(3)])
    assert (sigma.diff() < 0).all() and all(torch.equal(paths[i]["target"], paths[0]["target"]) for i in (1, 2))
    # The first step leads from a point to the next one, by the guided prediction.
    denoiser = Denoiser(ClassifierGuidedPipeline.from_pretrained(start), guidance_scale=2.0, class_labels=0)
    first, second = paths[0], paths[1]
    x_0 = denoiser(first["image"][None], first["sigma"][None], first["label"][None])[0].clamp(-1, 1)
    share = second["sigma"] / first["sigma"]
    expected = share * first["image"] + (1 - share) * x_0
    torch.testing.assert_close(second["image"], expected.detach(), rtol=1e-2, atol=1e-2)  # stored in half precision

    assert "14 images of" in (tmp_path / "twice" / "pipeline" / "README.md").read_text()

    shutil.rmtree(tmp_path / "twice" / "checkpoint-3")
    shutil.rmtree(tmp_path / "twice" / "checkpoint-4")
    shutil.rmtree(tmp_path / "twice" / "pipeline")
    other = [word if word != "2" else "1" for word in more]
    with pytest.raises(ValueError, match=r"holds paths of other options: --guidance_scale 1.0 \(was 2.0\)"):
        train_consistency.main(consistency_args(dataset, start, tmp_path / "twice", 4, *other))


def test_paths_are_drawn_in_batches_of_the_training(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), *"--teacher_steps 2 --num_paths 6 --guidance_scale 2".split()]
    drawn = []
    for batch_size in (4, 6):
        folder = tmp_path / str(batch_size)
        options = consistency_args(dataset, start, folder, 1, *more, "--train_batch_size", str(batch_size))
        accelerator = set_up_accelerator(options)
        images, _ = load_training_images(options)
        teacher, sizes = Teacher(options, images, accelerator), []

        def counted(x, sigma, labels, teacher=teacher, sizes=sizes):
            sizes.append(len(x))
            return teacher(x, sigma, labels)

        counted.schedule = teacher.schedule
        drawn.append(draw_paths(options, images, counted, 0, 6, accelerator.device))
        assert sizes == ([4, 4, 2, 2] if batch_size == 4 else [6, 6])
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)  # stored in half precision


def test_stored_paths_begin_at_chosen_levels(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), *"--teacher_steps 3 --num_paths 5 --path_levels 80,2".split()]
    more += "--validation_split train --validation_steps 1 --learning_rate 0 --dropout 0.2".split()
    train_consistency.main(consistency_args(dataset, start, tmp_path, 2, *more))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (entry["validation_loss"] for entry in logged if "validation_loss" in entry)
    assert first == second > 0
    (held_out,) = (tmp_path / "paths").glob("held-out-*")
    assert load_file(held_out)["sigma"].tolist() == [[80, pytest.approx(0.002)], [2, pytest.approx(0.002)]]
    paths = StoredPaths([load_file(tmp_path / "paths" / "paths-00000.safetensors")], ["left", "right"])
    assert len(paths) == 5
    assert [paths[index]["sigma"].item() for index in range(5)] == [80, 2, 80, 2, 80]
    for index in range(5):
        assert 0.7 < paths[index]["image"].std() / (1 + paths[index]["sigma"] ** 2).sqrt() < 1.3
        assert paths[index]["target"].abs().max() < 1.1  # the path has been followed to its end
    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.config.num_inference_steps == 2
    pipeline([0])
    assert pipeline.scheduler.sigmas[:2].tolist() == pytest.approx([80, 2])
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be an integer in \[1, 3\]"):
        pipeline([0], num_inference_steps=4)


def remove_run(folder) -> None:
    """Removes what a run has saved, but not its paths."""
    for path in (*folder.glob("checkpoint-*"), folder / "pipeline"):
        shutil.rmtree(path)


def test_paths_depend_only_on_what_decides_them(dataset, start, tmp_path):
    teacher = shutil.copytree(start, tmp_path / "teacher")
    more = ["--teacher_model_name_or_path", str(teacher), "--num_paths", "4"]
    train_consistency.main(consistency_args(dataset, start, tmp_path, 1, *more))
    file = tmp_path / "paths" / "paths-00000.safetensors"
    written = file.stat().st_mtime_ns
    remove_run(tmp_path)
    with pytest.raises(ValueError, match="holds paths of other options: --guidance_scale 3.0"):
        train_consistency.main(
            consistency_args(dataset, start, tmp_path, 1, *more, "--guidance_scale", "3", "--dry_run")
        )
    others = "--train_batch_size 2 --ema_decay 0.9 --adam_beta2 0.9".split()
    train_consistency.main(consistency_args(dataset, start, tmp_path, 1, *more, *others))
    assert file.stat().st_mtime_ns == written

    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "--guidance_scale" in card  # the default of the teacher is named
    remove_run(tmp_path)
    for number in range(8):
        folder = tmp_path / "fewer" / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12)).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match="paths of other options: the number or the classes of the images"):
        train_consistency.main(consistency_args(tmp_path / "fewer", start, tmp_path, 1, *more, "--dry_run"))

    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="holds paths of other options: the teacher's weights or scheduler"):
        train_consistency.main(consistency_args(dataset, start, tmp_path, 1, *more, "--dry_run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--noise_embedding", "log_sigma"], "--noise_embedding must be timestep"),
        (["--max_train_steps", "2"], "holds checkpoint-1 of an earlier run"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_paths_are_drawn(more, message, dataset, start, tmp_path):
    run = tmp_path / "run"
    if "holds" in message:
        (run / "checkpoint-1").mkdir(parents=True)
    more = ["--teacher_model_name_or_path", str(start), "--num_paths", "4", *more]
    with pytest.raises(ValueError, match=message):
        train_consistency.main(consistency_args(dataset, start, run, 1, *more))
    assert not list(run.glob("paths/*"))


def test_paths_of_another_precision_are_refused(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), "--num_paths", "4"]
    train_consistency.main(consistency_args(dataset, start, tmp_path, 1, *more))
    record = tmp_path / "paths" / "options.yaml"
    record.write_text(record.read_text().replace("precision: 'no'", "precision: bf16"))
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match="paths of other options: the precision"):
        train_consistency.main(consistency_args(dataset, start, tmp_path, 2, *more, *resume))


def test_too_few_points_are_refused_before_paths_are_drawn(dataset, start, tmp_path):
    more = [
        "--teacher_model_name_or_path",
        str(start),
        *"--teacher_steps 3 --num_paths 2 --train_batch_size 8".split(),
    ]
    with pytest.raises(ValueError, match="--train_batch_size 8 on 1 processes requires at least 8 images, but got 6"):
        train_consistency.main(consistency_args(dataset, start, tmp_path / "run", 1, *more))
    assert not list(tmp_path.glob("run/paths/*"))


def test_dry_run_counts_points_of_paths(dataset, start, tmp_path, capsys):
    teacher = ["--teacher_model_name_or_path", str(start), "--teacher_steps", "3", "--dry_run"]
    train_consistency.main(
        consistency_args(dataset, start, tmp_path, 1, *teacher, *"--num_paths 8 --validation_split train".split())
    )
    plan = capsys.readouterr().out
    assert "24" in plan.split("images:")[1].split("\n")[0] and "measures losses on held-out images" in plan
    assert not any(tmp_path.iterdir())


def test_processes_share_the_drawing_of_paths(dataset, start, tmp_path):
    more = ["--teacher_model_name_or_path", str(start), *"--teacher_steps 3 --num_paths 130".split()]
    train_consistency.main(consistency_args(dataset, start, tmp_path / "alone", 1, *more))
    words = ["--dataset_name", dataset, "--pretrained_model_name_or_path", start, "--output_dir", tmp_path / "shared"]
    words += [*SMALL_CONSISTENCY_RUN, "--max_train_steps", 1, *more]
    script = Path(__file__).parents[1] / "helpers" / "path_drawing.py"
    two = f"-m torch.distributed.run --standalone --nproc_per_node 2 {script}".split()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *two, *map(str, words)], check=True, env=environment)
    alone, shared = (sorted((tmp_path / name / "paths").glob("*.safetensors")) for name in ("alone", "shared"))
    assert [file.name for file in alone] == [file.name for file in shared]
    for one, other in zip(alone, shared):
        ours, theirs = load_file(one), load_file(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Of the files of 64, 64 and 2 paths, the first process draws the first and the last.
    counts = [(tmp_path / "shared" / f"process-{index}.txt").read_text() for index in range(2)]
    assert counts == [f"{3 * 66} {130 * 3}", f"{3 * 64} {130 * 3}"]
