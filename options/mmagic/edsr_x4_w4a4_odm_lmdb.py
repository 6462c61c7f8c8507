# The same training from LMDB, through MMEngine's file backend. `python tools/prepare_div2k.py` makes the databases, as
# BasicSR reads them: keys are file names without extension, meta_info.txt in the folder lists them.
_base_ = './edsr_x4_w4a4_odm.py'

experiment_name = 'edsr_x4_w4a4_odm_lmdb'
work_dir = f'./work_dirs/{experiment_name}'

root = 'data/DIV2K'
lq, gt = 'DIV2K_train_LR_bicubic_X4_sub.lmdb', 'DIV2K_train_HR_sub.lmdb'
load = dict(type='LoadImageFromFile', color_type='color', channel_order='rgb', imdecode_backend='cv2')
load_pair = [
    dict(key='img', backend_args=dict(backend='lmdb', db_path=f'{root}/{lq}'), **load),
    dict(key='gt', backend_args=dict(backend='lmdb', db_path=f'{root}/{gt}'), **load),
]
pairs = dict(ann_file=f'{lq}/meta_info.txt', data_root=root, data_prefix=dict(img=lq, gt=gt))

train_dataloader = dict(dataset=dict(pipeline=[*load_pair, *_base_.train_pipeline[2:]], **pairs))
model = dict(generator=dict(quant=dict(calibration=dict(dataset=dict(
    pipeline=[*load_pair, dict(type='PackInputs')], **pairs)))))
