# DAQ (WACV 2022): a range for each channel and image from its mean and deviation. Without training: tools/test.py.
_base_ = './edsr_x4_quantized.py'

experiment_name = 'edsr_x4_w4a4_daq'
work_dir = f'./work_dirs/{experiment_name}'
model = dict(generator=dict(quant=dict(
    method='daq',
    calibration=dict(num_images=8),
    daq=dict(distribution='gaussian', step_table='auto', stat_bits=4))))
