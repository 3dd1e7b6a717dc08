"""CIFAR as published: all forms of it give the same pixels, and no pickle of it is ever run."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from resnet_ddp import cifar, vision
from resnet_ddp.cifar import VARIANTS, download_and_prepare, prepare_cifar
from resnet_ddp.datasets import load_dataset, write_dataset
from resnet_ddp.exits import UserError

CLASSES = {name: [f"class{k}" for k in range(VARIANTS[name].num_classes)] for name in VARIANTS}


def images_and_labels(name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and labels (N,) of every class in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count) % len(CLASSES[name])


def parts(name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The training files' contents, and the test file's."""
    num_files = 6 if name == "cifar10" else 2
    return [images_and_labels(name, 200, seed) for seed in range(num_files)]


def planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def python_files(name: str) -> dict[str, bytes]:
    """What the python version's files hold, pickled by protocol 2 as Python 2 did."""
    *batch_names, meta = VARIANTS[name].python_files
    key, names_key = VARIANTS[name].python_label_key, VARIANTS[name].python_names_key
    files = {
        file: pickle.dumps(
            {"data": planes(images), key: labels.tolist(), "filenames": ["x.png"]}, protocol=2
        )
        for file, (images, labels) in zip(batch_names, parts(name), strict=True)
    }
    return files | {meta: pickle.dumps({names_key: CLASSES[name]}, protocol=2)}


def binary_files(name: str) -> dict[str, bytes]:
    *batch_names, meta = VARIANTS[name].binary_files
    files = {}
    for file, (images, labels) in zip(batch_names, parts(name), strict=True):
        columns = [labels.astype(np.uint8)[:, None], planes(images)]
        if name == "cifar100":
            columns.insert(0, np.full((len(labels), 1), 7, np.uint8))  # the coarse label
        files[file] = np.concatenate(columns, axis=1).tobytes()
    return files | {meta: ("\n".join(CLASSES[name]) + "\n\n").encode()}


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def unpacked(path: Path, files: dict[str, bytes]) -> Path:
    (path / "top").mkdir(parents=True)
    for name, content in files.items():
        (path / "top" / name).write_bytes(content)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_all_forms_give_the_same_dataset(tmp_path: Path, name: str) -> None:
    *train, test = parts(name)
    write_dataset(
        tmp_path / "expected",
        name=name,
        source="arrays",
        classes=CLASSES[name],
        train_images=np.concatenate([images for images, _ in train]),
        train_labels=np.concatenate([labels for _, labels in train]),
        test_images=test[0],
        test_labels=test[1],
    )
    expected = load_dataset(tmp_path / "expected").sha256
    sources = {
        "python-archive": packed(tmp_path / "p.tar.gz", python_files(name)),
        "python-folder": unpacked(tmp_path / "p", python_files(name)),
        "binary-archive": packed(tmp_path / "b.tar.gz", binary_files(name)),
        "binary-folder": unpacked(tmp_path / "b", binary_files(name)),
    }
    for form, source in sources.items():
        line = prepare_cifar(name, source, tmp_path / form)
        dataset = load_dataset(tmp_path / form)
        assert dataset.sha256 == expected, form
        assert dataset.classes == tuple(CLASSES[name])
        assert dataset.original is False and "NOT the original" in line
    assert "already prepared" in prepare_cifar(name, source, tmp_path / form)


def test_official_checksums_make_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = python_files("cifar10")
    monkeypatch.setattr(
        cifar,
        "VARIANTS",
        {"cifar10": _with_checksums(files, packed(tmp_path / "b.tar.gz", binary_files("cifar10")))},
    )
    prepare_cifar("cifar10", packed(tmp_path / "p.tar.gz", files), tmp_path / "python")
    prepare_cifar("cifar10", tmp_path / "b.tar.gz", tmp_path / "binary")
    assert load_dataset(tmp_path / "python").original is True
    assert load_dataset(tmp_path / "binary").original is True
    changed = dict(files, test_batch=python_files("cifar10")["data_batch_1"])
    prepare_cifar("cifar10", packed(tmp_path / "c.tar.gz", changed), tmp_path / "changed")
    assert load_dataset(tmp_path / "changed").original is False


def _with_checksums(files: dict[str, bytes], binary: Path) -> cifar.Variant:
    fields = vars(VARIANTS["cifar10"]) | {
        "python_files": {name: hashlib.md5(files[name]).hexdigest() for name in files},
        "archive_md5": {"b.tar.gz": hashlib.md5(binary.read_bytes()).hexdigest()},
    }
    return cifar.Variant(**fields)


