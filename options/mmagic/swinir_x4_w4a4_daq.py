# DAQ on the convolutions of SwinIR. Without training: tools/test.py with the FP32 checkpoint.
_base_ = './swinir_x4_quantized.py'

experiment_name = 'swinir_x4_w4a4_daq'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='daq',
    layers={'*.qkv': 'fp', '*.proj': 'fp', '*.fc1': 'fp', '*.fc2': 'fp'},
    calibration=dict(num_images=8))))
