"""Grids of images, and their files."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusers_adm.atomic_files import atomic_write, check_can_write


def grid_of(pictures: list[Image.Image], columns: int = 10, gap: int = 0) -> Image.Image:
    """Joins images of equal size in rows of `columns` images, with grey gaps of `gap` pixels."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (side + gap for side in pictures[0].size)
    size = (columns * width - gap, rows * height - gap)
    grid = Image.new(pictures[0].mode, size, "grey" if gap else "black")
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid


def labelled_grid(
    row_names: list[str], column_names: list[str], rows: list[list[Image.Image]], zoom: int = 2, gap: int = 4
) -> Image.Image:
    """
    Joins rows of images of equal size. The name of each row is on its left, and the name of each column is above it.

    Args:
        row_names: Names of the rows.
        column_names: Names of the columns.
        rows: Images, one list per row.
        zoom: Factor by which each image is enlarged.
        gap: Number of pixels between images.
    """
    font = ImageFont.load_default(size=16)
    margin = 8
    left = margin + max(int(font.getlength(name)) for name in row_names) + margin
    top = margin + 20
    width, height = (zoom * side for side in rows[0][0].size)
    grid = Image.new("RGB", (left + len(column_names) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for column, name in enumerate(column_names):
        draw.text((left + column * (width + gap) + width // 2, top // 2), name, "black", font, anchor="mm")
    for row, (name, pictures) in enumerate(zip(row_names, rows)):
        y = top + row * (height + gap)
        draw.text((margin, y + height // 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + column * (width + gap), y))
    return grid


def checked_output(output: str | Path) -> Path:
    """
    Returns the absolute path of a picture to write.

    Raises:
        ValueError: If the folder does not exist, or the format is not supported.
    """
    output = Path(output).absolute()
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"The picture must have a supported suffix, such as .png or .jpg, but got {output.name}.")
    check_can_write(output)
    return output


def save_picture(picture: Image.Image, output: Path) -> None:
    """Writes a picture. If writing fails, no file is left."""
    with atomic_write(output) as partial:
        picture.save(partial)
