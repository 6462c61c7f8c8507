# ODM on SwinIR; activations inside attention stay in floating point (attention=True quantizes them).
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w4a4_odm'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='odm')))
