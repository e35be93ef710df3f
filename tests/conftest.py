import os

# What the tests need is on this machine: a look at the Hub would only cost retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Tiny models: a second thread costs more than it brings, and pytest-xdist gives each core a process of its own.
torch.set_num_threads(1)
