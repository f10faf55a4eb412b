"""Test-only: let the PyPI torchvision import beside a CPU torch, by declaring the two operators its Python code registers.

Only image transforms work then; the C++ operators stay absent. Put this folder on PYTHONPATH, so that subprocesses get it too.
"""

import importlib.abc
import importlib.util
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys._prefalign_torchvision_shim = library  # a library that is collected takes its operators with it
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, _DeclareOperators())
