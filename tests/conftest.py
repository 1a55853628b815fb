"""Settings of all tests: the Hub is not asked, and tests that run side by side use one thread each."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
