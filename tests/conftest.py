"""Before any test: nothing is looked up on the Hub."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
