import gzip
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cf.data import (
    ImageSplits,
    RandomAffine,
    TensorImages,
    digits,
    mnist,
    permuted_tasks,
    rotated_tasks,
    split_tasks,
)
from lightning_cf.errors import ContinualError


def images(size, classes=6, side=4):
    generator = torch.Generator().manual_seed(size)
    return TensorImages(torch.rand(size, 1, side, side, generator=generator), torch.arange(size) % classes)


@pytest.fixture
def source():
    return ImageSplits(images(60), images(24), images(30))


def parts(task):
    loaders = task.train_dataloader(), task.data.val_dataloader(), task.data.test_dataloader()
    return {name: loader.dataset for name, loader in zip(("train", "val", "test"), loaders, strict=True)}


# Images


def test_a_fetched_batch_is_transformed_at_once():
    shapes = []

    def double(batch):
        shapes.append(tuple(batch.shape))
        return 2 * batch

    plain = images(6)
    seen = plain.transformed(double)
    x, y = seen.__getitems__([4, 1])
    assert torch.equal(x, 2 * plain.images[[4, 1]])
    assert y.tolist() == [4, 1]
    assert torch.equal(seen[3][0], 2 * plain.images[3])
    assert (len(seen), int(seen[3][1])) == (6, 3)
    assert shapes[0] == (2, 1, 4, 4)


@given(st.sets(st.integers(0, 7), max_size=5))
def test_images_of_some_classes_keep_their_order(classes):
    plain = images(20)
    chosen = [i for i, label in enumerate(plain.labels.tolist()) if label in classes]
    some = plain.of_classes(sorted(classes))
    assert torch.equal(some.images, plain.images[chosen])
    assert torch.equal(some.labels, plain.labels[chosen])


# Splits


@pytest.mark.parametrize(
    ("per_task", "names"), [(1, list("012345")), (2, ["0-1", "2-3", "4-5"]), (3, ["0-1-2", "3-4-5"])]
)
def test_split_tasks_hold_their_own_classes(source, per_task, names):
    tasks = split_tasks(source, classes_per_task=per_task)
    assert [task.name for task in tasks] == names
    for task in tasks:
        for name, part in parts(task).items():
            whole = getattr(source, name)
            assert set(part.labels.tolist()) == set(task.classes)
            assert len(part) == len(whole) * per_task // 6
            assert torch.equal(part.images, whole.images[torch.isin(whole.labels, torch.tensor(task.classes))])


def test_split_tasks_come_in_the_order_given(source):
    tasks = split_tasks(source, order=[5, 0, 3, 1])
    assert [(task.name, task.classes) for task in tasks] == [("5-0", [5, 0]), ("3-1", [3, 1])]


@pytest.mark.parametrize("order", [[0, 6], [0, 1, 1, 2], [-1, 0]])
def test_an_order_of_unknown_or_repeated_classes_is_refused(source, order):
    with pytest.raises(ContinualError, match=r"order must name classes of \[0, 1, 2, 3, 4, 5\], each once, got"):
        split_tasks(source, order=order)


@pytest.mark.parametrize(("per_task", "order"), [(4, None), (2, [0, 1, 2]), (7, None)])
def test_classes_that_cannot_be_shared_out_are_refused(source, per_task, order):
    with pytest.raises(ContinualError, match=rf"cannot be split into tasks of {per_task}; choose a classes_per_task"):
        split_tasks(source, classes_per_task=per_task, order=order)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (split_tasks, "classes_per_task"),
        (split_tasks, "batch_size"),
        (permuted_tasks, "count"),
        (permuted_tasks, "batch_size"),
        (rotated_tasks, "count"),
        (rotated_tasks, "batch_size"),
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
@pytest.mark.usefixtures("unchecked")
def test_counts_must_be_whole_numbers(source, make, option, value):
    with pytest.raises(ContinualError, match=f"{option} must be a whole number of at least 1, got {value!r}"):
        make(source, **{option: value})


# Domains


def test_permuted_tasks_shuffle_the_pixels_each_in_its_own_way(source):
    tasks = permuted_tasks(source, count=4)
    assert [task.name for task in tasks] == [f"permutation-{i}" for i in range(4)]
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    orders = []
    for task in tasks:
        assert task.classes == list(range(6))
        transforms = [part.transform for part in parts(task).values()]
        shuffled = [transform(pixels) for transform in transforms]
        assert all(torch.equal(image, shuffled[0]) for image in shuffled)
        assert shuffled[0].shape == pixels.shape
        assert sorted(shuffled[0].flatten().tolist()) == list(range(16))
        orders.append(tuple(shuffled[0].flatten().tolist()))
        assert all(torch.equal(part.labels, getattr(source, name).labels) for name, part in parts(task).items())
    assert orders[0] == tuple(range(16))
    assert len(set(orders)) == 4


