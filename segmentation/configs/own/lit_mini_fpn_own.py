# Small Semantic FPN on a custom dataset, for a CPU or a small GPU. Copy this file and edit the lines with a comment.
#
#   command       python tools/train.py configs/own/lit_mini_fpn_own.py
#   GPUs          not required
#   global batch  8 (1 x 8)
#   published     none
#   obtained      0.96 mIoU on 40 generated images of discs and squares, after 300 iterations on 240 such images of
#                 96 x 72 pixels (pytest -m slow tests/segmentation -k mini_learns)

# The backbone has 0.8 M parameters. It is pretrained with the classifier of experiments/cifar10. Nothing is downloaded.
_base_ = "../demo/fpn_lit_digit_scenes.py"
train_folders = dict(img_path="images/train", seg_map_path="masks/train")  # relative to data_root
val_folders = dict(img_path="images/val", seg_map_path="masks/val")
ignore = 255  # mask value of pixels to ignore
dataset = dict(
    data_root="data/own",
    img_suffix=".jpg",  # suffix of the images
    seg_map_suffix=".png",  # suffix of the masks: same names, one channel of class indices
    reduce_zero_label=False,  # True: ignore 0 in the masks, too; the first class is 1, and ignore_index stays 255
    ignore_index=ignore,
    metainfo=dict(classes=("ground", "disc", "square"), palette=[(0, 0, 0), (230, 25, 75), (0, 130, 200)]),  # RGB
)
scale, crop = (512, 512), (256, 256)  # maximum size of images; size of training crops
model = dict(
    data_preprocessor=dict(size=crop, seg_pad_val=ignore),
    backbone=dict(img_size=crop),  # for other widths and depths: arch=dict(...) and init_cfg=None
    decode_head=dict(num_classes=3, ignore_index=ignore),  # number of classes
)
load, resize = dict(type="LoadImageFromFile"), dict(type="Resize", scale=scale, keep_ratio=True)
masks, pack = dict(type="LoadAnnotations"), dict(type="PackSegInputs")
rescale = dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True)
cut = dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75, ignore_index=ignore)
augment = [rescale, cut, dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion")]
allow_absent_classes = False  # True: train although no training mask contains some class
training = dict(data_prefix=train_folders, pipeline=[load, masks, *augment, pack], **dataset)
train_dataloader = dict(batch_size=8, dataset=training)
validation = dict(data_prefix=val_folders, pipeline=[load, resize, masks, pack], **dataset)
val_dataloader = dict(dataset=validation)
test_dataloader = val_dataloader
test_evaluator = val_evaluator = dict(ignore_index=ignore)
optim_wrapper = dict(optimizer=dict(lr=4e-3))  # for 8 images; --auto-scale-lr scales it with the batch
train_cfg = dict(max_iters=4000, val_interval=500)
