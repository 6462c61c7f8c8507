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

from basicsr_quant.deploy.tiles import Tiling, upscale
from basicsr_quant.errors import QuantError

cv2 = pytest.importorskip('cv2')
image_files = pytest.importorskip('basicsr_quant.data.image_files')
PngFile = pytest.importorskip('basicsr_quant.data.png_file').PngFile


def picture(height=37, width=53, channels=3, dtype=np.uint8, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), endpoint=True).astype(dtype)


def twice(image):
    return functional.interpolate(image, scale_factor=2)


def convolved(image):
    with torch.no_grad():
        return (functional.interpolate(tiny(blocks=1)(image), scale_factor=2) + 1) / 3


def whole(*args):
    return np.concatenate(list(upscale(*args)))


@pytest.mark.parametrize('size', [(37, 53), (16, 16), (5, 90), (1, 1), (64, 65)])
@pytest.mark.parametrize('tile, overlap, batch', [(16, 8, 1), (16, 4, 3), (32, 7, 2), (100, 16, 4)])
def test_tiles_cover_every_pixel_once(size, tile, overlap, batch):
    image, tiling, shapes, work = picture(*size), Tiling(tile, overlap, batch=batch), [], []

    def network(given):
        shapes.append(given.shape)
        return twice(given)

    result = whole(network, image, 2, tiling, work.append)
    np.testing.assert_array_equal(result, image.repeat(2, 0).repeat(2, 1))
    assert sum(work) == tiling.work(*size) == sum(n * h * w for n, _, h, w in shapes)
    assert all(h <= tile + 2 * overlap >= w and n <= batch for n, _, h, w in shapes)
    assert len({shape[2:] for shape in shapes}) == 1


def test_tiles_of_an_image_are_as_even_as_they_go():
    """1080 is five tiles of 216 and not four of 256 and one of 56, which would cost as much as the others."""
    assert Tiling(256, 16).window(1080, 1920) == (216 + 32, 240 + 32)


@pytest.mark.parametrize('tile', [16, 24, 33])
def test_there_is_no_seam_where_the_overlap_covers_the_receptive_field(tile):
    """Four layers of 3x3 see 4 pixels to each side."""
    image = picture(61, 70)
    untiled = whole(convolved, image, 2, Tiling(1000))
    np.testing.assert_array_equal(whole(convolved, image, 2, Tiling(tile, 4, batch=2)), untiled)
    assert (whole(convolved, image, 2, Tiling(tile, 0)) != untiled).any()


@pytest.mark.parametrize('size', [(10, 12), (40, 24), (41, 90)])
def test_a_file_for_one_size_takes_images_of_any(size):
    seen = set()

    def network(image):
        seen.add(tuple(image.shape))
        return twice(image)

    image = picture(*size)
    np.testing.assert_array_equal(
        whole(network, image, 2, Tiling(overlap=3, fixed=(40, 24))), image.repeat(2, 0).repeat(2, 1)
    )
    assert seen == {(1, 3, 40, 24)}


def test_another_scale_is_refused():
    with pytest.raises(QuantError, match='not 3 times'):
        whole(twice, picture(), 3, Tiling())


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['grey', 'colour', 'alpha'])
def test_every_kind_of_image_comes_back_as_its_kind(kind, channels, dtype, tmp_path):
    image = picture(channels={'grey': 1, 'colour': 3, 'alpha': 4}[kind], dtype=dtype)
    image = image[..., 0] if kind == 'grey' else image
    file = tmp_path / 'bild ümläut 图.png'
    with PngFile(file, 37, 53, 1 if image.ndim == 2 else image.shape[2], dtype) as png:
        for rows in np.split(image, [5, 30]):
            png.write(rows)
    read = image_files.read_image(file)
    np.testing.assert_array_equal(read, image)
    assert image_files.image_size(file) == (37, 53)
    calls = []

    def network(part):
        calls.append(part.shape[2])
        return iter(np.split(part.repeat(2, 0).repeat(2, 1), [20, 60]))

    result = np.concatenate(list(image_files.through_network(read, channels, 2, network)))
    assert result.dtype == dtype and result.shape == (74, 106, *image.shape[2:])
    assert calls == [channels] * image_files.passes(image.shape, channels)
    wanted = image.repeat(2, 0).repeat(2, 1)
    colours = (Ellipsis, slice(0, 3)) if kind == 'alpha' else ...
    np.testing.assert_array_equal(result[colours], wanted[colours])
    if kind == 'alpha':  # in bands as in one piece
        larger = cv2.resize(image[..., 3], (106, 74), interpolation=cv2.INTER_CUBIC)
        np.testing.assert_array_equal(result[..., 3], larger)


@pytest.mark.parametrize('orientation', range(10))
def test_photographs_are_turned_as_the_camera_was_held(orientation, tmp_path):
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(5, 7)).save(tmp_path / 'a.png', exif=exif)
    with Image.open(tmp_path / 'a.png') as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(image_files.read_image(tmp_path / 'a.png'), wanted)
    assert image_files.image_size(tmp_path / 'a.png') == wanted.shape[:2]


@pytest.mark.parametrize('rows', [1, 3, 5])
def test_a_png_file_with_rows_missing_or_too_many_is_none(rows, tmp_path):
    with pytest.raises(ValueError, match=f'{rows} of 4 rows'), PngFile(tmp_path / 'a.png', 4, 7, 1, np.uint8) as png:
        png.write(picture(rows, 7, 1)[..., 0])
    assert list(tmp_path.iterdir()) == []


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

    monkeypatch.setattr('basicsr_quant.data.png_file.os.fsync', full)
    assert command() == 2
    assert 'No space left on device' in capsys.readouterr().err
    assert list((tmp_path / 'out').iterdir()) == []


def test_a_network_that_fails_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    calls = []

    def fails(net, image):
        calls.append(image.shape[0])
        if len(calls) > 2:
            raise QuantError('the engine fails')
        return torch.nn.functional.interpolate(image, scale_factor=2)

    monkeypatch.setattr('basicsr.archs.edsr_arch.EDSR.forward', fails)
    assert command('--batch', '2', '--overlap', '0', '--tile', '16') == 2
    assert 'the engine fails' in capsys.readouterr().err
    assert max(calls) == 2 and list((tmp_path / 'out').iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_the_network_is_loaded(command, monkeypatch, capsys):
    def refuse(**_):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr('basicsr_quant.deploy.files.tempfile.TemporaryFile', refuse)
    assert command('-m', 'broken.pth') == 2
    assert 'cannot be written: Permission denied' in capsys.readouterr().err


@pytest.mark.parametrize('change, words', [
    (('-i', 'nowhere'), '-i nowhere does not exist'), (('-m', 'no.onnx'), 'no.onnx does not exist'),
    (('-o', 'one.png'), 'is one file'), (('-o', 'photos'), 'would write over'), (('--tile', '3'), '--tile 3'),
    (('--batch', '0'), '--batch 0'),
])  # fmt: skip
def test_requests_that_are_refused(command, change, words, capsys):
    assert command(*change) == 2
    assert words in capsys.readouterr().err