def test_the_published_checksums() -> None:
    assert VARIANTS["cifar10"].archive_md5 == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    }
    torchvision = vision.import_torchvision().datasets
    for name, published in (("cifar10", torchvision.CIFAR10), ("cifar100", torchvision.CIFAR100)):
        lists = [*published.train_list, *published.test_list]
        lists.append([published.meta["filename"], published.meta["md5"]])
        assert VARIANTS[name].python_files == dict(lists)


class Malice:
    """Unpickled by Python's own unpickler, it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    malicious = pickle.dumps({"data": Malice(victim), "labels": [0]}, protocol=2)
    files = python_files("cifar10") | {"data_batch_3": malicious}
    with pytest.raises(UserError, match=r"data_batch_3 is damaged.*wants to call .*mkdir"):
        prepare_cifar("cifar10", packed(tmp_path / "p.tar.gz", files), tmp_path / "out")
    assert not victim.exists() and not (tmp_path / "out").exists()
    pickle.loads(malicious)
    assert victim.exists()  # the file does what it says where it is trusted


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"not a pickle",
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({"labels": [0]}, protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, protocol=2),
        pickle.dumps({"data": np.array([os], dtype=object).shape, "labels": [0]}, protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, protocol=2),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["0"]}, protocol=2),
        python_files("cifar10")["test_batch"][:-5000],
    ],
)
def test_unfit_python_files_are_named(tmp_path: Path, content: bytes) -> None:
    source = unpacked(tmp_path / "p", python_files("cifar10") | {"data_batch_2": content})
    with pytest.raises(UserError, match="data_batch_2 is damaged or not a CIFAR file"):
        prepare_cifar("cifar10", source, tmp_path / "out")


def test_unfit_sources_are_named(tmp_path: Path) -> None:
    files = binary_files("cifar10")
    cut = unpacked(tmp_path / "cut", files | {"data_batch_4.bin": files["data_batch_4.bin"][:-1]})
    with pytest.raises(UserError, match=r"data_batch_4.bin is damaged.*no multiple of 3073"):
        prepare_cifar("cifar10", cut, tmp_path / "out")
    wrong_label = b"\x0b" + files["test_batch.bin"][1:]
    labelled = unpacked(tmp_path / "label", files | {"test_batch.bin": wrong_label})
    with pytest.raises(UserError, match="test labels run from 0 to 11"):
        prepare_cifar("cifar10", labelled, tmp_path / "out")
    del files["test_batch.bin"]
    with pytest.raises(UserError, match=r"it lacks test_batch.bin; fetch cifar-10-python"):
        prepare_cifar("cifar10", packed(tmp_path / "half.tar.gz", files), tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        prepare_cifar("cifar10", tmp_path / "nowhere.tar.gz", tmp_path / "out")
    damaged = bytearray((tmp_path / "half.tar.gz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tar.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged"):
        prepare_cifar("cifar10", tmp_path / "damaged.tar.gz", tmp_path / "out")
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(32 << 20)))
    with pytest.raises(UserError):
        prepare_cifar("cifar10", tmp_path / "bomb.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def fake_torchvision(download: object) -> SimpleNamespace:
    return SimpleNamespace(datasets=SimpleNamespace(CIFAR10=download))


def test_without_a_source_torchvision_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: str, download: bool) -> None:
        assert download
        Path(root).mkdir()
        packed(Path(root) / "cifar-10-python.tar.gz", python_files("cifar10"))

    monkeypatch.setattr(vision, "import_torchvision", lambda: fake_torchvision(download))
    download_and_prepare("cifar10", tmp_path / "cifar10")
    assert len(load_dataset(tmp_path / "cifar10").train_labels) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10"]
    assert "already prepared" in download_and_prepare("cifar10", tmp_path / "cifar10")


def test_without_a_network_a_line_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: str, download: bool) -> None:
        Path(root).mkdir()
        raise OSError("no route to host")

    monkeypatch.setattr(vision, "import_torchvision", lambda: fake_torchvision(download))
    with pytest.raises(UserError) as refusal:
        download_and_prepare("cifar10", tmp_path / "cifar10")
    assert "no route to host" in str(refusal.value)
    assert "prepare cifar10 --from cifar-10-python.tar.gz --to" in str(refusal.value)
    assert not list(tmp_path.iterdir())
