# SLS (CVPR 2022) with ODM (ECCV 2024) at 4 bits: N of 32 weights a layer, learned with the ranges.
_base_ = './edsr_x4_w4a4_odm.py'

experiment_name = 'edsr_x4_sls_w4a4_odm'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(
    quant=dict(odm=dict(init='mse')),
    sparsity=dict(
        method='sls',
        M=32,
        budget=0.25,  # of the MACs of the masked layers. Published: 0.25, 0.125, 0.0625
        sls=dict(cost_weight=0.45, gain=0.05))))
