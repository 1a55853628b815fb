"""A disk that is full ends a run in one line, whatever it was about to write, and nothing that was written is lost."""

import shutil
import subprocess

import pytest
from training_runs import checkpoint_tensors, classifier_args, unet_args, without_times

from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.configuration import run_script
from diffusers_adm.training.metrics import read_metrics


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, which takes the permission to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leaving):
    """Writes a file that leaves some bytes."""
    (disk / "filling").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leaving)))


@pytest.mark.parametrize(
    ("script", "arguments"), [(train_classifier, classifier_args), (train_unet, unet_args)], ids=["classifier", "unet"]
)
def test_end_of_a_run_on_a_full_disk(script, arguments, dataset, small_disk):
    folder = small_disk / "run"
    more = "--resume_from_checkpoint latest --num_train_timesteps 25".split()

    def end_of_run():
        run_script(script.main, lambda: arguments(dataset, folder, 1, *more))

    end_of_run()
    metrics, tensors = read_metrics(folder / "metrics.jsonl"), checkpoint_tensors(folder / "checkpoint-1")
    failures = []
    for pages in (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256):
        (folder / "checkpoint-1" / "validated").unlink(missing_ok=True)
        for model in ("pipeline", "classifier"):
            shutil.rmtree(folder / model, ignore_errors=True)
        fill(small_disk, 4096 * pages)
        try:
            end_of_run()
        except SystemExit as end:
            assert "\n" not in end.code and "No space left" in end.code
            failures.append(end.code)
        (small_disk / "filling").unlink()
        assert checkpoint_tensors(folder / "checkpoint-1").keys() == tensors.keys()
        assert read_metrics(folder / "metrics.jsonl")[0] == metrics[0]
    assert len({failure.partition("run/")[2] for failure in failures}) >= 3  # places
    end_of_run()
    assert without_times(read_metrics(folder / "metrics.jsonl")) == without_times(metrics)


@pytest.mark.parametrize("pages", [0, 4, 12, 40])
def test_checkpoint_on_a_full_disk(pages, dataset, small_disk):
    fill(small_disk, 4096 * pages)
    with pytest.raises(SystemExit, match=r"checkpoint-1 while|No space left") as end:
        run_script(train_classifier.main, lambda: classifier_args(dataset, small_disk / "run", 1))
    assert "\n" not in end.value.code and not list(small_disk.glob("run/*checkpoint-*"))
