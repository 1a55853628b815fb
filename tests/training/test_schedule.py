"""Steps at which a run logs, saves and validates, if the options leave them open."""

import pytest
from training_runs import unet_args

from diffusers_adm.training import train_unet
from diffusers_adm.training.metrics import read_metrics
from diffusers_adm.training.schedule import Schedule


def options(steps, *more):
    words = f"--output_dir out --train_data_dir images --max_train_steps {steps}".split()
    return train_unet.parse_args([*words, *more])


@pytest.mark.parametrize(
    ("steps", "logging", "saving", "first"),
    [(1, 1, 1, 1), (15, 1, 1, 1), (600, 50, 60, 6), (40_000, 50, 4000, 400), (500_000, 50, 5000, 500)],
)
def test_defaults_follow_the_length_of_the_run(steps, logging, saving, first):
    schedule = Schedule(options(steps))
    assert [step for step in range(1, 100) if schedule.logging.is_due(step)][0] == logging
    for rhythm in (schedule.saving, schedule.validating):
        due = [step for step in range(1, 2 * saving + 1) if rhythm.is_due(step)]
        assert due == sorted({first, saving, 2 * saving})


def test_given_steps_are_kept():
    schedule = Schedule(options(600, *"--logging_steps 7 --checkpointing_steps 8 --validation_steps 9".split()))
    for rhythm, period in ((schedule.logging, 7), (schedule.saving, 8), (schedule.validating, 9)):
        assert [step for step in range(1, 20) if rhythm.is_due(step)] == list(range(period, 20, period))


def test_pipeline_is_saved_before_it_is_pushed():
    schedule = Schedule(options(600, *"--push_to_hub --hub_model_id me/it --push_every 77".split()))
    assert [step for step in range(1, 160) if schedule.validating.is_due(step)] == [6, 60, 77, 120, 154]


def test_short_run_saves_draws_and_says_when(dataset, tmp_path, capsys):
    run = unet_args(
        dataset, tmp_path, 20, *"--validation_fraction 0.2 --num_validation_images 1 --num_train_timesteps 25".split()
    )
    run.output.logging_steps = run.output.checkpointing_steps = run.output.validation_steps = None
    train_unet.main(run)
    assert (
        "The run logs every 2 steps; saves a checkpoint every 2 steps, first at step 1; saves the pipeline, measures losses on"
        " held-out images, draws 1 image every 2 steps, first at step 1. It also saves and validates at the end."
    ) in capsys.readouterr().out
    steps = [1, *range(2, 21, 2)]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {f"step-{step}.png" for step in steps}
    validated = [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in entry]
    assert validated == steps
