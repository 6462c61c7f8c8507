"""What a test measures per image, and the result files it leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from basicsr.metrics.psnr_ssim import calculate_psnr, calculate_ssim
from basicsr.utils import get_root_logger, imwrite, tensor2img
from torch import Tensor, nn

from ..cost import BitMeter, MeasuredBits, SizedTrace, cost_of, in_patches, trace_at
from ..methods import method_of
from ..network.patches import spans
from ..quantizers import complexity
from ..report.bit_map import cells_of, draw_bit_map, draw_layer_chart, with_legend
from ..report.patch_bits import PatchBits, layer_shares, rank_correlation, write_patch_bits
from ..report.results import ResultWriter

CORRELATION = 'bits_gradient_rank_correlation'


class Evaluation:
    """Follows the host's test loop and records each image.

    PSNR and SSIM are always those of the Y channel of the output rounded to uint8, with a border of ``scale`` pixels
    left out, by the host's functions, whatever ``val.metrics`` holds. The host's own metrics go under ``extra``.

    Args:
        run: What the seam prepared.
        opt: The host's options.
        calibration: What the result files say of the calibration.
    """

    def __init__(self, run: dict[str, Any], opt: dict[str, Any], calibration: Mapping[str, Any] | None) -> None:
        self.scale = int(opt.get('scale', 1))
        self.opt = opt
        self.run = run
        self.seconds = 0.0
        self._dataset = ''
        self._image = ''
        self._meter: BitMeter | None = None
        self._sized: SizedTrace | None = None
        self._patches: list[PatchBits] = []
        self.writer = ResultWriter(
            name=opt['name'],
            method=run['plan'].method,
            w_bits=run['w_bits'],
            a_bits=run['a_bits'],
            checkpoint=run['checkpoint'],
            plan=run['plan'],
            calibration=calibration,
        )

    def begin_dataset(self, dataloader: Any) -> None:
        """The host starts on a data set."""
        self._dataset = dataloader.dataset.opt['name']

    def begin_image(self, data: dict[str, Any]) -> None:
        """The host has fed an image; it is named by its ground truth, or by the LQ file where there is none."""
        path = (data.get('gt_path') or data.get('lq_path') or [''])[0]
        self._image = os.path.splitext(os.path.basename(path))[0]

    def watch(self, net: nn.Module) -> None:
        """From now on the passes of ``net``, the bare network under test, are asked for their bits."""
        if self._meter is None:
            self._sized = trace_at(net, scale=self.scale)
            self._meter = BitMeter(net, self.run['plan'], self._sized)

    def end_image(self, visuals: dict[str, Tensor]) -> None:
        """The host has the output."""
        psnr = ssim = None
        if 'gt' in visuals and visuals['result'].dim() == 4:  # not a clip of frames
            output, truth = tensor2img([visuals['result']]), tensor2img([visuals['gt']])
            if output.shape == truth.shape:
                options = {'crop_border': self.scale, 'test_y_channel': output.ndim == 3}
                psnr = float(calculate_psnr(output, truth, **options))
                ssim = float(calculate_ssim(output, truth, **options))
        bits = self._meter.image() if self._meter is not None else None
        if bits is not None and bits.passes and self.run['save_bits'] and visuals['result'].dim() == 4:
            self._save_bits(visuals, bits)
        self.writer.add_image(
            self._dataset,
            self._image,
            psnr=psnr,
            ssim=ssim,
            fab=None if bits is None else bits.fab,
            fab_mac=None if bits is None else bits.fab_mac,
            seconds=self.seconds,
        )

    def _save_bits(self, visuals: dict[str, Tensor], bits: MeasuredBits) -> None:
        """Write ``<image>_bits.png``: the output with the bits of each patch over it; keep them for the table."""
        patch, (height, width) = self.run['patch'], visuals['lq'].shape[-2:]
        sides = (height, width) if patch is None else (patch.size, patch.size)
        stride = max(sides) if patch is None else patch.stride
        rows, columns = (spans(n, size, stride) for n, size in zip((height, width), sides))
        if len(rows) * len(columns) != len(bits.passes):
            return  # a host that cuts images into tiles of its own
        for (top, left), found in zip(((a, b) for a, *_ in rows for b, *_ in columns), bits.by_pass):
            part = visuals['lq'][..., top : top + sides[0], left : left + sides[1]]
            place = (left, top, part.shape[-1], part.shape[-2])
            self._patches.append(PatchBits(self._image, *place, float(complexity(part).mean()), found))
        output = tensor2img([visuals['result']])
        scale = output.shape[0] // height
        few, many = method_of(self.run['plan']).bit_limits
        picture = draw_bit_map(output, cells_of(rows, columns, bits.passes, scale), few, many)
        kind = 'the image' if len(bits.passes) == 1 else f'{len(bits.passes)} patches of {sides[0]}x{sides[1]}'
        title = f'{self._image}, {self.run["plan"].method}: bits of {kind}, mean {bits.fab:.2f}'
        folder = os.path.join(self.opt['path']['visualization'], self._dataset)
        imwrite(with_legend(picture, title, few, many), os.path.join(folder, f'{self._image}_bits.png'))

    def _end_bits(self) -> None:
        """Write what the patches of a data set say: a table, a chart of layers, a correlation."""
        patches, self._patches = self._patches, []
        if not patches:
            return
        folder = os.path.join(os.path.dirname(self.opt['path']['visualization']), 'bits')
        write_patch_bits(os.path.join(folder, f'{self._dataset}.csv'), patches)
        mean = sum(p.fab for p in patches) / len(patches)
        count = f'share of {len(patches)} patches, their mean {mean:.2f} bits'
        title = f'{self._dataset}, {self.run["plan"].method}: {count}'
        imwrite(draw_layer_chart(layer_shares(patches), title), os.path.join(folder, f'{self._dataset}.png'))
        found = rank_correlation([p.gradient for p in patches], [p.fab for p in patches])
        if found is not None:
            self.writer.add_extra(self._dataset, CORRELATION, found)

    def end_dataset(self, model: Any) -> None:
        """The host is through with a data set: write what there is, so that a run cut short leaves it."""
        for metric, value in (getattr(model, 'metric_results', None) or {}).items():
            self.writer.add_extra(self._dataset, metric, float(value))
        self._end_bits()
        self.watch(model.get_bare_model(model.net_g))  # for a data set without images
        assert self._sized is not None and self._meter is not None
        self.writer.cost = cost_of(
            self._sized, self.run['plan'], self._meter.mean_bits(), self._meter.mean_products()
        )
        patch = self.run['patch']
        if patch is not None:
            self.writer.cost = in_patches(self.writer.cost, self._sized, patch.size, patch.stride)
        folder = os.path.join(os.path.dirname(self.opt['path']['visualization']))
        self.writer.write(folder)
        get_root_logger().info('Results of %s:\n%s', self._dataset, self.writer.summary())
