"""Ranges and chosen bits, through the visualizer of the config to its backends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..cost import BitMeter, trace_at
from ..report.bit_map import bit_map
from ..report.ranges import RangeSeen, draw_ranges, ranges_table, watch_ranges
from .generator import run_of, the_quantized_network
from .report import dataset_name, image_name, to_uint8


@HOOKS.register_module()
class QuantizationVisualizationHook(Hook):
    """Gives the visualizer what quantization does, as pictures and scalars, on the main process.

    In training, at its first iteration and every ``interval``: the picture ``ranges`` of that iteration's pass (what
    the values of each layer's input and weight span, and what the range keeps of them), and the scalars
    ``ranges/<quantizer>/lower``, ``upper`` and ``sqnr``. In a test: the same of the first image, with a table in the
    log, and for methods that choose bits the picture ``<data set>_<image>_bits`` of each image: its output with the
    mean bits of each pass over it, one pass for each patch where ``quant.patch`` cuts it.

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
        patch = None if run.config.patch is None else (run.config.patch.size, run.config.patch.stride)
        image = to_uint8(outputs[0].output.get('pred_img')).transpose(1, 2, 0)
        picture = bit_map(image, bits.passes, patch, run.scale)
        if picture is not None:
            name = f'{dataset_name(runner.test_loop, batch_idx)}_{image_name(outputs[0])}_bits'
            runner.visualizer.add_image(name, picture[..., ::-1].copy(), 0)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    # -- ranges ----------------------------------------------------------------------------------------------------

    def _watch(self, runner: Any) -> None:
        self._seen = self._watching.enter_context(watch_ranges(the_quantized_network(runner.model)[1]))

    def _show(self, runner: Any, step: int) -> None:
        self._watching.close()
        seen, self._seen = self._seen, {}
        if not seen:
            return
        self._shown = True
        runner.visualizer.add_image('ranges', draw_ranges(seen)[..., ::-1].copy(), step)
        for name, found in seen.items():
            values = {'lower': found.lower, 'upper': found.upper, 'sqnr': found.sqnr}
            scalars = {f'ranges/{name}/{key}': value for key, value in values.items() if value is not None}
            runner.visualizer.add_scalars(scalars, step)
