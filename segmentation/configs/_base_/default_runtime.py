# Base of all segmentors: runtime of mmsegmentation, LIT, and checks of data and checkpoints.
_base_ = ["mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["lit_backbone.mm"], allow_failed_imports=False)
custom_hooks = [dict(type="AverageBuffersHook"), dict(type="CheckDataHook"), dict(type="OffsetHook")]
randomness = dict(seed=None)  # a number repeats initialization and order of images
