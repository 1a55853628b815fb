"""Editor of pictures, whose uploads are bounded and decoded safely."""

from io import BytesIO

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorValue
from gradio.data_classes import FileData
from PIL import Image

from diffusers_adm.page.pictures import SHOWN_SIDE, decode_upload


MAX_LAYERS = 16
MAX_PENDING = 64  # drawings of all users that were sent but not used yet


def picture_editor(label: str, background: Image.Image, brush: gr.Brush) -> gr.ImageEditor:
    """
    Returns an editor whose pictures are decoded by [`decode_upload`]. The user gets a message if a picture cannot be decoded. Two
    functions are replaced on the object instead of in a subclass, because gradio writes a file beside the source of every subclass
    of a component. Events may only set the value of the editor, because an update of other properties makes another object.

    Args:
        label: Name of the editor.
        background: Picture that the editor shows at first.
        brush: Brush to draw with.
    """
    editor = gr.ImageEditor(
        as_editor_value(background),
        label=label,
        type="pil",
        format="png",
        sources=("upload", "clipboard"),
        transforms=(),
        brush=brush,
        canvas_size=(SHOWN_SIDE, SHOWN_SIDE),
        layers=False,
        elem_classes="pixelated",
    )
    accept_blobs = editor.accept_blobs

    @server
    def accept_bounded_blobs(data: AcceptBlobs) -> None:
        index = data.data.get("index")
        if index not in (None, "null") and not 0 <= int(index) < MAX_LAYERS:
            raise gr.Error(f"A drawing has at most {MAX_LAYERS} layers.", print_exception=False)
        while len(editor.blob_storage) > MAX_PENDING:
            editor.blob_storage.pop(next(iter(editor.blob_storage)), None)
        accept_blobs(data)

    editor.convert_and_format_image = decode_part
    editor.accept_blobs = accept_bounded_blobs
    return editor


def decode_part(file: FileData | bytes | None, flatten_on_white: bool = False) -> Image.Image | None:
    """Decodes one picture of an editor's value, as RGBA."""
    if file is None:
        return None
    try:
        return decode_upload(file.path if isinstance(file, FileData) else BytesIO(file))
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None


def as_editor_value(picture: Image.Image) -> EditorValue:
    """Returns the value of an editor that shows a picture, on which nothing is drawn yet."""
    return {"background": picture.convert("RGBA"), "layers": [], "composite": None}


def edited_picture(value: EditorValue | None) -> Image.Image:
    """
    Returns the picture that an editor shows.

    Raises:
        ValueError: If the editor shows no picture.
    """
    picture = None if value is None else value["composite"] or value["background"]
    if picture is None:
        raise ValueError("Draw or upload a picture first.")
    return picture


def painted_region(value: EditorValue | None) -> Image.Image:
    """
    Returns a mask of what is drawn on an editor's picture. It is black where nothing is drawn.

    Raises:
        ValueError: If nothing is drawn.
    """
    layers = [layer.getchannel("A") for layer in (value or {}).get("layers", [])]
    if not any(layer.getbbox() for layer in layers):
        raise ValueError("First paint over the part to draw anew.")
    region = Image.new("L", layers[0].size)
    for layer in layers:
        region.paste(255, mask=layer)
    return region
