"""Ranges and chosen bits, through the visualizer of the config to its backends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..cost import BitMeter, trace_at
from ..network.patches import spans
from ..quantizers import complexity
from ..report.bit_map import cells_of, draw_bit_map, draw_layer_chart, with_legend
from ..report.patch_bits import PatchBits, layer_shares, write_patch_bits
from ..report.ranges import RangeSeen, draw_ranges, ranges_table, watch_ranges
from .generator import run_of, the_quantized_network
from .report import dataset_name, image_name, to_uint8


@HOOKS.register_module()
class QuantizationVisualizationHook(Hook):
    """Gives the visualizer what quantization does, as pictures and scalars, on the main process.

    In training, at its first iteration and every ``interval``: the picture ``ranges`` of that iteration's pass (what
    the values of each layer's input and weight span, and what the range keeps of them), and the scalars
    ``ranges/<quantizer>/lower``, ``upper`` and ``sqnr``. In a test: the same of the first image, with a table in the
    log; and for methods that choose bits the picture ``<data set>_<image>_bits`` of each image (its output with the
    mean bits of each pass over it, one pass for each patch where ``quant.patch`` cuts it), a chart of layers against
    bits, ``<data set>_layers``, and its figures in ``bits/<data set>.csv`` of the work directory. In a distributed test
    these are of the main process's images.

    Args:
        interval: Iterations between two pictures of a training.
        bit_maps: Whether images get their bits; default: as ``quant.save_bits`` says.
        ranges: Whether ranges are shown.
    """

    priority = 'LOW'  # behind the hook that calibrates

    def __init__(self, interval: int = 1000, bit_maps: bool | None = None, ranges: bool = True) -> None:
        self.interval, self.bit_maps, self.ranges = interval, bit_maps, ranges
        self._watching = ExitStack()
        self._seen: dict[str, RangeSeen] = {}
        self._meter: BitMeter | None = None
        self._shown = False
        self._patches: dict[str, list[PatchBits]] = {}

    # -- training --------------------------------------------------------------------------------------------------

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        due = not self._shown or self.every_n_train_iters(runner, self.interval)
        if self.ranges and due and is_main_process():
            self._watch(runner)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._show(runner, runner.iter + 1)

    # -- testing ---------------------------------------------------------------------------------------------------

    def before_test_epoch(self, runner: Any) -> None:
        if not is_main_process():
            return
        if self.ranges:
            self._watch(runner)
        _, net = the_quantized_network(runner.model)
        run = run_of(net)
        if self.bit_maps or (self.bit_maps is None and run.config.save_bits):
            self._meter = BitMeter(net, run.plan, trace_at(net, scale=run.scale))

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        if self._seen:
            runner.logger.info(f'Ranges of the first image:\n{ranges_table(self._seen)}')
        self._show(runner, 0)
        if self._meter is None:
            return
        bits = self._meter.image()
        outputs = outputs or ()
        if not bits.layers or len(outputs) != 1:  # a pass over several images has one mean of bits
            return
        run = run_of(the_quantized_network(runner.model)[1])
        dataset, image = dataset_name(runner.test_loop, batch_idx), image_name(outputs[0])
        output, given = to_uint8(outputs[0].output.get('pred_img')).transpose(1, 2, 0), outputs[0].get('input')
        patch, (height, width) = run.config.patch, given.shape[-2:]
        sides = (height, width) if patch is None else (patch.size, patch.size)
        stride = max(sides) if patch is None else patch.stride
        rows, columns = (spans(side, size, stride) for side, size in zip((height, width), sides))
        found = self._patches.setdefault(dataset, [])
        for (top, left), chosen in zip(((a, b) for a, *_ in rows for b, *_ in columns), bits.by_pass):
            part = given[None, :, top : top + sides[0], left : left + sides[1]].flip(1).float() / 255  # RGB in 0-1
            place = (left, top, part.shape[-1], part.shape[-2])
            found.append(PatchBits(image, *place, float(complexity(part).mean()), chosen))
        few, many = run.method.bit_limits
        picture = draw_bit_map(output, cells_of(rows, columns, bits.passes, run.scale), few, many)
        title = f'{image}, {run.plan.method}: bits of {len(bits.passes)} passes, mean {bits.fab:.2f}'
        _add(runner, f'{dataset}_{image}_bits', with_legend(picture, title, few, many))

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None
        for dataset, patches in self._patches.items():
            write_patch_bits(os.path.join(runner.work_dir, 'bits', f'{dataset}.csv'), patches)
            mean = sum(p.fab for p in patches) / len(patches)
            title = f'{dataset}: share of {len(patches)} passes, mean {mean:.2f} bits'
            _add(runner, f'{dataset}_layers', draw_layer_chart(layer_shares(patches), title))
        self._patches = {}

    # -- ranges ----------------------------------------------------------------------------------------------------

    def _watch(self, runner: Any) -> None:
        self._seen = self._watching.enter_context(watch_ranges(the_quantized_network(runner.model)[1]))

    def _show(self, runner: Any, step: int) -> None:
        self._watching.close()
        seen, self._seen = self._seen, {}
        if not seen:
            return
        self._shown = True
        _add(runner, 'ranges', draw_ranges(seen), step)
        for name, found in seen.items():
            values = {'lower': found.lower, 'upper': found.upper, 'sqnr': found.sqnr}
            scalars = {f'ranges/{name}/{key}': value for key, value in values.items() if value is not None}
            runner.visualizer.add_scalars(scalars, step)


def _add(runner: Any, name: str, picture: Any, step: int = 0) -> None:
    """Give the visualizer a picture of OpenCV's channel order; it wants RGB."""
    runner.visualizer.add_image(name, picture[..., ::-1].copy(), step)
