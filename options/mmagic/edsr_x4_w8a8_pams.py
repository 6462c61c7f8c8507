# PAMS at 8 bits: the first stage of CADyQ.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w8a8_pams'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(method='pams', w_bits=8, a_bits=8)))
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_iters=300000)
param_scheduler = dict(milestones=[150000])
