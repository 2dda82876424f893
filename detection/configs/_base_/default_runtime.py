# Base of all detectors: runtime and test-time augmentation of mmdetection, and LIT. The tools add the hooks of LIT.
_base_ = ["mmdet::_base_/default_runtime.py", "mmdet::retinanet/retinanet_tta.py"]
custom_imports = dict(imports=["lit_backbone.mm"], allow_failed_imports=False)
randomness = dict(seed=None)  # a number repeats initialization and order of images
