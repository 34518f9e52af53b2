"""Where the kernels run in these tests: emulated on the CPU, or on a GPU.

MEGAGROW_TEST_DEVICE=cuda runs every test of this folder on the device.
"""

import os

import torch

DEVICE = os.environ.get("MEGAGROW_TEST_DEVICE", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
