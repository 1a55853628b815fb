"""Cards of the released models."""

from pathlib import Path

import torch
from golden_cases import RELEASED

from diffusers_adm import default_cascade, default_model
from diffusers_adm.cli import build_parser, main
from diffusers_adm.hub.cards import card_name, released_card
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS


def test_cards_of_released_models_are_those_of_the_table():
    folder = Path(__file__).parents[2] / "model_cards"
    for preset in RELEASED_CHECKPOINTS.values():
        card = released_card(preset)
        assert (folder / card_name(preset) / "README.md").read_text() == str(card), "run `make cards`"
        (command,) = [line for line in str(card).splitlines() if line.startswith("diffusers-adm convert")]
        args = build_parser().parse_args(command.split()[1:])
        assert preset.file in (args.unet, args.classifier)
        assert {args.unet, args.classifier} - {None} <= RELEASED_CHECKPOINTS.keys()
    shipped = {Path(model).name for model in (default_model(), *default_cascade())}
    assert {path.parent.name for path in folder.glob("*/README.md")} == {
        *map(card_name, RELEASED_CHECKPOINTS.values()),
        *shipped,
    }


def test_command_of_a_card_converts_and_leaves_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = RELEASED_CHECKPOINTS["64x64_classifier.pt"]
    state_dict = {name: torch.zeros(shape) for name, shape in RELEASED[preset.file]["parameters"]}
    torch.save({name: tensor.half() for name, tensor in state_dict.items()}, preset.file)
    (command,) = [line for line in str(released_card(preset)).splitlines() if line.startswith("diffusers-adm convert")]
    assert main(command.split()[1:]) == 0
    assert (tmp_path / card_name(preset) / "README.md").read_text() == str(released_card(preset))
