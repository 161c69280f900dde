"""Makes PyPI's torchvision importable beside torch's CPU build, in processes that find this folder on PYTHONPATH.

Its compiled part is for CUDA and does not load; what is pure Python, which is all that image processors use, imports
as soon as the operators that it wraps are declared.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
