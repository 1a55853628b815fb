"""Code that draws the images of the page without it."""

from diffusers_adm.page.model import PageModel


DEFAULT = """\
import torch

from diffusers_adm import ClassifierGuidedPipeline, default_model
from diffusers_adm.evaluation.schedulers import set_scheduler


pipe = ClassifierGuidedPipeline.from_pretrained(default_model())
"""
OTHER = """\
import torch

from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.evaluation.schedulers import set_scheduler


pipe = load_pipeline({arguments})
"""
CALL = """\
set_scheduler(pipe, "{scheduler}")
images = pipe(
{arguments}
    generator=[torch.Generator().manual_seed(seed) for seed in {seeds}],
).images
"""


def call_code(model: PageModel, scheduler: str, seeds: range, **call) -> str:
    """
    Returns Python code that draws the same images as a run of the page.

    Args:
        model: Model of the page.
        scheduler: Name of the scheduler.
        seeds: Seed of each image.
        call: Arguments of the pipeline's call, apart from the generators.
    """
    loading = {name: value for name, value in model.loading.items() if value not in (None, "float32")}
    load = DEFAULT
    if loading:
        load = OTHER.format(
            arguments=", ".join(f"{name}={value!r}" for name, value in ({"model": None} | loading).items())
        )
    arguments = "\n".join(f"    {name}={value!r}," for name, value in call.items())
    return load + CALL.format(scheduler=scheduler, arguments=arguments, seeds=seeds)
