"""Option files, data sets and checkpoints that cannot work are refused in one sentence that names the option."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from basicsr_quant.data.check import check_dataset, check_options
from basicsr_quant.data.check_lmdb import _check_length
from basicsr_quant.errors import QuantError

Options = dict[str, Any]


def remove(options: Options, path: str) -> None:
    *parents, last = path.split(':')
    for key in parents:
        options = options[key]
    del options[last]


def change(options: Options, path: str, value: Any) -> None:
    *parents, last = path.split(':')
    for key in parents:
        options = options[key]
    options[last] = value


def refusal(check: Callable[[], Any]) -> str:
    with pytest.raises(QuantError) as caught:
        check()
    message = str(caught.value)
    assert '\n' not in message
    return message


def use_lmdb(options: Options, root: Path) -> None:
    for data in options['datasets'].values():
        data.update(dataroot_gt=str(root / 'gt.lmdb'), dataroot_lq=str(root / 'lq.lmdb'), io_backend={'type': 'lmdb'})


@pytest.fixture
def copied(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to damage."""
    return Path(shutil.copytree(images, tmp_path / 'copied'))


def test_a_stock_file_passes(options: Options, images: Path) -> None:
    check_options(options, is_train=True)
    check_options(options, is_train=False)
    use_lmdb(options, images)
    check_options(options, is_train=True)


@pytest.mark.parametrize('key', [
    'name', 'model_type', 'num_gpu', 'datasets', 'network_g', 'network_g:type', 'path', 'scale', 'train', 'logger',
    'train:total_iter', 'train:optim_g', 'train:optim_g:type', 'train:scheduler:type', 'logger:print_freq',
    'logger:save_checkpoint_freq', 'logger:use_tb_logger', 'val:val_freq', 'val:save_img', 'datasets:train',
    'datasets:train:name', 'datasets:train:type', 'datasets:train:dataroot_gt', 'datasets:train:dataroot_lq',
    'datasets:train:io_backend', 'datasets:train:io_backend:type', 'datasets:train:gt_size',
    'datasets:train:use_hflip', 'datasets:train:use_rot', 'datasets:train:batch_size_per_gpu',
    'datasets:train:num_worker_per_gpu', 'datasets:val:dataroot_lq',
])
def test_a_missing_key_is_named(key: str, options: Options) -> None:
    remove(options, key)
    message = refusal(lambda: check_options(options, is_train=True))
    assert key.replace(':', '.') in message
    assert 'missing' in message


