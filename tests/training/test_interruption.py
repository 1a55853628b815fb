"""Trainings that are killed, stopped or out of disk space end like undisturbed ones. They run as processes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from safetensors.torch import load_file
from training_runs import without_times

from diffusers_adm.training import train_classifier, train_unet, train_upsampler
from diffusers_adm.training.metrics import read_metrics


ARCHITECTURE = (
    "--resolution 16 --in_channels 1 --crop random --model_channels 8 --channel_mult 1,2 --layers_per_block 1"
    " --attention_resolutions 8 --attention_head_dim 8 --norm_num_groups 4 --noise_schedule cosine"
    " --train_batch_size 2 --logging_steps 1 --learning_rate 1e-3 --lr_scheduler constant --adam_weight_decay 0"
    " --checkpointing_steps 100000 --validation_steps 100000"
).split()
DENOISING = [*ARCHITECTURE, *"--ema_decay 0.5,0.9 --schedule_sampler loss-second-moment --label_dropout 0.3".split()]
OPTIONS = {
    train_unet: DENOISING,
    train_upsampler: [*DENOISING, *"--low_resolution 4 --low_res_noise 0.2".split()],
    train_classifier: ARCHITECTURE,
}
TIMEOUT = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with a parquet file of 14 images of noise in two classes."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (20, 18), dtype=np.uint8)) for _ in range(14)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(14)]}, features=features)
    rows.to_parquet(folder / "train.parquet")
    return folder


def launched(words, processes=1, **popen):
    """A Python process; with several, a launcher of them."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*launcher, *map(str, words)], env=env, **popen)


def words_of(script, dataset, output_dir, steps, *more):
    """Options of a training."""
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps}".split()
    return [*options, *OPTIONS[script], "--resume_from_checkpoint", "latest", *more]


def start(script, dataset, output_dir, steps, *more, processes=1, **popen):
    """A training process."""
    return launched([script.__file__, *words_of(script, dataset, output_dir, steps, *more)], processes, **popen)


def run(*args, **kwargs):
    process = start(*args, **kwargs)
    assert process.wait(TIMEOUT) == 0


