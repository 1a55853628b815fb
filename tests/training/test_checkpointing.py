"""Checkpoints: which are kept, which are refused, and what a resumed run may change."""

import json
import shutil

import pytest
from PIL import Image
from training_runs import ARCHITECTURE, classifier_args, unet_args

from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.checkpoint_folders import checkpoint_step, list_checkpoints
from diffusers_adm.training.checkpointing import VALIDATED, remove_old_checkpoints
from diffusers_adm.training.metrics import read_metrics


def test_used_output_folder_is_not_written_over(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 3))
    with pytest.raises(ValueError, match="resume_from_checkpoint latest"):
        train_classifier.main(classifier_args(dataset, tmp_path, 3))


def test_old_checkpoints_are_removed_only_up_to_the_limit(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 9, "--checkpoints_total_limit", "2"))
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-6", "checkpoint-9"]


def test_dry_run_of_a_finished_run_prints_its_plan(dataset, tmp_path, capsys):
    train_unet.main(unet_args(dataset, tmp_path, 1))
    train_unet.main(unet_args(dataset, tmp_path, 1, "--resume_from_checkpoint", "latest", "--dry_run"))
    assert "million parameters" in capsys.readouterr().out


def test_resumed_run_must_be_the_same_run(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    resume = ["--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"--dropout 0.1 \(was 0.0\), --seed 1 \(was 0\)"):
        train_unet.main(unet_args(dataset, tmp_path, 6, *resume, "--seed", "1", "--dropout", "0.1"))
    # A learning rate may change, and does.
    train_unet.main(unet_args(dataset, tmp_path, 4, *resume, "--learning_rate", "1e-4"))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["learning_rate"] for entry in entries] == [1e-3, 1e-3, 1e-3, 1e-4]


def test_steps_that_are_taken_again_are_logged_once(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 5))
    shutil.rmtree(tmp_path / "checkpoint-5")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]


def test_incomplete_checkpoint_is_refused(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    (tmp_path / "checkpoint-3" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match="files are missing: optimizer.bin"):
        train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))


