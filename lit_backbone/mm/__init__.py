"""LIT in mmdetection and mmsegmentation. Importing the package registers the backbone and makes reading files safe."""

from mmengine.config.utils import MODULE2PACKAGE

from ..images import DataError
from .backbone import LITBackbone
from .hooks import AverageBuffersHook, CheckDataHook
from .loading import load_file

__all__ = ["AverageBuffersHook", "CheckDataHook", "DataError", "LITBackbone", "load_file"]

MODULE2PACKAGE["mmseg"] = "mmseg"  # mmengine looks for mmsegmentation, the package's old name, when a config inherits
