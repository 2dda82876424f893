"""LIT in mmdetection and mmsegmentation. Importing the package registers the backbone and makes reading files safe."""

from .backbone import LITBackbone
from .hooks import AverageBuffersHook, CheckDataHook, DataError
from .loading import load_file

__all__ = ["AverageBuffersHook", "CheckDataHook", "DataError", "LITBackbone", "load_file"]
