# Calibrated ranges of least reconstruction error. Without training: tools/test.py with the FP32 checkpoint.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_mse'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='mse')))
