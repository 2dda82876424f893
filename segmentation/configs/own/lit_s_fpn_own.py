# Semantic FPN with LIT-S on a custom dataset. Copy this file and edit the lines with a comment.
#
#   command       python tools/train.py configs/own/lit_s_fpn_own.py
#   GPUs          1, float32, activation checkpointing
#   global batch  2 (1 x 2)
#   published     none
#   obtained      not run here

_base_ = "../lit/lit_s_fpn_r50_512x512_80k_ade20k.py"
load_from = "https://github.com/ziplab/LIT/releases/download/v2.0/sem_fpn_lit_s.pth"  # None: ImageNet only
train_folders = dict(img_path="images/train", seg_map_path="masks/train")  # relative to data_root
val_folders = dict(img_path="images/val", seg_map_path="masks/val")
ignore = 255  # mask value of pixels to ignore
dataset = dict(
    type="BaseSegDataset",
    data_root="data/own",
    img_suffix=".jpg",  # suffix of the images
    seg_map_suffix=".png",  # suffix of the masks: same names, one channel of class indices
    reduce_zero_label=False,  # True: ignore 0 in the masks, too; the first class is 1, and ignore_index stays 255
    ignore_index=ignore,
    metainfo=dict(classes=("ground", "disc", "square"), palette=[(0, 0, 0), (230, 25, 75), (0, 130, 200)]),  # RGB
)
scale, crop = (2048, 512), (512, 512)  # maximum longer and shorter side of images; size of training crops
head = dict(num_classes=3, ignore_index=ignore)  # number of classes
model = dict(data_preprocessor=dict(size=crop, seg_pad_val=ignore), decode_head=head)
load, resize = dict(type="LoadImageFromFile"), dict(type="Resize", scale=scale, keep_ratio=True)
masks, pack = dict(type="LoadAnnotations"), dict(type="PackSegInputs")
rescale = dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True)
cut = dict(type="RandomCrop", crop_size=crop, cat_max_ratio=0.75, ignore_index=ignore)
augment = [rescale, cut, dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion")]
allow_absent_classes = False  # True: train although no training mask contains some class
training = dict(data_prefix=train_folders, pipeline=[load, masks, *augment, pack], **dataset)
train_dataloader = dict(batch_size=2, dataset=dict(_delete_=True, **training))
validation = dict(data_prefix=val_folders, pipeline=[load, resize, masks, pack], **dataset)
val_dataloader = dict(dataset=dict(_delete_=True, **validation))
test_dataloader = val_dataloader
test_evaluator = val_evaluator = dict(ignore_index=ignore)
optim_wrapper = dict(
    optimizer=dict(lr=1.25e-5),  # for 1 GPU x 2 images; the recipe uses 1e-4 for 8 x 2
    paramwise_cfg=dict(custom_keys={"offset": dict(lr_mult=0.01)}),  # keeps DTM's samples inside the feature map
)
auto_scale_lr = dict(base_batch_size=2)  # batch size of the learning rate above, used by --auto-scale-lr
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, by_epoch=False)]  # ends at max_iters
