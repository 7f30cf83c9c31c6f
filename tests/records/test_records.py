import json
import math
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import similarity as slow_similarity

from lightning_cf.errors import ContinualError
from lightning_cf.partition.clusters import Partition
from lightning_cf.partition.similarity import Similarity
from lightning_cf.records.record import LayerRecord, PartitionRecord, complete_record

ALL = slice(None)


@st.composite
def groups(draw):
    """Arguments of a layer's record: any split of any candidates, with zero vectors."""
    units, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    candidates = sorted(draw(st.sets(st.integers(0, units - 1), min_size=1)))
    leaders = sorted(draw(st.sets(st.integers(0, len(candidates) - 1), min_size=1)))
    found = [i if i in leaders else draw(st.sampled_from(leaders)) for i in range(len(candidates))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    vectors = torch.randint(-2, 3, (units, inputs), generator=generator).to(dtype)
    owner = torch.full((units,), 0)
    owner[candidates] = -1
    owner[[candidates[i] for i in leaders]] = 1
    return {
        "candidates": torch.tensor(candidates),
        "found": Partition(torch.tensor(found), draw(st.floats(-2, 1))),
        "vectors": vectors,
        "biases": torch.randn(units, generator=generator).to(dtype),
        "owner": owner,
    }


def record_of(layers, **changes):
    values = {
        "task": "digits/0-4",
        "position": 3,
        "isolation": "exact",
        "constraints": {"threshold": "auto", "layers": None, "budget": {"layer.0": 3}, "exclude": ["a"]},
        "accuracy": 0.975,
        "ablation_accuracy": 0.97,
    }
    return PartitionRecord(**values | changes, layers=tuple(layers))


def group_of(units, inputs=3, seed=0, owned=0):
    """A group of random units, the first ones owned; clusters of two."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.arange(owned, units)
    owner = torch.full((units,), -1)
    owner[:owned] = 0
    owner[candidates[::2]] = 1
    return {
        "candidates": candidates,
        "found": Partition(torch.arange(len(candidates)) // 2 * 2, 0.5),
        "vectors": torch.randn(units, inputs, generator=generator),
        "biases": 0.3 * torch.randn(units, generator=generator),
        "owner": owner,
    }


def layer_of(units, name="fc", **options):
    return LayerRecord.of(name, (name,), **group_of(units, **options))


def similarity_of(layer):
    units = layer.candidates
    return Similarity(layer.magnitude[units, None] * layer.direction[units], layer.bias[units].double())


def stored_with(folder, *units):
    """Writes a record with all similarities; returns it as it was before."""
    layers = [layer_of(count, f"layer.{number}", seed=number) for number, count in enumerate(units)]
    record = record_of(layers)
    record.write(folder, {layer.name: similarity_of(layer) for layer in layers})
    return record


def assert_same(found, expected, *, similarities=()):
    for field in fields(found):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "layers" and isinstance(found, PartitionRecord):
            assert len(a) == len(b)
            for layer, other in zip(a, b, strict=True):
                assert_same(layer, other, similarities=similarities)
        elif field.name == "similarity":
            assert (a is not None) == (found.name in similarities)
        elif isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b
            assert type(a) is type(b)


def manifest_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((Path(folder) / "partition.json").read_text(), parse_constant=refuse)


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def tiles_of(size):
    return patch("lightning_cf.records.similarity_tiles.TILE", size)


class Killed(BaseException):
    pass


@contextmanager
def kill_at(target, call):
    """Lets a function be called so many times, and then no more."""
    original, calls = resolve_name(target), []

    def killing(*args, **kwargs):
        calls.append(args)
        if len(calls) > call:
            raise Killed
        return original(*args, **kwargs)

    with patch(target, killing), pytest.raises(Killed):
        yield


# What a layer's record is


@given(groups())
def test_a_layer_holds_each_unit_s_part_and_vector(group):
    layer = LayerRecord.of("fc", ("fc", "skip"), **group)
    candidates, found = group["candidates"].tolist(), group["found"].representative.tolist()
    expected = {unit: candidates[leader] for unit, leader in zip(candidates, found, strict=True)}
    units = range(len(group["vectors"]))
    assert layer.representative.tolist() == [expected.get(unit, -1) for unit in units]
    assert layer.non_redundant.tolist() == [unit for unit in units if expected.get(unit) == unit]
    assert layer.redundant.tolist() == [unit for unit in units if expected.get(unit, unit) != unit]
    assert (layer.name, layer.layers, layer.threshold) == ("fc", ("fc", "skip"), group["found"].threshold)
    assert layer.owner.tolist() == group["owner"].tolist()
    assert layer.bias.tolist() == group["biases"].tolist()
    for row, magnitude, direction in zip(group["vectors"].tolist(), layer.magnitude, layer.direction, strict=True):
        assert float(magnitude) == pytest.approx(math.hypot(*row), rel=1e-14)
        assert direction.tolist() == pytest.approx([x / (math.hypot(*row) or 1) for x in row], rel=1e-7)
    assert layer.magnitude.dtype == torch.float64
    assert layer.direction.dtype == (torch.float64 if group["vectors"].dtype == torch.float64 else torch.float32)


@given(groups())
def test_clusters_are_numbered_by_falling_magnitude(group):
    layer = LayerRecord.of("fc", ("fc",), **group)
    order = sorted(layer.non_redundant.tolist(), key=lambda unit: (-float(layer.magnitude[unit]), unit))
    expected = [order.index(leader) if leader >= 0 else -1 for leader in layer.representative.tolist()]
    assert layer.cluster.tolist() == expected


def test_magnitudes_neither_overflow_nor_vanish():
    group = group_of(2) | {"vectors": torch.tensor([[3e38, 3e38, 0.0], [3e-30, 4e-30, 0.0]])}
    layer = LayerRecord.of("fc", ("fc",), **group)
    assert layer.magnitude.tolist() == pytest.approx([3e38 * math.sqrt(2), 5e-30], rel=1e-6)
    torch.testing.assert_close(layer.direction[1], torch.tensor([0.6, 0.8, 0.0]))


def test_a_layer_shares_nothing_with_the_network():
    group = group_of(4)
    layer = LayerRecord.of("fc", ("fc",), **group)
    before = {field.name: getattr(layer, field.name) for field in fields(layer)}
    before = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    for name in ("candidates", "vectors", "biases", "owner"):
        group[name].fill_(7)
    assert all(torch.equal(getattr(layer, name), value) for name, value in before.items())


# Writing and reading


@given(st.lists(groups(), max_size=3), st.integers(1, 4), st.data())
def test_what_is_written_is_read(some_groups, tile, data):
    record = record_of(LayerRecord.of(f"layer.{i}", ("a", "b"), **group) for i, group in enumerate(some_groups))
    similarities = {}
    for layer, group in zip(record.layers, some_groups, strict=True):
        if data.draw(st.booleans()):
            units = group["candidates"]
            similarities[layer.name] = Similarity(group["vectors"][units], group["biases"][units])
    with TemporaryDirectory() as folder, tiles_of(tile):
        record.write(folder, similarities)
        found = PartitionRecord.load(folder)
        assert_same(found, record, similarities=similarities)
        for layer in found.layers:
            if layer.name in similarities:
                expected = similarities[layer.name].tile(ALL, ALL).float()
                expected = expected.triu() + expected.triu(1).T
                assert len(layer.similarity) == len(layer.candidates)
                assert torch.equal(layer.similarity.tile(ALL, ALL), expected)
                some = st.lists(st.integers(0, len(expected) - 1))
                rows, columns = (torch.tensor(data.draw(some), dtype=torch.int64) for _ in range(2))
                assert torch.equal(layer.similarity.tile(rows, columns), expected[rows][:, columns])
                assert torch.equal(layer.similarity.tile(slice(1, 4), columns), expected[1:4][:, columns])


@given(st.lists(groups(), min_size=1, max_size=3), st.data())
def test_a_completed_record_is_read(some_groups, data):
    layers = [LayerRecord.of(f"layer.{number}", ("fc",), **group) for number, group in enumerate(some_groups)]
    later = [replace_weights(group, data.draw(st.integers(0, 9))) for group in some_groups]
    after = {f"layer.{number}": (group["vectors"], group["biases"]) for number, group in enumerate(later)}
    expected = []
    for number, group in enumerate(later):
        moved = LayerRecord.of("moved", ("fc",), **group)
        polar = {f"{name}_after": getattr(moved, name) for name in ("magnitude", "direction", "bias")}
        expected.append(replace(layers[number], **polar))
    with TemporaryDirectory() as folder, TemporaryDirectory() as copy:
        record_of(layers).write(folder)
        complete_record(folder, after)
        found = PartitionRecord.load(folder)
        assert_same(found, record_of(expected))
        found.write(copy)
        assert_same(PartitionRecord.load(copy), record_of(expected))


def replace_weights(group, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(group["vectors"].shape, generator=generator)
    return group | {"vectors": vectors, "biases": group["biases"] + 1}


def test_the_files_speak_for_themselves_without_the_package(tmp_path):
    layer = layer_of(11, owned=2)
    with tiles_of(4):
        record_of([layer]).write(tmp_path, {"fc": similarity_of(layer)})
    manifest = manifest_of(tmp_path)
    (entry,) = manifest["layers"]
    arrays = {}
    for name, file in entry["arrays"].items():
        arrays[name] = np.load(tmp_path / file["file"], allow_pickle=False)
        assert list(arrays[name].shape) == file["shape"]
    assert set(arrays) <= set(manifest["meaning"])

    units, tile = arrays["candidates"], entry["similarity"]["tile"]
    count = entry["similarity"]["units"]
    matrix = np.full((count, count), np.nan)
    for row in range(0, count, tile):
        for column in range(row, count, tile):
            path = tmp_path / entry["similarity"]["folder"] / f"{row // tile}_{column // tile}.npy"
            block = np.load(path, allow_pickle=False)
            matrix[row : row + tile, column : column + tile] = block
            matrix[column : column + tile, row : row + tile] = block.T
    direction, bias = arrays["direction"][units], arrays["bias"][units].astype(float)
    np.testing.assert_allclose(matrix, direction @ direction.T - (bias[:, None] - bias) ** 2, atol=1e-6)

    leader = arrays["representative"]
    assert sorted(units) == sorted(np.flatnonzero(leader >= 0)) == list(range(2, 11))
    assert set(np.flatnonzero(leader == np.arange(11))) == set(np.flatnonzero(arrays["owner"] == 1))
    vectors = arrays["magnitude"][:, None] * arrays["direction"]
    np.testing.assert_allclose(vectors, group_of(11, owned=2)["vectors"].numpy(), rtol=1e-6)
    assert [manifest[name] for name in ("version", "task", "position", "isolation")] == [1, "digits/0-4", 3, "exact"]
    assert manifest["constraints"] == record_of([]).constraints
    assert (entry["name"], entry["layers"], entry["threshold"]) == ("fc", ["fc"], 0.5)
    assert torch.from_numpy(arrays["direction"]).shape == (11, 3)


def test_stored_similarities_equal_the_reference(tmp_path):
    group = group_of(9, owned=2)
    units, layer = group["candidates"], layer_of(9, owned=2)
    vectors, biases = group["vectors"][units], group["biases"][units]
    with tiles_of(4):
        record_of([layer]).write(tmp_path, {"fc": Similarity(vectors, biases)})
    stored = PartitionRecord.load(tmp_path).layers[0].similarity.tile(ALL, ALL)
    torch.testing.assert_close(stored, torch.tensor(slow_similarity(vectors, biases)), rtol=0, atol=1e-6)


class Watched(Similarity):
    def tile(self, rows, columns):
        found = super().tile(rows, columns)
        self.__dict__.setdefault("shapes", []).append(tuple(found.shape))
        return found


def test_writing_never_holds_more_than_a_tile(tmp_path):
    group = group_of(10)
    watched = Watched(group["vectors"], group["biases"])
    with tiles_of(4):
        record_of([layer_of(10)]).write(tmp_path, {"fc": watched})
    assert watched.shapes == [(4, 4), (4, 4), (4, 2), (4, 4), (4, 2), (2, 2)]


def test_reading_a_part_leaves_the_other_tiles_alone(tmp_path):
    with tiles_of(4):
        stored_with(tmp_path, 12)
    stored = PartitionRecord.load(tmp_path).layers[0].similarity
    expected = stored.tile(ALL, ALL)
    for path in tmp_path.rglob("similarity/*.npy"):
        if path.name != "0_2.npy":
            path.unlink()
    with patch("numpy.load", wraps=np.load) as load:
        assert torch.equal(stored.tile(slice(8, 12), torch.tensor([3, 0])), expected[8:12][:, [3, 0]])
    assert [call.kwargs["mmap_mode"] for call in load.call_args_list] == ["r"]
    with pytest.raises(ContinualError, match=r"0_0\.npy is missing or damaged"):
        stored.tile(ALL, ALL)


def test_numbers_that_json_does_not_have_survive(tmp_path):
    nan, inf = float("nan"), float("inf")
    constraints = {"a": nan, "b": [inf, {"c": -inf}], "budget": {"float": 12}, "text": "nan", "d": {"float": "x"}}
    layer = replace(layer_of(2), threshold=-inf)
    record_of([layer], constraints=constraints, accuracy=nan, ablation_accuracy=inf, task="nan").write(tmp_path)
    manifest_of(tmp_path)
    found = PartitionRecord.load(tmp_path)
    assert math.isnan(found.accuracy)
    assert found.ablation_accuracy == inf
    assert found.layers[0].threshold == -inf
    assert math.isnan(found.constraints["a"])
    assert found.constraints == constraints | {"a": found.constraints["a"]}
    assert found.task == "nan"


ODD = ["a/b", "../../up", ".hidden", "..", "", "x" * 300, "schicht.ü/你", "CON", "a_b", "a:b*?", "end.", "A_B", "a\\b"]


def test_layers_may_have_any_name(tmp_path):
    folder = tmp_path / "record"
    record = record_of([layer_of(3, name, seed=seed) for seed, name in enumerate(ODD)])
    record.write(folder, {name: similarity_of(layer) for name, layer in zip(ODD, record.layers, strict=True)})
    assert_same(PartitionRecord.load(folder), record, similarities=ODD)
    assert list(tmp_path.iterdir()) == [folder]
    for path in folder.rglob("*"):
        assert len(path.name) < 100
        assert path.name.isascii()
        assert not path.name.startswith(".")
        assert not path.name.endswith(".")
    assert len({path.name.lower() for path in (folder / "partition-0").iterdir()}) == len(ODD)


# Over an older record, and cut off


def test_a_new_record_replaces_the_older_one_wholly(tmp_path):
    (tmp_path / "partition-notes").mkdir()
    (tmp_path / "last.ckpt").touch()
    with tiles_of(2):
        stored_with(tmp_path, 9, 4, 5)
        old = PartitionRecord.load(tmp_path)
    record = stored_with(tmp_path, 3)
    assert_same(PartitionRecord.load(tmp_path), record, similarities=["layer.0"])
    assert (tmp_path / "partition-notes").is_dir()
    named = {file["file"] for entry in manifest_of(tmp_path)["layers"] for file in entry["arrays"].values()}
    tile = f"{manifest_of(tmp_path)['layers'][0]['similarity']['folder']}/0_0.npy"
    assert files_of(tmp_path) == named | {tile, "partition.json", "last.ckpt"}
    with pytest.raises(ContinualError, match="missing or damaged"):
        old.layers[0].similarity.tile(ALL, ALL)


def test_a_record_keeps_its_similarities_wherever_it_is_written(tmp_path):
    with tiles_of(2):
        record = stored_with(tmp_path / "a", 5, 3)
    found = PartitionRecord.load(tmp_path / "a")
    expected = [layer.similarity.tile(ALL, ALL) for layer in found.layers]
    found.write(tmp_path / "b")
    found.write(tmp_path / "a", {"layer.1": similarity_of(record.layers[1])})
    for folder in ("a", "b"):
        again = PartitionRecord.load(tmp_path / folder)
        assert_same(again, record, similarities=["layer.0", "layer.1"])
        for layer, matrix in zip(again.layers, expected, strict=True):
            assert torch.equal(layer.similarity.tile(ALL, ALL), matrix)


@pytest.mark.parametrize("call", range(14))
def test_a_first_record_cut_off_is_refused(tmp_path, call):
    with kill_at("numpy.save", call):
        stored_with(tmp_path, 4, 5)
    with pytest.raises(ContinualError, match="holds no record"):
        PartitionRecord.load(tmp_path)


@pytest.mark.parametrize(
    "moment", [*(("numpy.save", call) for call in range(14)), ("lightning_cf.records.manifest.write_atomically", 0)]
)
def test_a_record_cut_off_leaves_the_older_one(tmp_path, moment):
    older = stored_with(tmp_path, 3)
    with kill_at(*moment):
        stored_with(tmp_path, 4, 5)
    assert_same(PartitionRecord.load(tmp_path), older, similarities=["layer.0"])
    newer = stored_with(tmp_path, 4, 5)
    assert_same(PartitionRecord.load(tmp_path), newer, similarities=["layer.0", "layer.1"])
    assert len(list(tmp_path.glob("partition-*"))) == 1


def test_a_record_cut_off_while_the_older_one_goes_is_the_new_one(tmp_path):
    stored_with(tmp_path, 3)
    with kill_at("shutil.rmtree", 0):
        stored_with(tmp_path, 4, 5)
    assert [len(layer.magnitude) for layer in PartitionRecord.load(tmp_path).layers] == [4, 5]


# Completion


def weights(record, shift):
    return {
        layer.name: (layer.magnitude[:, None] * layer.direction.double() + shift, layer.bias) for layer in record.layers
    }


def test_completion_leaves_the_other_files_alone(tmp_path):
    record = stored_with(tmp_path, 4, 5)
    untouched = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    before = manifest_of(tmp_path)
    complete_record(tmp_path, {"layer.1": weights(record, 1.0)["layer.1"]})
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    after = manifest_of(tmp_path)
    added = [after["layers"][1]["arrays"].pop(f"{name}_after") for name in ("magnitude", "direction", "bias")]
    assert after.pop("checksum") != before.pop("checksum")
    assert after == before
    assert files_of(tmp_path) == {path.relative_to(tmp_path).as_posix() for path in untouched} | {
        "partition.json",
        *(entry["file"] for entry in added),
    }
    first, second = PartitionRecord.load(tmp_path).layers
    assert first.direction_after is None
    assert second.direction_after is not None


def test_a_second_completion_replaces_the_first(tmp_path):
    record = stored_with(tmp_path, 4, 5)
    complete_record(tmp_path, weights(record, 1.0))
    complete_record(tmp_path, {"layer.0": weights(record, 2.0)["layer.0"]})
    first, second = PartitionRecord.load(tmp_path).layers
    vectors = first.magnitude_after[:, None] * first.direction_after
    torch.testing.assert_close(vectors, weights(record, 2.0)["layer.0"][0])
    assert second.magnitude_after is None


@pytest.mark.parametrize("call", range(6))
def test_a_completion_cut_off_leaves_a_record_without_one(tmp_path, call):
    record = stored_with(tmp_path, 4, 5)
    complete_record(tmp_path, weights(record, 1.0))
    with kill_at("numpy.save", call):
        complete_record(tmp_path, weights(record, 2.0))
    assert_same(PartitionRecord.load(tmp_path), record, similarities=["layer.0", "layer.1"])


@pytest.mark.parametrize(("name", "units"), [("layer.9", 4), ("layer.0", 5)])
def test_completion_from_another_network_is_refused(tmp_path, name, units):
    record = stored_with(tmp_path, 4)
    with pytest.raises(ContinualError, match=rf"another network: the weights of '{name}' .*\[{units}, 3\]"):
        complete_record(tmp_path, {name: (torch.ones(units, 3), torch.ones(units))})
    assert_same(PartitionRecord.load(tmp_path), record, similarities=["layer.0"])


# What is no record


def test_a_folder_without_a_record_is_refused(tmp_path):
    for refused in (PartitionRecord.load, lambda folder: complete_record(folder, {})):
        with pytest.raises(ContinualError, match="nowhere holds no record of a partition; give a folder with"):
            refused(tmp_path / "nowhere")


def test_a_newer_format_is_refused(tmp_path):
    stored_with(tmp_path, 3)
    (tmp_path / "partition.json").write_text(json.dumps(manifest_of(tmp_path) | {"version": 2}))
    with pytest.raises(ContinualError, match=r"partition\.json has format 2; .* reads up to 1\. Update lightning_cf"):
        PartitionRecord.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": "1"}',
        '{"version": 1}',
        '{"version": 1, "layers": 3}',
        '{"version": 1, "layers": [{}]}',
    ],
)
def test_a_damaged_description_is_refused(tmp_path, text):
    stored_with(tmp_path, 3)
    (tmp_path / "partition.json").write_text(text)
    with pytest.raises(ContinualError, match=r"partition\.json is missing or damaged .* partition again"):
        PartitionRecord.load(tmp_path)


def lose(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    np.save(path, np.load(path).astype(object), allow_pickle=True)


def reshape(path):
    np.save(path, np.zeros((17,), np.float32))


@pytest.mark.parametrize("harm", [lose, cut, empty, pickled, reshape])
@pytest.mark.parametrize("name", ["candidates", "direction", "similarity/0_0"])
def test_missing_and_damaged_arrays_are_refused(tmp_path, harm, name):
    stored_with(tmp_path, 3)
    harm(tmp_path / "partition-0" / "0_layer.0" / f"{name}.npy")
    with pytest.raises(ContinualError, match=rf"{name}\.npy is missing or damaged .* copy the record's folder again"):
        PartitionRecord.load(tmp_path).layers[0].similarity.tile(ALL, ALL)
