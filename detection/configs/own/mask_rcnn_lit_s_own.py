# Mask R-CNN with LIT-S on a custom dataset with masks. Copy this file and edit the lines with a comment.
#
#   command       python tools/train.py configs/own/mask_rcnn_lit_s_own.py
#   GPUs          1, fp16 with loss scaling, activation checkpointing
#   global batch  2 (1 x 2)
#   published     none
#   obtained      not run here

_base_ = "../lit/mask_rcnn_lit_s_fpn_1x_coco.py"
load_from = "https://github.com/ziplab/LIT/releases/download/v2.0/mask_rcnn_lit_s.pth"  # None: ImageNet only
data_root = "data/own/"
train_file, val_file = "train.json", "val.json"  # in data_root, in COCO format with "segmentation"
images = dict(img="images/")  # folder of the images, relative to data_root
# names in the order of "categories" in the files, and a color per category; a single name needs a comma: ("disc",)
metainfo = dict(classes=("disc", "square"), palette=[(230, 25, 75), (0, 130, 200)])  # RGB
num_classes = 2  # number of categories
model = dict(roi_head=dict(bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)))
resize = dict(type="Resize", scale=(1333, 800), keep_ratio=True)  # maximum of the longer and shorter side in pixels

load = dict(type="LoadImageFromFile")
annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [load, annotations, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [load, resize, annotations, dict(type="PackDetInputs", meta_keys=keys)]
dataset = dict(data_root=data_root, data_prefix=images, metainfo=metainfo)
# Training drops images without boxes, as on COCO. To keep them, add filter_cfg=dict(filter_empty_gt=False)
train_dataloader = dict(batch_size=2, dataset=dict(ann_file=train_file, pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(ann_file=val_file, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
test_evaluator = val_evaluator = dict(ann_file=data_root + val_file)
optim_wrapper = dict(
    optimizer=dict(lr=2.5e-5),  # for 1 GPU x 2 images; the recipe uses 2e-4 for 8 x 2
    paramwise_cfg=dict(custom_keys={"offset": dict(lr_mult=0.01)}),  # keeps DTM's samples inside the feature map
)
auto_scale_lr = dict(base_batch_size=2)  # batch size of the learning rate above, used by --auto-scale-lr
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),  # iterations; 100 for few images
    dict(type="MultiStepLR", by_epoch=True, milestones=[8, 11], gamma=0.1),  # epochs, below max_epochs
]
