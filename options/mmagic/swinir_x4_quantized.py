# SwinIR x4 of MMagic in a wrapper that quantizes it: its linear layers and convolutions. The files beside this one say
# by which method; those that standardize or select by the channels of images leave the linear layers alone.
_base_ = 'mmagic::swinir/swinir_x4s48w8d6e180_8xb4-lr2e-4-500k_div2k.py'
custom_imports = dict(imports=['basicsr_quant.mmagic'], allow_failed_imports=False)

# MMagic's model zoo; BasicSR's SwinIR files have the same names
# To go on from the latest checkpoint: --resume --cfg-options load_from=None
load_from = 'https://download.openmmlab.com/mmediting/swinir/swinir_x4s48w8d6e180_8xb4-lr2e-4-500k_div2k-88e4903d.pth'

model = dict(
    generator=dict(
        _delete_=True,
        type='QuantizedNetwork',
        generator=_base_.model.generator,
        quant=dict(
            w_bits=4,
            a_bits=4,
            scope='body',
            calibration=dict(
                num_images=100,
                # the training images, whole; test sets of the base config share its folder and not its list
                dataset=dict(_base_.train_dataloader.dataset, pipeline=_base_.val_pipeline)))))

train_cfg = dict(max_iters=60000)
val_cfg = dict(type='MultiValLoop')  # with the base config's ValLoop MMagic 1.2.0 stops at the first validation
optim_wrapper = dict(constructor='QuantizedOptimWrapperConstructor', optimizer=dict(lr=1e-4))
param_scheduler = dict(milestones=[15000, 30000, 45000])

# under several processes: ranks calibrate alike, buffers need no broadcasting
model_wrapper_cfg = dict(
    type='MMSeparateDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=False)

custom_hooks = [
    dict(type='RangeCalibrationHook'),
    dict(type='QuantizationReportHook'),  # metrics.json in the work_dir of a test
    dict(type='QuantizationVisualizationHook', interval=1000),  # ranges; with quant.save_bits the bits of each image
    dict(type='BasicVisualizationHook', interval=1),
]
