"""Tiles without seams, images of any kind, folders that go on where they were."""

from __future__ import annotations

import errno
import importlib.util

import numpy as np
import pytest
import torch
import yaml
from helpers import tiny
from torch.nn import functional

from basicsr_quant.deploy.tiles import Tiling, count, upscale
from basicsr_quant.errors import QuantError

cv2 = pytest.importorskip('cv2')
image_files = pytest.importorskip('basicsr_quant.data.image_files')


def picture(height=37, width=53, channels=3, dtype=np.uint8, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), endpoint=True).astype(dtype)


def twice(image):
    return functional.interpolate(image, scale_factor=2)


def convolved(image):
    with torch.no_grad():
        return (functional.interpolate(tiny(blocks=1)(image), scale_factor=2) + 1) / 3


@pytest.mark.parametrize('size', [(37, 53), (16, 16), (5, 90), (1, 1), (64, 65)])
@pytest.mark.parametrize('tile, overlap', [(16, 8), (16, 4), (32, 7), (100, 16)])
def test_tiles_cover_every_pixel_once(size, tile, overlap):
    image, tiling, calls = picture(*size), Tiling(tile, overlap), []
    result = upscale(twice, image, 2, tiling, lambda: calls.append(1))
    np.testing.assert_array_equal(result, image.repeat(2, 0).repeat(2, 1))
    assert len(calls) == count(*size, tiling)


@pytest.mark.parametrize('tile', [16, 24, 33])
def test_there_is_no_seam_where_the_overlap_covers_the_receptive_field(tile):
    """Four layers of 3x3 see 4 pixels to each side."""
    image = picture(61, 70)
    whole = upscale(convolved, image, 2, Tiling(1000))
    np.testing.assert_array_equal(upscale(convolved, image, 2, Tiling(tile, 4)), whole)
    assert (upscale(convolved, image, 2, Tiling(tile, 0)) != whole).any()


@pytest.mark.parametrize('size', [(10, 12), (40, 24), (41, 90)])
def test_a_file_for_one_size_takes_images_of_any(size):
    seen = set()

    def network(image):
        seen.add(tuple(image.shape))
        return twice(image)

    image = picture(*size)
    np.testing.assert_array_equal(
        upscale(network, image, 2, Tiling(overlap=3, fixed=(40, 24))), image.repeat(2, 0).repeat(2, 1)
    )
    assert seen == {(1, 3, 40, 24)}


def test_another_scale_is_refused():
    with pytest.raises(QuantError, match='not 3 times'):
        upscale(twice, picture(), 3, Tiling())


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['grey', 'colour', 'alpha'])
def test_every_kind_of_image_comes_back_as_its_kind(kind, channels, dtype, tmp_path):
    image = picture(channels={'grey': 1, 'colour': 3, 'alpha': 4}[kind], dtype=dtype)
    image = image[..., 0] if kind == 'grey' else image
    file = tmp_path / 'bild ümläut 图.png'
    file.write_bytes(image_files.encode_png(image))
    read = image_files.read_image(file)
    np.testing.assert_array_equal(read, image)
    calls = []

    def network(part):
        calls.append(part.shape[2])
        return part.repeat(2, 0).repeat(2, 1)

    result = image_files.through_network(read, channels, 2, network)
    assert result.dtype == dtype and result.shape == (74, 106, *image.shape[2:])
    assert calls == [channels] * image_files.passes(image.shape, channels)
    wanted = image.repeat(2, 0).repeat(2, 1)
    colours = (Ellipsis, slice(0, 3)) if kind == 'alpha' else ...
    np.testing.assert_array_equal(result[colours], wanted[colours])


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A folder of three images, and the command with a tiny FP32 network x2."""
    if importlib.util.find_spec('basicsr') is None:
        pytest.skip('BasicSR is not installed')
    from basicsr_quant.cli import main

    monkeypatch.chdir(tmp_path)
    network = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2}
    (tmp_path / 'net.yml').write_text(yaml.safe_dump({'name': 'tiny', 'scale': 2, 'network_g': network}))
    import basicsr_quant

    basicsr_quant.enable()
    from basicsr_quant.models.preparation import build_float

    torch.save({'params': build_float(network).state_dict()}, 'net.pth')
    (tmp_path / 'photos').mkdir()
    for index, name in enumerate(('a.png', 'b c.png', 'd.jpg')):
        cv2.imwrite(str(tmp_path / 'photos' / name), picture(20, 24, seed=index))

    def call(*more):
        return main(['upscale', '-i', 'photos', '-o', 'out', '-m', 'net.pth', '-opt', 'net.yml', '--tile', '16', *more])

    return call


def test_a_folder_goes_on_where_it_was(command, tmp_path, capsys):
    assert command() == 0
    out = tmp_path / 'out'
    assert sorted(file.name for file in out.iterdir()) == ['a.png', 'b c.png', 'd.png']
    assert cv2.imread(str(out / 'a.png')).shape == (40, 48, 3)
    (out / 'a.png').unlink()
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert command() == 0
    assert '2 of 3 images are there already' in capsys.readouterr().out
    assert (out / 'a.png').exists() and all(file.stat().st_mtime_ns == t for file, t in times.items())


def test_a_truncated_image_is_named_and_the_others_are_done(command, tmp_path, capsys):
    file = tmp_path / 'photos' / 'a.png'
    file.write_bytes(file.read_bytes()[:-400])
    assert command() == 2
    assert 'a.png cannot be read as an image' in capsys.readouterr().err
    assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == ['b c.png', 'd.png']


def test_a_full_disk_leaves_nothing_half_written(command, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('basicsr_quant.deploy.onnx_file.os.fsync', full)
    assert command() == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert list((tmp_path / 'out').iterdir()) == []


@pytest.mark.parametrize('change, words', [
    (('-i', 'nowhere'), '-i nowhere does not exist'), (('-m', 'no.onnx'), 'no.onnx does not exist'),
    (('-o', 'one.png'), 'is one file'), (('-o', 'photos'), 'would write over'), (('--tile', '3'), '--tile 3'),
])  # fmt: skip
def test_requests_that_are_refused(command, change, words, capsys):
    assert command(*change) == 2
    assert words in capsys.readouterr().err
