# ODM on SwinIR x4 of MMagic: its linear layers and convolutions, activations of attention stay in floating point.
_base_ = 'mmagic::swinir/swinir_x4s48w8d6e180_8xb4-lr2e-4-500k_div2k.py'
custom_imports = dict(imports=['basicsr_quant.mmagic'], allow_failed_imports=False)

experiment_name = 'swinir_x4_w4a4_odm'
work_dir = f'./work_dirs/{experiment_name}'
load_from = 'https://download.openmmlab.com/mmediting/swinir/swinir_x4s48w8d6e180_8xb4-lr2e-4-500k_div2k-88e4903d.pth'
model = dict(
    generator=dict(
        _delete_=True,
        type='QuantizedNetwork',
        generator=_base_.model.generator,
        quant=dict(method='odm', w_bits=4, a_bits=4, scope='body', calibration=dict(num_images=100))))
train_cfg = dict(max_iters=60000)
optim_wrapper = dict(constructor='QuantizedOptimWrapperConstructor', optimizer=dict(lr=1e-4))
custom_hooks = [
    dict(type='RangeCalibrationHook'),
    dict(type='QuantizationReportHook'),
    dict(type='BasicVisualizationHook', interval=1),
]
