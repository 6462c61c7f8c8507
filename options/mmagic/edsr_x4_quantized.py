# EDSR-baseline x4 of MMagic in a wrapper that quantizes it; the files beside this one say by which method.
# Data, test sets and evaluators are those of the file below.
_base_ = 'mmagic::edsr/edsr_x4c64b16_1xb16-300k_div2k.py'
custom_imports = dict(imports=['basicsr_quant.mmagic'], allow_failed_imports=False)

# MMagic's model zoo. FP32 and quantized files of BasicSR load too, by --cfg-options load_from=FILE
# To go on from the latest checkpoint: --resume --cfg-options load_from=None
load_from = 'https://download.openmmlab.com/mmediting/restorers/edsr/edsr_x4c64b16_1x16_300k_div2k_20200608-3c2af8a3.pth'

model = dict(
    generator=dict(
        _delete_=True,
        type='QuantizedNetwork',
        generator=_base_.model.generator,
        quant=dict(
            w_bits=4,
            a_bits=4,
            scope='body',  # first and last layers and the up-sampler stay in floating point
            calibration=dict(
                num_images=100,
                # the training images, whole; test sets of the base config share its folder and not its list
                dataset=dict(_base_.train_dataloader.dataset, pipeline=_base_.val_pipeline)))))

# 60k iterations, batch 8, lr 1e-4 halved every 15k, as in the papers; ranges learn at their method's multiple of it
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_iters=60000)
optim_wrapper = dict(constructor='QuantizedOptimWrapperConstructor')
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
