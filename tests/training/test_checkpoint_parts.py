"""Checkpoints that are damaged or hostile."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import unet_args

from diffusers_adm.training import train_unet
from diffusers_adm.training.checkpoint_parts import check_parts, read_part


SAMPLING = ["--schedule_sampler", "loss-second-moment"]
PICKLES = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
PARTS = [*PICKLES, "model.safetensors", "ema-0.5.safetensors", "timestep_sampler.safetensors"]
PARTS += ["options.yaml", "trainer_state.json"]


class Hostile:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("finished")
    train_unet.main(unet_args(dataset, folder, 3, *SAMPLING))
    return folder


@pytest.fixture
def output(finished, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(finished, tmp_path / "run")


def resume(dataset, output):
    train_unet.main(unet_args(dataset, output, 6, *SAMPLING, "--resume_from_checkpoint", "latest"))


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "pickle"])
@pytest.mark.parametrize("name", PICKLES)
def test_no_code_of_a_checkpoint_runs(name, zipped, dataset, output, tmp_path):
    checkpoint = output / "checkpoint-3"
    hostile = {"state": Hostile(tmp_path / "it-ran")}
    if zipped:
        torch.save(hostile, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match=f"{name} is damaged, or holds code instead of tensors and numbers"):
        resume(dataset, output)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
@pytest.mark.parametrize("name", PARTS)
def test_damaged_parts_are_refused_by_name(name, damage, dataset, output):
    path = output / "checkpoint-3" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2] if name != "options.yaml" else content[:5])
    else:
        path.write_bytes(b"[1, 2]" if damage == "other" else b"")
    with pytest.raises(ValueError, match=rf"({name} is damaged.*|files are missing: {name})\. Remove this checkpoint"):
        resume(dataset, output)


def test_random_states_of_another_kind_are_refused(dataset, output):
    path = output / "checkpoint-3" / "random_states_0.pkl"
    torch.save({"random_state": (3, (1, 2), None)}, path)
    with pytest.raises(ValueError, match="random_states_0.pkl is damaged"):
        resume(dataset, output)


@pytest.mark.parametrize("content", ["{}", "[]", '{"global_step": 3}', '{"global_step": "3"}', "[[1, 2.5]]", "[1, 2]"])
@pytest.mark.parametrize("name", ["trainer_state.json", "stream_0.json"])
def test_tables_of_another_kind_are_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_part(tmp_path / name)


def test_scale_of_fp16_is_required(output):
    with pytest.raises(ValueError, match="no scaler.pt, which --mixed_precision fp16 requires"):
        check_parts(output / "checkpoint-3", scaled=True)


def test_tensors_of_another_model_are_refused(dataset, output):
    checkpoint = output / "checkpoint-3"
    shutil.copy(checkpoint / "timestep_sampler.safetensors", checkpoint / "ema-0.5.safetensors")
    with pytest.raises(
        ValueError, match="ema-0.5.safetensors must hold tensors with the names and shapes of this run"
    ):
        resume(dataset, output)