def test_permutations_depend_on_the_seed_alone(source):
    def first_images(seed, count):
        return [parts(task)["test"][0][0] for task in permuted_tasks(source, count=count, seed=seed)]

    three, again, other = first_images(0, 3), first_images(0, 5), first_images(1, 3)
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=False))
    assert not torch.equal(three[1], other[1])


def test_all_pixels_of_all_channels_are_shuffled():
    colour = TensorImages(torch.rand(6, 3, 2, 2), torch.arange(6))
    second = permuted_tasks(ImageSplits(colour, colour, colour), count=2)[1]
    x, _ = parts(second)["train"].__getitems__(list(range(6)))
    order = [int((colour.images[0].flatten() == pixel).nonzero()) for pixel in x[0].flatten()]
    assert torch.equal(x.flatten(1), colour.images.flatten(1)[:, order])


def test_rotated_tasks_turn_further_each_time(source):
    tasks = rotated_tasks(source, count=5, degrees=90.0)
    assert [task.name for task in tasks] == ["rotated-0", "rotated-90", "rotated-180", "rotated-270", "rotated-360"]
    for turns, task in enumerate(tasks):
        x, y = parts(task)["test"].__getitems__(list(range(30)))
        torch.testing.assert_close(x, source.test.images.rot90(turns, (2, 3)), rtol=0, atol=1e-5)
        assert torch.equal(y, source.test.labels)
        assert task.classes == list(range(6))


@pytest.mark.parametrize("degrees", [360.0, 720.0, -360.0])
def test_a_whole_turn_is_the_identity(source, degrees):
    second = rotated_tasks(source, count=2, degrees=degrees)[1]
    x, _ = parts(second)["train"].__getitems__(list(range(60)))
    assert torch.equal(x, source.train.images)


def test_a_small_turn_moves_pixels_a_little():
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 7] = 1
    whole = TensorImages(dot, torch.tensor([0]))
    (x, _) = parts(rotated_tasks(ImageSplits(whole, whole, whole), count=2, degrees=45.0)[1])["train"].__getitems__([0])
    row, column = np.unravel_index(int(x.argmax()), (9, 9))
    assert math.hypot(row - 4, column - 4) == pytest.approx(3, abs=0.5)
    assert abs(row - 4) == abs(column - 4) == 2


def test_tasks_that_would_share_a_name_are_refused(source):
    with pytest.raises(ContinualError, match="degrees"):
        rotated_tasks(source, count=3, degrees=0.0)


# Loaders


@pytest.mark.parametrize(("batch_size", "batches"), [(16, 3), (60, 1), (64, 1)])
def test_a_last_batch_that_is_not_full_is_left_out_of_training(source, batch_size, batches):
    (task,) = permuted_tasks(source, count=1, batch_size=batch_size)
    sizes = [len(y) for _, y in task.train_dataloader()]
    assert sizes == [min(batch_size, 60)] * batches
    assert sum(len(y) for _, y in task.data.val_dataloader()) == 24
    assert sum(len(y) for _, y in task.data.test_dataloader()) == 30


