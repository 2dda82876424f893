# Small RetinaNet on a custom dataset, for a CPU or a small GPU. Copy this file and edit the lines with a comment.
#
#   command       python tools/train.py configs/own/retinanet_lit_mini_own.py
#   GPUs          not required
#   global batch  8 (1 x 8)
#   published     none
#   obtained      1.00 box AP50 on 40 generated images of discs and squares, after two epochs of 240 such images of
#                 96 x 72 pixels (pytest -m slow tests/detection -k mini_learns)

# The backbone has 0.8 M parameters. It is pretrained with the classifier of experiments/cifar10. Nothing is downloaded.
_base_ = "../demo/retinanet_lit_digit_scenes.py"
data_root = "data/own/"
train_file, val_file = "train.json", "val.json"  # in data_root, in COCO format
images = dict(img="images/")  # folder of the images, relative to data_root
# names in the order of "categories" in the files, and a color per category; a single name needs a comma: ("disc",)
metainfo = dict(classes=("disc", "square"), palette=[(230, 25, 75), (0, 130, 200)])  # RGB
side = 512  # maximum side of the images in pixels
anchors = dict(octave_base_scale=4, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128])  # boxes of 32 to 800 pixels
model = dict(
    backbone=dict(img_size=side),  # for other widths and depths: arch=dict(...) and init_cfg=None
    neck=dict(num_outs=5),
    bbox_head=dict(num_classes=2, anchor_generator=anchors),  # number of categories
)
resize = dict(type="Resize", scale=(side, side), keep_ratio=True)

load, annotations = dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [load, annotations, resize, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [load, resize, annotations, dict(type="PackDetInputs", meta_keys=keys)]
dataset = dict(data_root=data_root, data_prefix=images, metainfo=metainfo)
train_dataloader = dict(dataset=dict(ann_file=train_file, pipeline=train_pipeline, **dataset))
# One image per batch: images of other sizes would be padded, and attention includes the padding.
val_dataloader = dict(batch_size=1, dataset=dict(ann_file=val_file, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
test_evaluator = val_evaluator = dict(ann_file=data_root + val_file)
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # for 8 images; --auto-scale-lr scales it with the batch
train_cfg = dict(max_epochs=12, val_interval=1)
