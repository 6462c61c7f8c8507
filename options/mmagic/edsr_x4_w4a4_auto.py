# auto: bits by what the output feels, weights rounded with their errors compensated. Without training: tools/test.py.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_auto'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='auto',
    auto=dict(
        budget=120,  # seconds
        a_granularity='channel',  # tensor: one range for a layer's input, which every integer engine takes
        mixed_bits=True,
        compensate=True))))