def wait_for(condition, process):
    """Polls until the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def tensors(checkpoint):
    return {path.name: load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}


def assert_same(checkpoint, other):
    ours, theirs = tensors(checkpoint), tensors(other)
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        for key, tensor in ours[name].items():
            assert torch.equal(tensor, theirs[name][key]), (name, key)


@pytest.mark.parametrize(
    "script",
    [train_unet, *(pytest.param(script, marks=pytest.mark.slow) for script in (train_upsampler, train_classifier))],
    ids=["unet", "upsampler", "classifier"],
)
def test_killed_run_ends_as_the_undisturbed_one(script, dataset, tmp_path):
    # Workers, random crops and flips, and 7 batches an epoch, so that the second epoch is reached.
    more = "--checkpointing_steps 2 --dataloader_num_workers 2 --validation_steps 4 --validation_split train".split()
    more += ["--num_validation_images", "3"] * (script is not train_classifier)
    run(script, dataset, tmp_path / "whole", 12, *more)
    output = tmp_path / "killed"
    moments = [
        lambda: list(output.glob("*checkpoint-4")),  # in the middle of a save
        lambda: (output / "checkpoint-4").exists(),  # between saving and validating
        lambda: (output / "checkpoint-8" / "validated").exists(),  # just after validating
    ]
    for moment in moments:
        process = start(script, dataset, output, 12, *more)
        wait_for(moment, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(output.glob("checkpoint-*"))
    run(script, dataset, output, 12, *more)
    assert_same(output / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")
    assert not list(output.glob("partial-*"))
    killed, whole = (read_metrics(folder / "metrics.jsonl") for folder in (output, tmp_path / "whole"))
    assert without_times(killed) == without_times(whole)
    assert names(output / "samples") == names(tmp_path / "whole" / "samples")


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def test_second_run_in_a_folder_is_refused_until_the_first_ends(dataset, tmp_path):
    first = start(train_classifier, dataset, tmp_path, 100_000, "--dataloader_num_workers", "2")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), first)
    second = words_of(train_classifier, dataset, tmp_path, 1)
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=rf"is used by another run \(process {first.pid} on "):
            train_classifier.main(train_classifier.parse_args([*second, *more]))
    first.send_signal(signal.SIGKILL)
    first.wait()
    train_classifier.main(train_classifier.parse_args(second))  # workers of the killed run may still be there


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(dataset, tmp_path):
    more = ["--checkpointing_steps", "2"]
    run(train_classifier, dataset, tmp_path, 2, *more)
    before = tensors(tmp_path / "checkpoint-2")

    def fill_the_disk():  # no file may grow beyond this: a write fails in its middle, as on a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    process = start(train_classifier, dataset, tmp_path, 8, *more, preexec_fn=fill_the_disk, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=TIMEOUT)
    # It went on after the failure at step 4, and failed in the end: nothing it had done was saved.
    assert process.returncode != 0 and b"checkpoint-6" in errors
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    after = tensors(tmp_path / "checkpoint-2")
    assert all(torch.equal(after[name][key], before[name][key]) for name in before for key in before[name])
    run(train_classifier, dataset, tmp_path, 8, *more)
    assert (tmp_path / "checkpoint-8").exists()


@pytest.mark.parametrize(
    "moment",
    [
        "sampling",
        "training, by Ctrl-C",
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in ("training", "training with workers", "training on two processes")
        ),
    ],
)
def test_asked_to_stop_it_saves_and_leaves_quietly(moment, dataset, tmp_path):
    sampling = moment == "sampling"
    more = ["--validation_steps", "3" if sampling else "100000", "--num_validation_images", "500"]
    more += ["--dataloader_num_workers", "2" if "workers" in moment else "0"]
    processes = 2 if "two" in moment else 1
    popen = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = start(train_unet, dataset, tmp_path, 100_000, *more, processes=processes, **popen)
    metrics = tmp_path / "metrics.jsonl"
    # The pipeline is saved before the pictures are drawn, which takes minutes.
    wait_for(lambda: (tmp_path / "pipeline").exists() if sampling else metrics.exists(), process)
    # Batch systems and terminals signal all processes of a job.
    os.killpg(process.pid, signal.SIGINT if "Ctrl-C" in moment else signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 or processes == 2  # torch's launcher has a code of its own for it
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"saving checkpoint-{step}" in out
    assert not sampling or step == 3
    run(train_unet, dataset, tmp_path, step + 2, "--num_validation_images", "2")
    assert (tmp_path / "samples" / f"step-{step + 2}.png").exists()


@pytest.mark.slow
def test_two_processes_resume_exactly(dataset, tmp_path):
    more = ["--checkpointing_steps", "3", "--num_validation_images", "3"]
    run(train_unet, dataset, tmp_path / "whole", 6, *more, processes=2)
    run(train_unet, dataset, tmp_path / "parts", 3, *more, processes=2)
    run(train_unet, dataset, tmp_path / "parts", 6, *more, processes=2)
    assert_same(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    # What is left of it goes on with one process.
    process = start(train_unet, dataset, tmp_path / "parts", 8, *more, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and b"written with num_processes 2, and this run has 1" in errors


@pytest.mark.slow
def test_two_processes_resume_a_stream_exactly(dataset, tmp_path):
    rows = load_dataset(str(dataset), split="train")
    for shard in range(4):
        rows.shard(4, shard).to_parquet(tmp_path / "shards" / f"train-{shard}.parquet")
    more = ["--checkpointing_steps", "3", "--streaming", "--shuffle_buffer", "4", "--validation_split", "train"]
    more += ["--dataloader_num_workers", "2"]
    run(train_classifier, tmp_path / "shards", tmp_path / "whole", 6, *more, processes=2)
    run(train_classifier, tmp_path / "shards", tmp_path / "parts", 3, *more, processes=2)
    run(train_classifier, tmp_path / "shards", tmp_path / "parts", 6, *more, processes=2)
    assert_same(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    run(train_classifier, tmp_path / "shards", tmp_path / "parts", 8, *more, processes=1)
    entries = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= entries[-1]["validation_accuracy_quarter_0"] <= 1


def play(scene, dataset, output_dir, *more, processes=2):
    """A scene of `trainer_scenes.py`."""
    script = Path(__file__).parents[1] / "helpers" / "trainer_scenes.py"
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps 1".split()
    assert launched([script, scene, *options, *ARCHITECTURE, *more], processes).wait(TIMEOUT) == 0


@pytest.mark.slow
def test_a_process_that_is_done_waits_for_those_that_still_write(dataset, tmp_path):
    play("slow_checkpoint", dataset, tmp_path)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-0"]


def test_a_run_is_unfinished_on_all_processes_if_one_is_stopped_while_validating(dataset, tmp_path):
    play("stopped_while_validating", dataset, tmp_path)


def test_all_processes_resume_from_the_checkpoint_of_the_first(dataset, tmp_path):
    run(train_classifier, dataset, tmp_path / "0", 1)
    play("own_disks", dataset, tmp_path, "--resume_from_checkpoint", "latest")


def test_two_processes_give_the_gradients_of_one(dataset, tmp_path):
    for processes, batch_size in ((1, 4), (2, 2)):
        sizes = ["--total_batch_size", 4, "--train_batch_size", batch_size]
        play("first_gradients", dataset, tmp_path / str(processes), *sizes, processes=processes)
    one, two = (load_file(tmp_path / str(processes) / "gradients.safetensors") for processes in (1, 2))
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6)
