"""`diffusers-adm released`."""

import argparse

from diffusers_adm.options import add_examples


def add_released_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the examples of `released`, which has no options."""
    add_examples(parser, "diffusers-adm released", "diffusers-adm released | grep unet")


def list_released(args: argparse.Namespace) -> None:
    """Prints a table of the released checkpoints."""
    from diffusers_adm.openai.released import RELEASED_BY_NAME

    rows = [("name", "model", "pixels", "classes", "size", "license", "what it is")]
    for released in RELEASED_BY_NAME.values():
        remarks = [f"trained on {released.trained_on}"]
        remarks += [f"guided by {released.guided_by}"] if released.guided_by else []
        remarks += [released.note] if released.note else []
        remarks += [f"cannot be converted, because {released.unsupported}"] if released.unsupported else []
        license = released.license if released.terms is None else f"{released.license}, {released.terms}"
        classes = "1000" if released.imagenet_labels else "none"
        size = "?" if released.size is None else f"{released.size / 1e9:.1f} GB"
        rows.append((released.name, released.kind, released.resolution, classes, size, license, "; ".join(remarks)))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        print(*(str(cell).ljust(width) for cell, width in zip(cells, widths)), last, sep="  ")
