# PAMS on SwinIR.
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w4a4_pams'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='pams')))
