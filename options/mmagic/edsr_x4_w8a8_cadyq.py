# CADyQ (ECCV 2022), candidates 4, 6 and 8 bits: a layer's bits follow the image. First stage: edsr_x4_w8a8_pams.py,
# whose network is where this one starts and what teaches it.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w8a8_cadyq'
work_dir = f'./work_dirs/{experiment_name}'
load_from = './work_dirs/edsr_x4_w8a8_pams/net_g_latest.pth'
model = dict(generator=dict(quant=dict(
    method='cadyq',
    w_bits=8,
    a_bits=8,  # the highest candidate
    save_bits=True,
    # patch=dict(size=96, stride=90),  # as published for 2K and 4K images
    cadyq=dict(
        bits=[4, 6, 8],
        bit_weight=1e-4,  # for a loss in 0-255, as published
        bit_growth=1e-6,  # a 1000 iterations
        selector_lr=1),
    distill=dict(
        teacher='start',  # load_from
        loss='attention',
        layers={'conv_after_body': 1000, 'body.*.conv2': 100}))))
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_iters=300000)
param_scheduler = dict(milestones=[150000])
