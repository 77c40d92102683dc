from __future__ import annotations

import json
import multiprocessing
import weakref
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tpmm_pl import tensor_files
from tpmm_pl.files import DiskError, file_sha256
from tpmm_pl.tensor_files import check_sha256, parts, read_tensors, write_tensors
from tpmm_pl.types import InputError


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.2.weight": torch.randn(6, 5, generator=generator),
        "model.10.weight": torch.randn(5, 6, generator=generator).T,
        "half": torch.randn(3, generator=generator).bfloat16(),
        'Größe "q" \\': torch.randn(7, generator=generator).half(),
        "small": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "double": torch.randn(2, 1, 2, dtype=torch.float64, generator=generator),
        "steps": torch.tensor(1 << 40),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.empty(0, 4),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        same = found[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().view(-1).view(torch.uint8)), name


def test_a_file_is_byte_for_byte_that_of_safetensors(tmp_path: Path) -> None:
    path, digest = write_tensors(tmp_path / "policy.safetensors", state())
    ours = {name: tensor.contiguous() for name, tensor in state().items()}
    save_file(ours, tmp_path / "theirs", metadata={"format": "pt"})
    assert path == tmp_path / "policy.safetensors"
    written = path.read_bytes()
    theirs = (tmp_path / "theirs").read_bytes()
    assert len(written) == len(theirs)
    # our header escapes nothing more and nothing less than theirs
    assert json.loads(written[8:].split(b"}}")[0] + b"}}") == json.loads(
        theirs[8:].split(b"}}")[0] + b"}}"
    )
    assert written == theirs
    assert digest == sha256(written).hexdigest()
    assert_same(read_tensors(path), state())


def test_a_large_state_is_several_files_with_an_index(tmp_path: Path) -> None:
    path, digest = write_tensors(tmp_path / "policy.safetensors", state(), largest=130)
    assert path.name == "policy.safetensors.index.json"
    assert digest == file_sha256(path)
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"policy-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state().values())
    assert index["metadata"]["sha256"] == {f: file_sha256(tmp_path / f) for f in files}
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, path.name]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert all(
        sum(t.nbytes for t in held.values()) <= 130 or len(held) == 1
        for held in (load_file(tmp_path / file) for file in files)
    )
    assert_same(read_tensors(path), state())
    assert check_sha256(path, digest) is None


def test_a_state_of_just_the_size_is_one_file(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in state().values())
    path = tmp_path / "policy.safetensors"
    assert write_tensors(path, state(), largest=size).path == path
    assert write_tensors(path, state(), largest=size - 1).path != path


def test_one_tensor_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def gathered(tensor: Tensor) -> Tensor:
        alive.append(sum(one() is not None for one in held))
        whole = tensor.clone()
        held.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(tensor_files, "_whole", gathered)
    names = [f"w{k}" for k in range(6)]
    write_tensors(tmp_path / "p.safetensors", {n: torch.ones(8) for n in names}, largest=100)
    assert alive == [0] * 6


def test_a_type_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"w is torch\.complex128, which safetensors files"):
        write_tensors(tmp_path / "p.safetensors", {"w": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_index_and_the_file_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.safetensors"
    write_tensors(path, {"w": torch.zeros(2)})
    before = path.read_bytes()
    gathered: list[int] = []

    def full(tensor: Tensor) -> Tensor:
        gathered.append(1)
        if len(gathered) == 2:
            raise OSError(28, "No space left on device")
        return tensor

    monkeypatch.setattr(tensor_files, "_whole", full)
    with pytest.raises(DiskError, match=r"policy\.safetensors cannot be written \(no space left"):
        write_tensors(path, {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file", [0, 1, "index"])
@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damage_to_any_file_of_an_index_is_found(
    file: int | str, damage: str, tmp_path: Path
) -> None:
    path, digest = write_tensors(tmp_path / "policy.safetensors", state(), largest=130)
    broken = path if file == "index" else tmp_path / sorted(parts(path))[int(file)]
    content = bytearray(broken.read_bytes())
    if damage == "missing":
        broken.unlink()
    else:
        content[-1] ^= 1
        broken.write_bytes(content if damage == "flipped" else content[:-1])
    fault = check_sha256(path, digest)
    assert fault is not None
    assert fault.startswith(f"{broken} is ")
    assert ("missing" in fault) == (damage == "missing")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret", "sub/x.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    index = tmp_path / "run" / "policy.safetensors.index.json"
    (index.parent / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", index.parent / "sub" / "x.safetensors"):
        save_file({"w": torch.zeros(1)}, place)
    content = {"metadata": {"sha256": {name: "0" * 64}}, "weight_map": {"w": name}}
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"leads out of|in another folder"):
        read_tensors(index)


def test_a_file_of_an_index_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path, digest = write_tensors(tmp_path / "run" / "policy.safetensors", state(), largest=130)
    moved = sorted(path.parent.glob("policy-*"))[0]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    for use in (read_tensors, lambda index: check_sha256(index, digest)):
        with pytest.raises(InputError, match=f"'{moved.name}' leads out of"):
            use(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}, "metadata": []}'])
def test_what_is_no_index_is_said(content: str, tmp_path: Path) -> None:
    index = tmp_path / "policy.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=r"no index|Expecting"):
        read_tensors(index)


def _in_two(rank: int, folder: str) -> list[tuple[str, str]]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = {name: tensor for name, tensor in state().items() if tensor.ndim}
    spread = {
        name: distribute_tensor(tensor.contiguous(), mesh, [Shard(0)])
        for name, tensor in whole.items()
        if tensor.is_floating_point() and tensor.element_size() > 1
    }
    # the other process writes nothing, wherever it would
    mine = Path(folder) / ("theirs" if rank else "out") / "policy.safetensors"
    outcomes = []
    for path in (mine, Path(folder) / "store" / "policy.safetensors"):
        try:
            written, digest = write_tensors(path, {**whole, **spread}, largest=130)
            outcomes.append((str(written), digest))
        except OSError as error:
            outcomes.append((type(error).__name__, str(error)))
    dist.destroy_process_group()
    return outcomes


@pytest.mark.slow
def test_shards_are_gathered_and_the_first_process_writes(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(_in_two, [(rank, str(tmp_path)) for rank in range(2)])
    assert first == second, "one outcome for all, also where the first process fails"
    (written, digest), (failure, _) = first
    assert written == str(tmp_path / "out" / "policy.safetensors.index.json")
    assert check_sha256(Path(written), digest) is None
    expected = {name: tensor for name, tensor in state().items() if tensor.ndim}
    assert_same(read_tensors(Path(written)), expected)
    assert not (tmp_path / "theirs").exists()
    assert failure == "FileExistsError", "a folder cannot be made where there is a file"
