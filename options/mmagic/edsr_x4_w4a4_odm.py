# ODM (ECCV 2024): quantization-aware training with a cooperative mismatch regularizer.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_odm'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='odm',
    odm=dict(
        regularizer='mismatch',
        gate='cosine',
        granularity='tensor',
        weight_clipping=True,
        mismatch_weight=1e-5,  # as published, for features in 0-255; converted by the measured feature scale
        init='percentile'))))  # the paper's; mse starts better at 2 bits
