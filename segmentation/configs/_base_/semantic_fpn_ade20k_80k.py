# Recipe of the paper without the backbone: Semantic FPN, 512 x 512 crops, 80k iterations, batch 16, poly to 1e-6.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/schedules/schedule_80k.py",
    "default_runtime.py",
]
model = dict(pretrained=None, data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=1e-6, begin=0, end=80000, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
