# Base of all segmentors: runtime of mmsegmentation, and LIT. The tools add the hooks of LIT.
_base_ = ["mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["lit_backbone.mm"], allow_failed_imports=False)
randomness = dict(seed=None)  # a number repeats initialization and order of images
