# PAMS at 8 bits on the convolutions of SwinIR: the first stage of swinir_x4_w8a8_cadyq.py.
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w8a8_pams'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='pams',
    w_bits=8,
    a_bits=8,
    layers={'*.qkv': 'fp', '*.proj': 'fp', '*.fc1': 'fp', '*.fc2': 'fp'})))
