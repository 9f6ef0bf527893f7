"""Images by number: packed names, shards, and servers that fail."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import cv2
import numpy as np
import pytest
from flaky_server import FlakyFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.images import remote, shards
from flsl_d2.images.listing import find_images
from flsl_d2.images.reader import ImageFile
from flsl_d2.images.shards import check_shards, make_shards
from flsl_d2.images.store import SHARDS_INDEX, ImageNames, ShardIndex, ShardStore, open_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.02))


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "tree"
    for i, name in enumerate(
        ["a/1.jpg", "a/1.png", "a/x.y.jpg", "a/x_y.jpg", "b/2.JPEG", "b/c d.png", "e.bmp"]
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = os.path.splitext(name)[1]
        image = rng.integers(0, 256, (16 + i, 24, 3), dtype=np.uint8)
        (folder / name).write_bytes(cv2.imencode(suffix, image)[1].tobytes())
    return folder


def contents(store) -> list[bytes]:
    sources = [store.source(i) for i in range(len(store))]
    return [s if isinstance(s, bytes) else open(s, "rb").read() for s in sources]


def slow_digest(files) -> str:
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    names = "\0".join(os.path.relpath(file, root) for file in files)
    return f"{len(files)}, sha256 {hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}"


parts = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1)
names = parts.filter(lambda part: part not in (".", ".."))


@given(st.lists(st.lists(names, min_size=1, max_size=3), min_size=1, max_size=8))
@settings(max_examples=40)
def test_packed_names_are_the_names(lists):
    files = [f"/{'/'.join(each)}" for each in lists]
    packed = ImageNames.from_list(files)
    assert list(packed) == files
    assert packed[-1] == files[-1]
    assert packed[1:] == files[1:]
    assert packed.digest == slow_digest(files)


def test_names_that_are_no_utf8_or_none():
    files = ["/d/\udcff.jpg", "/d/ä\n.jpg", "/d/sub/x.png"]
    packed = pickle.loads(pickle.dumps(ImageNames.from_list(files)))
    assert list(packed) == files
    assert packed.digest == slow_digest(files)
    assert len(ImageNames.from_list([])) == 0
    with pytest.raises(IndexError):
        packed[3]


def test_shards_hold_the_images_of_the_tree(tree, tmp_path):
    assert make_shards(str(tree), tmp_path / "shards", images_per_shard=3) == 3
    store, files = open_images(str(tmp_path / "shards")), open_images(str(tree))
    assert isinstance(store, ShardStore)
    assert store.names.digest == files.names.digest  # a run may go on with either
    assert [os.path.join(tree, name) for name in store] == list(files)
    assert contents(store) == contents(files)
    assert ImageFile(store.source(2)).shape == ImageFile(files.source(2)).shape
    assert contents(pickle.loads(pickle.dumps(store))) == contents(files)


def test_shards_are_webdatasets(tree, tmp_path):
    """Files of one sample have the same name up to the first dot of the base name."""
    make_shards(str(tree), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as shard:
        names = shard.getnames()
    keys = [os.path.join(*os.path.split(n)[:-1], os.path.basename(n).split(".")[0]) for n in names]
    assert len(set(keys)) == len(names) == 7
    assert {n.rsplit(".", 1)[1] for n in names} == {"jpg", "jpeg", "png", "bmp"}


def test_making_shards_is_taken_up_again(tree, tmp_path):
    folder = tmp_path / "shards"
    make_shards(str(tree), folder, 3)
    index = (folder / SHARDS_INDEX).read_bytes()
    (folder / "shard-000001.tar").unlink()
    (folder / SHARDS_INDEX).unlink()
    kept = (folder / "shard-000000.tar").stat().st_mtime_ns
    assert make_shards(str(tree), folder, 3) == 1
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == kept
    assert (folder / SHARDS_INDEX).read_bytes() == index
    with pytest.raises(InputError, match="more shards"):
        make_shards(str(tree), folder, 4)
    (tree / "e.bmp").rename(tree / "f.bmp")
    with pytest.raises(InputError, match="holds other images"):
        make_shards(str(tree), folder, 3)
    (tree / "a" / "1.jpg").unlink()
    (tree / "a" / "1.jpg").symlink_to("gone")
    with pytest.raises(InputError, match=r"1\.jpg' cannot be read"):
        make_shards(str(tree), tmp_path / "other")


def test_damaged_shards_are_found(tree, tmp_path, run_main):
    folder = tmp_path / "shards"
    status, out, _ = run_main(shards.main, "--images", str(tree), "--output", str(folder))
    assert (status, out) == (0, f"7 images in {folder}; 1 shards were written now\n")
    assert check_shards(folder) == []
    store = ShardStore(str(folder), ShardIndex.read(folder / SHARDS_INDEX))
    _, start, _ = store.location(4)
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[start + 5] ^= 1
    (folder / "shard-000000.tar").write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        store.source(4)
    status, out, error = run_main(shards.main, "--output", str(folder), "--check")
    assert status == 2
    assert "b/2.JPEG: its bytes in the shard are damaged" in out
    assert error.startswith("error: 1 images")


def test_shards_of_other_programs_get_an_index(tree, tmp_path, run_main):
    for number, folder in enumerate(("a", "b")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
            shard.add(tree / folder, folder)
    status, out, _ = run_main(shards.main, "--output", str(tmp_path))
    assert (status, out) == (0, f"6 images in the tar files of {tmp_path}\n")
    store = open_images(str(tmp_path))
    assert "1.tar/b/2.JPEG" in store
    assert (
        contents(store)[list(store).index("1.tar/b/2.JPEG")] == (tree / "b" / "2.JPEG").read_bytes()
    )
    with pytest.raises(InputError, match="no tar file"):
        shards.index_shards(tree)


def test_an_index_of_another_kind_is_refused(tmp_path):
    (tmp_path / SHARDS_INDEX).write_bytes(b"FLSLARR1" + bytes(50))
    with pytest.raises(InputError, match=r"write it anew with tools/make_shards\.py"):
        open_images(str(tmp_path))


def test_more_shards_than_files_may_be_open(tmp_path):
    """The images are read one by one, and no file stays open."""
    for i in range(40):
        (tmp_path / "tree").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "tree" / f"{i:02d}.png"), np.full((4, 4, 3), i, np.uint8))
    make_shards(str(tmp_path / "tree"), tmp_path / "shards", 1)
    store = open_images(str(tmp_path / "shards"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        means = [ImageFile(store.source(i)).pixels().mean() for i in range(40)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert means == list(range(40))


def test_shards_on_a_server(tree, tmp_path):
    make_shards(str(tree), tmp_path / "shards", 3)
    expected = contents(open_images(str(tree)))
    server = FlakyFileSystem.reset(tmp_path / "shards")
    store = open_images("flaky://data/", patience=5)
    assert store.names.digest == open_images(str(tree)).names.digest
    store.prefetch(range(3))
    before = server.requests
    assert [store.source(i) for i in range(3)] == expected[:3]
    assert server.requests == before  # they were read before
    server.failures = 3
    assert contents(store) == expected
    assert pickle.loads(pickle.dumps(store)).source(5) == expected[5]
    del server.store["/data/shard-000001.tar"]
    with pytest.raises(OSError, match="no such file"):
        store.source(3)  # this image alone


def test_a_read_that_hangs_is_made_again(tree, tmp_path):
    make_shards(str(tree), tmp_path / "shards")
    server = FlakyFileSystem.reset(tmp_path / "shards")
    store = open_images("flaky://data", patience=0.5)
    server.hangs = 1
    assert store.source(0) == contents(open_images(str(tree)))[0]
    server.hangs = 9
    with pytest.raises(TrainingError, match="no answer within"):
        store.source(1)


def test_a_tree_on_a_web_server(tree):
    handler = partial(SimpleHTTPRequestHandler, directory=str(tree.parent))
    (tree / "notes.txt").write_text("no image")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        store = open_images(f"{url}/tree")
        assert list(store) == [quote(os.path.relpath(f, tree)) for f in find_images(tree)]
        assert contents(store) == contents(open_images(str(tree)))
        with pytest.raises(InputError, match="holds neither shards"):
            open_images(f"{url}/tree/a/1.jpg", patience=1)
        server.shutdown()


def test_a_server_that_stays_away_is_said_in_a_sentence(tree, tmp_path):
    make_shards(str(tree), tmp_path / "shards")
    server = FlakyFileSystem.reset(tmp_path / "shards")
    store = open_images("flaky://data", patience=0.1)
    server.failures = 10**6
    with pytest.raises(TrainingError, match=r"did not answer for 0\.1 seconds .*503"):
        store.source(0)
    server.failures = 0
    assert store.source(0)
    with pytest.raises(InputError, match=r"install flsl-d2\[remote\]"):
        open_images("nothing://x/y")


def test_the_cache_keeps_to_its_limit_and_asks_the_server_once(tree, tmp_path):
    make_shards(str(tree), tmp_path / "shards", 3)
    expected = contents(open_images(str(tree)))
    cache = tmp_path / "cache"
    server = FlakyFileSystem.reset(tmp_path / "shards")
    whole = sum(map(len, expected[:3]))
    store = open_images("flaky://data", cache_dir=str(cache), cache_gb=whole / 1e9)
    for _ in range(2):
        before = server.requests
        assert contents(store) == expected
    assert server.requests - before == 4  # the first three images are there
    copies = sorted(path for path in cache.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in copies) <= whole
    copies[1].write_bytes(bytes(copies[1].stat().st_size))
    assert store.source(1) == expected[1]  # read anew
    # Another process, or a later run, finds them.
    server.failures = 10**6
    assert pickle.loads(pickle.dumps(store)).source(0) == expected[0]
