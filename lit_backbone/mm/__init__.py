"""LIT for mmdetection and mmsegmentation. Importing the package registers the backbone, hooks and checkpoint reader."""

try:
    import mmcv.ops  # noqa: F401
    from mmengine.config.utils import MODULE2PACKAGE
except ImportError as error:
    error.msg = f"{error.msg}. Run `bash setup_env.sh --mm` and activate its environment."
    raise

from ..images import DataError
from .backbone import LITBackbone
from .checkpoints import load_file
from .hooks import AverageBuffersHook, CheckDataHook, OffsetHook

__all__ = ["AverageBuffersHook", "CheckDataHook", "DataError", "LITBackbone", "OffsetHook", "load_file"]

MODULE2PACKAGE["mmseg"] = "mmseg"  # config inheritance in mmengine looks up the former package name, mmsegmentation
