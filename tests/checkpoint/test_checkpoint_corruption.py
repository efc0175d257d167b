"""Damaged and hostile folders: one sentence that names file or tensor, quickly, and never a wrong load."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint.models import deepseek_v3, saved, trained
from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.hf.naming import named, published
from consilium.checkpoint.verify import verify_folder
from consilium.disk import manifest
from consilium.disk.atomic import commit_folder
from consilium.disk.manifest import verify
from consilium.errors import ConsiliumError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECONDS = 2.0
Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("single") / "model", deepseek_v3(depth=1))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a hub has it: three shards with an index, and no manifest."""
    folder = saved(tmp_path_factory.mktemp("sharded") / "model", deepseek_v3(depth=1), manifest=False)
    tensors = safetensors_io.read(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    safetensors_io.write_sharded(folder, tensors, shard_bytes=size // 2)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def refused(action: Callable[[], object]) -> str:
    """The one sentence that ``action`` is refused with, within the limit of processor time."""
    start = time.process_time()
    with pytest.raises(ConsiliumError) as caught:
        action()
    assert time.process_time() - start < SECONDS
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 2000
    return text


def whole(folder: Path) -> None:
    for fault in verify_folder(folder).faults:
        raise ConsiliumError(fault)


def flip(path: Path, choose: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    path.write_bytes(data)


def cut(path: Path, choose: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: choose.randrange(len(data))])


def lengthen(path: Path, choose: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(choose.randrange(1, 100)))


def remove(path: Path, choose: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("trials", [75, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip, cut, lengthen, remove])
def test_damage_to_any_saved_file_is_found_and_the_file_named(
    damage: Damage, trials: int, single: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", trials)
    choose = random.Random(damage.__name__)
    files = sorted(path for path in single.rglob("*") if path.is_file())
    for trial in range(trials):
        folder = Path(shutil.copytree(single, tmp_path / str(trial)))
        file = folder / files[trial % len(files)].relative_to(single)
        damage(file, choose)
        assert f"{tmp_path}/{trial}/" in refused(lambda folder=folder: verify(folder))
        if damage is not remove:  # without its manifest a folder is one from elsewhere
            assert f"{tmp_path}/{trial}/" in refused(lambda folder=folder: whole(folder))
        if file.name == "config.json" or (file.name == WEIGHTS and damage is not flip):
            refused(lambda folder=folder: store.load(folder))
        shutil.rmtree(folder)


def header_of(path: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def changes(header: dict[str, dict[str, list[int]]], choose: random.Random) -> Iterator[str]:
    """Change ``header`` in a new way each time; yield the tensor that the error must name."""
    names = [name for name in header if name != "__metadata__"]
    entry = header[name := choose.choice(names)]
    header[f"{name}.extra"] = header.pop(name)
    yield name
    header[name] = header.pop(f"{name}.extra")
    for key, value in (
        ("shape", [*entry["shape"], 2]),
        ("shape", [-1]),
        ("shape", [0, 2**62, 2**62]),
        ("shape", [1.5]),
        ("shape", "all"),
        ("data_offsets", [entry["data_offsets"][0], entry["data_offsets"][1] + 4]),
        ("data_offsets", [0, 2**70]),
        ("data_offsets", [True, False]),
        ("dtype", "F8_E4M3"),
        ("dtype", ["F32"]),
    ):
        before = entry[key]
        entry[key] = value  # pyright: ignore[reportArgumentType]
        yield name
        entry[key] = before
    entry["stride"] = [1]
    yield name
    del entry["stride"]
    del entry["shape"]
    yield name


def test_a_header_changed_in_any_way_is_refused_by_tensor(sharded: Path, tmp_path: Path) -> None:
    choose = random.Random(0)
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    for _ in range(8):
        path = choose.choice(sorted(folder.glob("*.safetensors")))
        whole = path.read_bytes()
        header, data = header_of(path)
        for name in changes(header, choose):
            rewrite(path, header, data)
            text = refused(lambda: store.load(folder))
            assert name in text
        path.write_bytes(whole)
    store.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated"),
        (b"\x01", "is truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "is truncated"),
        (struct.pack("<Q", 2) + b"[]", "is not an object"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "is not JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "is not JSON"),
        (struct.pack("<Q", 21) + b'{"a":1,"b":2,"a":1}  ', "'a' twice"),
        (struct.pack("<Q", 2**27) + bytes(2**27), "more than the"),
        (b"PK\x03\x04 a pickled checkpoint", "is truncated"),
    ],
    ids=["empty", "byte", "length", "array", "binary", "deep", "twice", "huge", "zip"],
)
def test_a_file_that_is_not_safetensors_is_refused(
    content: bytes, message: str, single: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "model"))
    (folder / "manifest.json").unlink()
    (folder / WEIGHTS).write_bytes(content)
    text = refused(lambda: store.load(folder))
    assert message in text
    assert WEIGHTS in text


def test_a_header_of_a_million_tensors_is_refused_before_it_is_parsed(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "model"))
    (folder / "manifest.json").unlink()
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"tensor.{i}":{entry}' for i in range(10**6)) + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    assert "more than the" in refused(lambda: store.load(folder))


@pytest.mark.parametrize(
    "hostile",
    [
        "../secret.safetensors",
        "/etc/hostname",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "model.safetensors\x00",
        ".hidden.safetensors",
        "model.bin",
        "",
        "..",
        "a\n.safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_name_a_file_elsewhere(hostile: object, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = hostile
    (folder / INDEX).write_text(json.dumps(index))
    assert "which is not a file of this folder" in refused(lambda: store.load(folder))


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_file_that_links_out_of_the_folder_is_refused(
    kind: str, single: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree({"single": single, "sharded": sharded}[kind], tmp_path / "model"))
    shard = next(folder.glob("*.safetensors"))
    shutil.move(shard, tmp_path / "secret.safetensors")
    shard.symlink_to(tmp_path / "secret.safetensors")
    assert "which is not a file of this folder" in refused(lambda: store.load(folder))


def test_the_links_of_a_hugging_face_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    shutil.copytree(sharded, folder)
    blobs.mkdir()
    for shard in list(folder.glob("*.safetensors")):
        shutil.move(shard, blobs / shard.stem)
        shard.symlink_to(blobs / shard.stem)
    store.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_makes_no_sense_is_refused(text: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / INDEX).write_text(text)
    assert str(folder) in refused(lambda: store.load(folder))


def test_swapped_and_older_and_missing_shards_are_refused(sharded: Path, tmp_path: Path) -> None:
    one, two, three = sorted(path.name for path in sharded.glob("*.safetensors"))
    folder = Path(shutil.copytree(sharded, tmp_path / "swapped"))
    shutil.move(folder / one, folder / "kept")
    shutil.move(folder / two, folder / one)
    shutil.move(folder / "kept", folder / two)
    assert one in refused(lambda: store.load(folder))
    folder = Path(shutil.copytree(sharded, tmp_path / "copied"))
    shutil.copy(folder / two, folder / three)
    assert three in refused(lambda: store.load(folder))
    folder = Path(shutil.copytree(sharded, tmp_path / "missing"))
    (folder / two).unlink()
    assert two in refused(lambda: store.load(folder))


def test_a_tensor_dropped_renamed_transposed_or_added_is_refused_by_name(tmp_path: Path) -> None:
    model = trained(deepseek_v3(depth=1))
    folder = saved(tmp_path / "model", model.config, manifest=False)
    tensors = dict(named(model.config, model.state_dict(), published(model.config)))
    for number, (name, tensor) in enumerate(tensors.items()):
        flat = tensor.ndim != 2 or tensor.shape[0] == tensor.shape[1]
        broken = [
            {other: value for other, value in tensors.items() if other != name},
            {(f"{other}_" if other == name else other): value for other, value in tensors.items()},
            tensors | {name: tensor[None] if flat else tensor.T},
            tensors | {f"{name}_": tensor},
        ][number % 4]
        (folder / WEIGHTS).unlink()
        safetensors_io.write(folder / WEIGHTS, broken)
        assert name in refused(lambda: store.load(folder))


def test_an_older_shard_under_a_manifest_is_found(tmp_path: Path) -> None:
    old, new = (trained(deepseek_v3(), seed) for seed in (0, 1))
    store.save(old, tmp_path / "old")
    store.save(new, tmp_path / "new")
    shutil.copy(tmp_path / "old" / WEIGHTS, tmp_path / "new" / WEIGHTS)
    (fault,) = verify_folder(tmp_path / "new").faults
    assert f"new/{WEIGHTS} was changed after it was saved" in fault


def test_a_folder_that_is_as_it_was_has_no_faults(single: Path, sharded: Path) -> None:
    told: list[tuple[int, int]] = []
    report = verify_folder(str(single), progress=lambda done, total: told.append((done, total)))
    assert (report.sealed, report.faults) == (True, ())
    assert told[-1][0] == report.bytes - (single / "manifest.json").stat().st_size
    report = verify_folder(sharded)
    assert (report.sealed, report.faults, report.files) == (False, (), len(list(sharded.iterdir())))
    with pytest.raises(ConsiliumError, match="no such folder"):
        verify_folder(single / "absent")


def test_weights_are_not_hashed_to_load_them(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    plain = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: (hashed.append(path.name), plain(path))[1])
    store.load(single)
    assert set(hashed) <= {"config.json"}


def test_a_name_that_comes_twice_among_many_is_found_in_linear_time(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{i % 39_999}":{entry}' for i in range(40_000)) + "}").encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    assert "'0' twice" in refused(lambda: safetensors_io.read_header(tmp_path / WEIGHTS))


def test_a_changed_training_state_is_found(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "training_state").mkdir()
        safetensors_io.write(folder / store.TENSORS, {"moment": trained(deepseek_v3()).embed.weight})
        (folder / store.SCALARS).write_text('{"step": 12}')

    commit_folder(tmp_path / "step-12", write)
    (tmp_path / "step-12" / store.SCALARS).write_text('{"step": 13}')
    assert "state.json was changed" in refused(lambda: store.load_training_state(tmp_path / "step-12"))
