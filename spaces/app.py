"""A Space that shows the page of diffusers_adm. The variable `MODEL` names another pipeline than the default one."""

import os

from diffusers_adm.evaluation.sampling import load_pipeline
from diffusers_adm.launch import join_processes
from diffusers_adm.page.model import PageModel
from diffusers_adm.page.page import build_page, launch_page


model = os.environ.get("MODEL") or None
demo = build_page(PageModel(load_pipeline(model, device=join_processes().device), model=model))

if __name__ == "__main__":
    launch_page(demo)
