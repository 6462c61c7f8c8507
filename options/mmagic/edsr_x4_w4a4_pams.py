# PAMS (ECCV 2020): quantization-aware training with learned symmetric bounds.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_pams'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='pams')))
