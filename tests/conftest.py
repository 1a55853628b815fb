"""Before any test: nothing is looked up on the Hub, and tests side by side take one thread each."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