@pytest.mark.parametrize(('key', 'value', 'said'), [
    ('num_gpu', -1, "num_gpu is -1; allowed are 'auto' and whole numbers"),
    ('num_gpu', 'all', "num_gpu is 'all'"),
    ('num_gpu', 99, 'num_gpu is 99, but torch sees'),
    ('datasets', [], r'datasets is \[\]; it must hold key: value pairs'),
    ('datasets:validation', {}, r"datasets.validation is no data set .*allowed are train, val"),
    ('datasets:train_2', {}, r'datasets.train_2 is no data set .*did you mean'),
    ('train:total_iter', '6e4', "train.total_iter is '6e4'"),
    ('train:total_iter', 0, 'train.total_iter is 0'),
    ('datasets:train:io_backend', {'type': 'lmbd'}, "io_backend.type is 'lmbd'; allowed: disk lmdb memcached"),
    ('datasets:train:dataroot_gt', 'nowhere', 'datasets.train.dataroot_gt nowhere does not exist$'),
    ('datasets:val:dataroot_lq', 'nowhere', 'datasets.val.dataroot_lq nowhere does not exist$'),
    ('datasets:train:dataroot_gt', 'datasets/DIV2K/HR.lmdb', 'prepare_div2k.py --source'),
    ('datasets:val:dataroot_gt', 'datasets/Set5/HR', 'prepare_div2k.py --benchmarks'),
    ('datasets:val:dataroot_gt', 'datasets/Set500/HR', 'does not exist$'),
    ('datasets:train:filename_tmpl', '{}x2', r"lacks 0000x2.png, the partner of 0000.png by filename_tmpl '{}x2'"),
    ('datasets:train:filename_tmpl', '{}{}', 'filename_tmpl is .*must hold {} once'),
    ('datasets:train:meta_info_file', 'nowhere.txt', 'datasets.train.meta_info_file nowhere.txt cannot be read'),
    ('datasets:train:batch_size_per_gpu', 0, 'batch_size_per_gpu is 0; it must be a whole number from 1'),
    ('datasets:train:batch_size_per_gpu', 11, '10 images with dataset_enlarge_ratio 1 do not fill one batch of 11'),
    ('datasets:train:num_worker_per_gpu', -1, 'num_worker_per_gpu is -1'),
    ('path:pretrain_network_g', 'no.pth', 'path.pretrain_network_g no.pth does not exist'),
    ('path:resume_state', 'no.state', 'path.resume_state no.state does not exist'),
])
def test_a_wrong_value_is_named(key: str, value: Any, said: str, options: Options, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change(options, key, value)
    assert re.search(said, refusal(lambda: check_options(options, is_train=True)))


def test_testing_reads_test_sets_or_else_validation_sets(options: Options) -> None:
    options['datasets']['train']['dataroot_gt'] = 'nowhere'  # not read
    check_options(options, is_train=False)
    options['datasets']['test_1'] = {**options['datasets']['val'], 'dataroot_lq': 'nowhere'}
    assert 'datasets.test_1.dataroot_lq' in refusal(lambda: check_options(options, is_train=False))
    del options['datasets']['test_1'], options['datasets']['val']
    assert 'neither test nor val' in refusal(lambda: check_options(options, is_train=False))


def test_an_enlarged_set_fills_a_batch(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    options['datasets']['train'].update(batch_size_per_gpu=20, dataset_enlarge_ratio=2)
    check_options(options, is_train=True)
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'one batch of 40' in refusal(lambda: check_options(options, is_train=True))


@pytest.mark.parametrize(('damage', 'said'), [
    (lambda root: (root / 'lq' / '0003.png').unlink(), 'holds 10 images and dataroot_lq .* 9; they must be pairs'),
    (lambda root: (root / 'lq' / '0003.png').rename(root / 'lq' / 'other.png'), 'lacks 0003.png, the partner'),
    (lambda root: [file.unlink() for file in (root / 'gt').iterdir()], 'dataroot_gt .* holds no images'),
])
def test_damaged_folders(damage: Callable[[Path], Any], said: str, options: Options, copied: Path) -> None:
    damage(copied)
    data = options['datasets']['train']
    data.update(dataroot_gt=str(copied / 'gt'), dataroot_lq=str(copied / 'lq'))
    assert re.search(f'datasets.train.*{said}', refusal(lambda: check_options(options, is_train=True)))


def cut(size: Callable[[int], int]) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        file = root / 'lq.lmdb' / 'data.mdb'
        file.write_bytes(file.read_bytes()[:size(file.stat().st_size)])

    return damage


def rewrite_meta(database: str, edit: Callable[[str], str]) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        file = root / database / 'meta_info.txt'
        file.write_text(edit(file.read_text()))

    return damage


@pytest.mark.parametrize(('damage', 'said'), [
    (cut(lambda size: 0), 'dataroot_lq .*lq.lmdb: data.mdb is damaged or cut short'),
    (cut(lambda size: 4096), 'dataroot_lq .*lq.lmdb: data.mdb is damaged or cut short'),
    (cut(lambda size: 8192), r'dataroot_lq .*lq.lmdb: data.mdb is cut short: it has 8192 of \d+ bytes'),
    (cut(lambda size: size // 2), 'dataroot_lq .*data.mdb is cut short'),
    (cut(lambda size: size - 4096), 'dataroot_lq .*data.mdb is cut short'),
    (lambda root: (root / 'lq.lmdb' / 'data.mdb').write_bytes(b'x' * 9000), 'dataroot_lq .*damaged or cut short'),
    (lambda root: (root / 'lq.lmdb' / 'data.mdb').unlink(), 'lq.lmdb is no BasicSR database: it lacks data.mdb'),
    (lambda root: (root / 'gt.lmdb' / 'meta_info.txt').unlink(), 'gt.lmdb is no .*: it lacks meta_info.txt'),
    (rewrite_meta('gt.lmdb', lambda text: ''), 'dataroot_gt .*gt.lmdb: meta_info.txt is empty'),
    (rewrite_meta('gt.lmdb', lambda text: text + '0010.png (32,40,3) 1\n'),
     r"gt.lmdb lacks the key '0010' that its meta_info.txt names \(1 of 11"),
    (rewrite_meta('lq.lmdb', lambda text: text.replace('0004.png (16,20,3) 1\n', '')),
     r"dataroot_gt .* has the key '0004', which datasets.train.dataroot_lq .* lacks \(1 such keys\)"),
    (rewrite_meta('lq.lmdb', lambda text: text.replace('(16,20,3)', '(8,10,3)', 1)),
     "image '0000' is 32x40 in dataroot_gt, 8x10 in dataroot_lq; that is not scale 2"),
])
def test_damaged_databases(damage: Callable[[Path], Any], said: str, options: Options, copied: Path) -> None:
    damage(copied)
    use_lmdb(options, copied)
    assert re.search(f'datasets.train.*{said}', refusal(lambda: check_options(options, is_train=True)))


def test_a_large_gt_size_is_refused(options: Options, images: Path) -> None:
    use_lmdb(options, images)
    options['datasets']['train']['gt_size'] = 34
    assert "gt_size is 34, but image '0000' is 32x40" in refusal(lambda: check_options(options, is_train=True))


def test_a_database_needs_the_ending(options: Options, images: Path) -> None:
    options['datasets']['train']['io_backend'] = {'type': 'lmdb'}
    assert 'must end in .lmdb' in refusal(lambda: check_options(options, is_train=True))


def test_a_short_but_whole_database_passes(images: Path) -> None:
    """A header may count pages at the end of the file that nothing uses; only what is stored must be there."""
    header = SimpleNamespace(info=lambda: {'last_pgno': 10**6}, stat=lambda: {'psize': 4096})
    _check_length(header, str(images / 'lq.lmdb'), 'here')


def test_single_images(options: Options, images: Path) -> None:
    data: Options = {'name': 'lq', 'type': 'SingleImageDataset', 'dataroot_lq': str(images / 'lq'),
                     'io_backend': {'type': 'disk'}}
    assert check_dataset(data, 'here') == 10
    assert check_dataset({**data, 'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}, 'here') == 10
    assert refusal(lambda: check_dataset({**data, 'dataroot_lq': 'no'}, 'here')) == 'here.dataroot_lq no does not exist'


def test_other_types_need_their_folders_only(images: Path) -> None:
    data: Options = {'name': 'mine', 'type': 'MyDataset', 'dataroot_any': str(images / 'lq')}
    assert check_dataset(data, 'here') is None
    assert 'here.dataroot_any no' in refusal(lambda: check_dataset({**data, 'dataroot_any': 'no'}, 'here'))


class Unsafe:
    """What ``weights_only`` must not build."""


@pytest.mark.parametrize(('content', 'said'), [
    ({'params': {}, 'x': Unsafe()}, r'cannot be read with torch.load\(weights_only=True\)'),
    (torch.zeros(2), 'holds Tensor, not a checkpoint'),
    ({'conv.weight': torch.zeros(2)}, "has no entry 'params', but conv.weight"),
])
def test_wrong_checkpoints(content: Any, said: str, options: Options, tmp_path: Path) -> None:
    options['path']['pretrain_network_g'] = str(tmp_path / 'net.pth')
    torch.save(content, tmp_path / 'net.pth')
    assert re.search(said, refusal(lambda: check_options(options, is_train=True)))
    check_options(options, is_train=True, resuming=True)


def test_cut_checkpoints(options: Options, tmp_path: Path) -> None:
    file = tmp_path / 'net.pth'
    options['path']['pretrain_network_g'] = str(file)
    torch.save({'params': {'w': torch.from_numpy(np.zeros(5000))}}, file)
    check_options(options, is_train=True)
    file.write_bytes(file.read_bytes()[:20000])
    assert 'cannot be read' in refusal(lambda: check_options(options, is_train=True))


def test_a_plain_state_dict_needs_its_key_off(options: Options, tmp_path: Path) -> None:
    torch.save({'conv.weight': torch.zeros(2)}, tmp_path / 'net.pth')
    options['path'].update(pretrain_network_g=str(tmp_path / 'net.pth'), param_key_g=None)
    check_options(options, is_train=True)