def test_what_a_killed_run_left_half_written_is_removed(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    for name in ("old-pipeline", "old-checkpoint-3", "partial-checkpoint-9", "partial-pipeline-ema-0.9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "partial-another-node-7-metrics.jsonl").write_text("")
    (tmp_path / "samples" / "partial-another-node-7-step-3.png").write_text("")
    kept = [tmp_path / name for name in ("checkpoint-3-copy", "old-pictures", "old-run-7-b")]
    for folder in kept:
        folder.mkdir()
    train_unet.main(unet_args(dataset, tmp_path, 6, "--resume_from_checkpoint", "latest"))
    assert {*tmp_path.rglob("old-*"), *tmp_path.rglob("partial-*")} == set(kept[1:])
    assert all(folder.exists() for folder in kept)


def test_folder_that_a_killed_run_was_replacing_gets_its_name_back(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    (tmp_path / "pipeline").rename(tmp_path / "old-pipeline")
    with pytest.raises(ValueError, match="holds checkpoint-3 of an earlier run"):
        train_unet.main(unet_args(dataset, tmp_path, 3))
    assert (tmp_path / "pipeline" / "model_index.json").exists() and not (tmp_path / "old-pipeline").exists()


def test_going_back_to_an_earlier_checkpoint_keeps_the_later_ones(dataset, tmp_path):
    run, often = tmp_path / "run", ["--checkpointing_steps", "1", "--checkpoints_total_limit", "3"]
    train_unet.main(unet_args(dataset, run, 3, *often))
    resume = ["--resume_from_checkpoint", str(run / "checkpoint-1")]
    before = sorted(run.rglob("*"))
    with pytest.raises(
        ValueError, match="holds later checkpoints than checkpoint-1: checkpoint-2, checkpoint-3. Move"
    ):
        train_unet.main(unet_args(dataset, run, 3, *often, *resume))
    with pytest.raises(
        ValueError, match="--max_train_steps must be at least 3, the step of .*checkpoint-3, but got 2"
    ):
        train_unet.main(unet_args(dataset, run, 2, *often, "--resume_from_checkpoint", "latest"))
    train_unet.main(unet_args(dataset, tmp_path / "other", 1))
    with pytest.raises(ValueError, match="other holds checkpoint-1 of an earlier run"):
        train_unet.main(unet_args(dataset, tmp_path / "other", 3, *often, *resume))
    assert sorted(run.rglob("*")) == before
    train_unet.main(unet_args(dataset, tmp_path / "new", 3, *often, *resume))
    assert (tmp_path / "new" / "pipeline").is_dir()
    copy = shutil.copytree(run / "checkpoint-3", run / "best")
    train_unet.main(unet_args(dataset, run, 4, *often, "--resume_from_checkpoint", str(copy)))
    assert (run / "checkpoint-4").is_dir()


def test_a_run_that_goes_on_in_another_folder_has_its_checkpoint_there(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path / "old", 3))
    (tmp_path / "old" / "checkpoint-3" / VALIDATED).unlink()
    new = tmp_path / "new"
    new.mkdir()
    (new / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 77.0}\n')  # of another run
    resume = ["--resume_from_checkpoint", str(tmp_path / "old" / "checkpoint-3")]
    train_unet.main(unet_args(dataset, new, 3, *resume))
    assert (new / "checkpoint-3" / VALIDATED).exists() and (new / "metrics-1.jsonl").exists()
    assert "77" not in (new / "pipeline" / "README.md").read_text()
    train_unet.main(unet_args(dataset, new, 4, "--resume_from_checkpoint", "latest"))
    assert [entry["step"] for entry in read_metrics(new / "metrics.jsonl")] == [4]


def test_an_image_that_cannot_be_read_loses_no_steps(tmp_path):
    for number in range(40):
        folder = tmp_path / "images" / ("left", "right")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 12), number).save(folder / f"{number}.png")
    damaged = tmp_path / "images" / "left" / "20.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40])
    options = f"--train_data_dir {tmp_path / 'images'} --output_dir {tmp_path / 'run'} --max_train_steps 10 --ema_decay 0.5".split()
    options += [
        *ARCHITECTURE,
        *"--checkpointing_steps 100 --num_validation_images 4 --label_dropout 0.3 --seed 1".split(),
    ]
    with pytest.raises(ValueError, match="20.png"):
        train_unet.main(train_unet.parse_args(options))
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert 0 < checkpoint_step(checkpoint) < 10
    damaged.write_bytes(whole)
    train_unet.main(train_unet.parse_args([*options, "--resume_from_checkpoint", "latest"]))
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_new_run_does_not_mix_with_an_earlier_one_or_replace_its_model(dataset, tmp_path):
    train_unet.main(unet_args(dataset, tmp_path, 3))
    shutil.rmtree(tmp_path / "checkpoint-3")
    for resume in ([], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(ValueError, match="holds pipeline of an earlier run, but no checkpoint. Move it away"):
            train_unet.main(unet_args(dataset, tmp_path, 1, *resume))
    shutil.rmtree(tmp_path / "pipeline")
    earlier = (tmp_path / "metrics.jsonl").read_bytes()
    train_unet.main(unet_args(dataset, tmp_path, 1))
    assert (tmp_path / "metrics-1.jsonl").read_bytes() == earlier
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert sorted(path.name for path in tmp_path.glob("samples*/*")) == ["step-1.png", "step-3.png"]
    assert (tmp_path / "samples-1" / "step-3.png").exists()


def test_multiples_of_keep_every_are_kept_for_good(tmp_path):
    for step in (5, 10, 15, 20, 25):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old_checkpoints(tmp_path, limit=1, keep_every=10)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [10, 20, 25]


def test_other_classes_are_refused_by_name(dataset, tmp_path):
    train_classifier.main(classifier_args(dataset, tmp_path, 3))
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    resumed = classifier_args(dataset, tmp_path, 4, "--resume_from_checkpoint", "latest")
    for names, message in (
        (["down", "left"], r"without \['down'\] and with new \['right'\]"),
        (["left"], r"with new \['right'\]"),
        (["right", "left"], "in another order"),
    ):
        file.write_text(json.dumps({**state, "class_names": names}))
        with pytest.raises(ValueError, match=message):
            train_classifier.main(resumed)
    del state["class_names"]  # a checkpoint of an older version
    file.write_text(json.dumps(state))
    train_classifier.main(resumed)
