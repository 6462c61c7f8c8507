# CADyQ on the convolutions of SwinIR, from the network of swinir_x4_w8a8_pams.py, which teaches it too.
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w8a8_cadyq'
work_dir = f'./work_dirs/{experiment_name}'
load_from = './work_dirs/swinir_x4_w8a8_pams/net_g_latest.pth'
model = dict(generator=dict(quant=dict(
    method='cadyq',
    w_bits=8,
    a_bits=8,
    save_bits=True,
    layers={'*.qkv': 'fp', '*.proj': 'fp', '*.fc1': 'fp', '*.fc2': 'fp'},
    cadyq=dict(bits=[4, 6, 8]),
    distill=dict(teacher='start', loss='attention', layers={'conv_after_body': 1000, 'layers.*.conv': 100}))))
