# AdaBM (CVPR 2024): bits for each layer and image, ranges fine-tuned on unlabelled images. Without training:
# tools/test.py with the FP32 checkpoint.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_adabm'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='adabm',
    save_bits=True,
    # patch=dict(size=96, stride=96),  # bits for each patch of a large image, as the authors on Urban100
    adabm=dict(schedule='published'))))  # fast: two epochs, from better ranges and bits of layers alone
