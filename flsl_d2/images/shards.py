"""Tar shards of images in WebDataset's format, with an index of the bytes of each image.

python -m flsl_d2.images.shards --images FOLDER --output SHARDS
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flsl_d2.engine.command_line import add_defaults, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.files import replaced_file, writable_folder
from flsl_d2.images.listing import find_images
from flsl_d2.images.opening import IMAGE_SUFFIXES, printable
from flsl_d2.images.store import (
    SHARDS_INDEX,
    ImageNames,
    ShardIndex,
    ShardStore,
    write_index,
)

DESCRIPTION = """Write images into tar shards, which pre-training reads by dataset.root=SHARDS.

Run the same command again after an interruption: shards that are complete are kept. The shards and
images.index can be copied to a server, for dataset.root=s3://... or https://..."""
EXAMPLES = """examples:
  tools/make_shards.py --images imagenet/train --output shards
  tools/make_shards.py --output shards --check     # compare the checksum of every image
  tools/make_shards.py --output shards             # index the tar files of another program"""

# Name, first byte in the file, size in bytes, CRC-32.
Member = tuple[str, int, int, int]


def make_shards(images: str, output: str | Path, images_per_shard: int = 10_000) -> int:
    """Write images into shards and an index; a shard that is complete is kept.

    Each shard is read back after it is written. The index holds the names below the images' common
    folder, so a run on the images can be resumed on the shards.

    Returns:
        Number of shards that were written now.

    Raises:
        InputError: an image cannot be read, or the folder holds shards of other images.
    """
    if images_per_shard < 1:
        raise InputError(f"--images-per-shard is {images_per_shard}; use 1 or more.")
    files, folder = find_images(images), writable_folder(output, "--output")
    count = -(-len(files) // images_per_shard)
    if (folder / f"shard-{count:06d}.tar").exists():
        raise InputError(
            f"'{folder}' holds more shards than the {count} that '{images}' fills; give another "
            "--output."
        )
    shards, written = [], 0
    for number, first in enumerate(range(0, len(files), images_per_shard)):
        part = files[first : first + images_per_shard]
        names, path = _member_names(part), folder / f"shard-{number:06d}.tar"
        checksums = None
        if not path.is_file():
            checksums = _write_shard(path, part, names)
            written += 1
        members = _members(path)
        if [name for name, *_ in members] != names:
            raise InputError(
                f"'{path}' holds other images than '{images}' has in its place; give another "
                "--output, or the same images and --images-per-shard as before."
            )
        if checksums is not None and [checksum for *_, checksum in members] != checksums:
            raise InputError(f"'{path}' is not what was written to it; check the disk.")
        shards.append((path, members))
    _write_index(folder, files, shards)
    return written


def index_shards(folder: str | Path) -> int:
    """Write the index of tar files that another program made; return the number of images."""
    shards = [(path, _members(path)) for path in sorted(Path(folder).glob("*.tar"))]
    names = [f"{path.name}/{name}" for path, members in shards for name, *_ in members]
    if not names:
        raise InputError(f"'{folder}' holds no tar file with images; give --images to write some.")
    _write_index(Path(folder), names, shards)
    return len(names)


def check_shards(folder: str | Path) -> list[str]:
    """Return a line for each image that differs from its checksum or cannot be read."""
    store = ShardStore(str(folder), ShardIndex.read(Path(folder, SHARDS_INDEX)))
    faults = []
    for index in range(len(store)):
        try:
            store.source(index)
        except OSError as error:
            faults.append(f"{printable(store[index])}: {error}")
    return faults


def _member_names(files: Sequence[str]) -> list[str]:
    """Names in a shard, without dots: WebDataset ends the name of an image at the first one."""
    prefix = ImageNames.from_list(files).prefix
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        stem, suffix = os.path.splitext(file[len(prefix) :])
        folder, base = os.path.split(stem)
        stem = key = os.path.join(folder, re.sub(r"[.\s]", "_", base))
        count = 1
        while key in taken:
            key, count = f"{stem}-{count}", count + 1
        taken.add(key)
        names.append(key + suffix.lower())
    return names


def _write_shard(path: Path, files: Sequence[str], names: Sequence[str]) -> list[int]:
    """Write a shard and return the checksums of its images."""
    checksums = []
    with replaced_file(path) as file, tarfile.open(fileobj=file, mode="w") as shard:
        for source, name in zip(files, names, strict=True):
            try:
                content = Path(source).read_bytes()
            except OSError as error:
                raise InputError(
                    f"the image '{printable(source)}' cannot be read ({error.strerror}); repair or "
                    "remove it, and run the same command again."
                ) from error
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
            checksums.append(zlib.crc32(content))
    return checksums


def _members(path: Path) -> list[Member]:
    """Images of a shard, in their order.

    Raises:
        InputError: it cannot be read.
    """
    members = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as shard:
            for entry in shard:
                if entry.isfile() and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    content = os.pread(file.fileno(), entry.size, entry.offset_data)
                    members.append((entry.name, entry.offset_data, entry.size, zlib.crc32(content)))
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"'{path}' is no tar file that can be read ({error}); remove it and run the same "
            "command again."
        ) from error
    return members


def _write_index(
    folder: Path, names: Sequence[str], shards: Sequence[tuple[Path, list[Member]]]
) -> None:
    places = [
        (number, start, size, checksum)
        for number, (_, members) in enumerate(shards)
        for _, start, size, checksum in members
    ]
    files = [path.name for path, _ in shards]
    write_index(folder / SHARDS_INDEX, names, files, np.array(places, np.uint64))


def _run(images: str, output: str, images_per_shard: int, check: bool) -> None:
    if check:
        faults = check_shards(output)
        print("\n".join(faults) or "every image has its checksum")
        if faults:
            raise InputError(
                f"{len(faults)} images in '{output}' are damaged; write their shards anew."
            )
    elif images:
        written = make_shards(images, output, images_per_shard)
        total = len(ShardIndex.read(Path(output, SHARDS_INDEX)).names)
        print(f"{total} images in {output}; {written} shards were written now")
    else:
        print(f"{index_shards(output)} images in the tar files of {output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, index or check shards as a command line describes."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_defaults(
        parser,
        ("--images", "", "folder, pattern or list of images"),
        ("--output", "shards", "folder of the shards"),
        ("--images-per-shard", 10_000, "number of images of a shard"),
    )
    parser.add_argument("--check", action="store_true", help="only compare checksums")
    given = parser.parse_args(arguments)
    run_tool(_run, given.images, given.output, given.images_per_shard, given.check)


if __name__ == "__main__":
    main()