def test_training_is_shuffled_and_testing_is_in_order(source):
    (task,) = permuted_tasks(source, count=1)
    torch.manual_seed(0)
    loader = task.train_dataloader()
    first, second = (torch.cat([y for _, y in loader]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([y for _, y in task.test_dataloader()]), source.test.labels)


def test_a_loader_without_images_is_empty(source):
    empty = ImageSplits(*[images(6).of_classes([])] * 3)
    (task,) = permuted_tasks(ImageSplits(source.train, empty.val, empty.test), count=1)
    assert list(task.data.val_dataloader()) == []


# Sources


def test_digits_are_split_in_three_fixed_stratified_parts():
    first, second = digits(), digits()
    whole = [getattr(first, name) for name in ("train", "val", "test")]
    assert [len(part) for part in whole] == [1077, 270, 450]
    assert all(part.images.shape[1:] == (1, 8, 8) for part in whole)
    assert all(part.images.min() >= 0 and part.images.max() == 1 for part in whole)
    for part in whole:
        shares = part.labels.bincount(minlength=10) / len(part)
        assert shares.sub(0.1).abs().max() < 0.01
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


def test_no_digit_is_in_two_parts():
    parts = [
        {tuple(image.flatten().tolist()) for image in getattr(digits(), name).images}
        for name in ("train", "val", "test")
    ]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert sum(map(len, parts)) == 1797


NAMES = {
    "train-images-idx3-ubyte": (5010, 2, 2),
    "train-labels-idx1-ubyte": (5010,),
    "t10k-images-idx3-ubyte": (7, 2, 2),
    "t10k-labels-idx1-ubyte": (7,),
}


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def arrays(tmp_path):
    """Random arrays, written as MNIST's files."""
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    generator = np.random.default_rng(0)
    found = {}
    for name, shape in NAMES.items():
        found[name] = generator.integers(0, 256 if len(shape) > 1 else 10, shape, dtype=np.uint8)
        (tmp_path / "MNIST" / "raw" / name).write_bytes(idx(found[name]))
    return found


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_from_plain_and_gzipped_files(arrays, tmp_path, zipped):
    if zipped:
        for path in list((tmp_path / "MNIST" / "raw").iterdir()):
            (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    splits = mnist(tmp_path)
    train_x, train_y, test_x, test_y = (torch.from_numpy(array) for array in arrays.values())
    for part, x, y in [
        (splits.train, train_x[:10], train_y[:10]),
        (splits.val, train_x[10:], train_y[10:]),
        (splits.test, test_x, test_y),
    ]:
        assert torch.equal(part.images, x.float()[:, None] / 255)
        assert torch.equal(part.labels, y.long())


def test_a_file_of_another_format_is_refused(arrays, tmp_path):
    path = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ContinualError, match=f"{path} is no IDX file of bytes; fetch it again"):
        mnist(str(tmp_path))


def test_a_file_that_was_cut_off_is_refused(arrays, tmp_path):
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ContinualError, match=f"{path}"):
        mnist(tmp_path)


def test_a_missing_file_is_named_with_the_way_out(arrays, tmp_path):
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ContinualError) as error:
        mnist(tmp_path)
    for part in ("t10k-labels-idx1-ubyte", str(tmp_path / "MNIST" / "raw"), "Set data_dir", "download=true"):
        assert part in str(error.value)


def test_mnist_needs_a_folder():
    with pytest.raises(ContinualError, match="MNIST needs data_dir=FOLDER"):
        mnist(None)


def test_augmentation_changes_training_images_alone_before_the_domain_does():
    torch.manual_seed(0)
    plain, changed = (permuted_tasks(digits(), count=2, batch_size=32, augment=a)[1] for a in (None, RandomAffine()))
    for stage in ("val", "test"):
        (x, _), (y, _) = (next(iter(getattr(task, f"{stage}_dataloader")())) for task in (plain, changed))
        assert torch.equal(x, y)
    torch.manual_seed(1)
    x, _ = next(iter(plain.train_dataloader()))
    torch.manual_seed(1)
    y, _ = next(iter(changed.train_dataloader()))
    assert x.shape == y.shape
    assert not torch.equal(x, y)
    dark = x.amax(dim=0) == 0  # the same pixels stay dark in both: the change came before the permutation
    assert float(y[:, dark].mean()) < 0.02


def test_a_random_affine_map_moves_no_further_than_it_says():
    image = torch.zeros(200, 1, 11, 11)
    image[:, 0, 5, 5] = 1
    torch.manual_seed(0)
    moved = RandomAffine(degrees=0, scale=0, shear=0, translate=0.2)(image)
    rows = (moved.sum(dim=3)[:, 0] * torch.arange(11.0)).sum(dim=1) / moved.sum(dim=(1, 2, 3))
    assert float((rows - 5).abs().max()) <= 0.2 * 11 + 1e-3
    assert float((rows - 5).std()) > 0.5
    turned = RandomAffine(degrees=90, scale=0, shear=0, translate=0)(image)
    torch.testing.assert_close(turned.amax(dim=(1, 2, 3)), torch.ones(200), rtol=0, atol=0.01)


@pytest.mark.parametrize("options", [{"degrees": -1}, {"scale": True}])
def test_wrong_augmentations_are_refused(options):
    with pytest.raises(ContinualError, match=f"RandomAffine: {next(iter(options))} must be"):
        RandomAffine(**options)
