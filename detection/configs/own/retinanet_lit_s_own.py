# RetinaNet with LIT-S on your own categories: copy this file, and change what has a comment
#
#   command       python tools/train.py configs/own/retinanet_lit_s_own.py
#   GPUs          1, fp16 with loss scaling, activation checkpointing
#   global batch  2 (1 x 2)
#   published     none
#   obtained      not run here

_base_ = "../lit/retinanet_lit_s_fpn_1x_coco.py"
load_from = "https://github.com/ziplab/LIT/releases/download/v2.0/retina_lit_s.pth"  # COCO's; None: ImageNet's LIT only
data_root = "data/own/"
train_file, val_file = "train.json", "val.json"  # in data_root, in COCO's format
images = dict(img="images/")  # the folder in data_root where their images are
# names as in the files' "categories", in their order, and a colour for each; a single name keeps its comma: ("disc",)
metainfo = dict(classes=("disc", "square"), palette=[(230, 25, 75), (0, 130, 200)])  # R, G, B
model = dict(bbox_head=dict(num_classes=2))  # how many categories these are
resize = dict(type="Resize", scale=(1333, 800), keep_ratio=True)  # longer and shorter side in pixels, at most

load, annotations = dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [load, annotations, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [load, resize, annotations, dict(type="PackDetInputs", meta_keys=keys)]
dataset = dict(data_root=data_root, data_prefix=images, metainfo=metainfo)
train_dataloader = dict(batch_size=2, dataset=dict(ann_file=train_file, pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(ann_file=val_file, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
test_evaluator = val_evaluator = dict(ann_file=data_root + val_file)
optim_wrapper = dict(optimizer=dict(lr=1.25e-5))  # for 1 GPU x 2 images: the recipe's 1e-4 is for 8 x 2
auto_scale_lr = dict(base_batch_size=2)  # what --auto-scale-lr takes the rate to be for
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),  # in iterations; 100 for few images
    dict(type="MultiStepLR", by_epoch=True, milestones=[8, 11], gamma=0.1),  # in epochs; the last one before max_epochs
]
