"""LIT, the less attention vision transformer. Importing the package registers its models with timm."""

from .checkpoints import CheckpointError, load_checkpoint, read_checkpoint
from .dtm import DeformableTokenMerging, deformable_sample
from .lit import LIT, lit_b, lit_m, lit_s, lit_ti, pvt_small_full_msa

__version__ = "0.1.0"

__all__ = [
    "LIT",
    "CheckpointError",
    "DeformableTokenMerging",
    "deformable_sample",
    "lit_b",
    "lit_m",
    "lit_s",
    "lit_ti",
    "load_checkpoint",
    "pvt_small_full_msa",
    "read_checkpoint",
]
