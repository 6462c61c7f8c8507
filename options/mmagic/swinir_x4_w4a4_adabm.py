# AdaBM on SwinIR. Without training: tools/test.py with the FP32 checkpoint.
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w4a4_adabm'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='adabm', save_bits=True)))
