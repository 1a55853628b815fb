"""`diffusers-adm released`."""

import argparse
import textwrap

from diffusers_adm.options import add_examples


def add_released_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the examples of `released`, which has no options."""
    add_examples(parser, "diffusers-adm released", "diffusers-adm released | grep -A1 ffhq")


def list_released(args: argparse.Namespace) -> None:
    """Prints a table of the released checkpoints, with what each is for below its row."""
    from diffusers_adm.openai.flags import parse_flags
    from diffusers_adm.openai.released import RELEASED_BY_NAME

    rows, remarks = [("name", "model", "pixels", "classes", "GB", "license")], ["what it is"]
    for released in RELEASED_BY_NAME.values():
        has_classes = released.kind == "classifier" or parse_flags(released.flags)["class_cond"]
        classes = "1000" if released.imagenet_labels else "yes" if has_classes else "none"
        size = "?" if released.size is None else f"{released.size / 1e9:.1f}"
        rows.append((released.name, released.kind, str(released.resolution), classes, size, released.license_terms))
        parts = [f"trained on {released.trained_on}"]
        parts += [f"guided by {released.guided_by}"] if released.guided_by else []
        parts += [released.note] if released.note else []
        parts += [f"cannot be converted, because {released.unsupported}"] if released.unsupported else []
        remarks.append("; ".join(parts))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row, remark in zip(rows, remarks):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        print(textwrap.fill(remark, 100, initial_indent="    ", subsequent_indent="    "))
