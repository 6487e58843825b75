"""Tests of images that two data sets have in common."""

import os
from pathlib import Path

import numpy as np
import tiny

from dive_fast.data.shared_images import ImageLocations
from dive_fast.data.sources.folder import open_folder
from dive_fast.data.sources.sample_table import Sample
from dive_fast.data.sources.source import Source
from dive_fast.data.sources.webdataset import open_webdataset


def test_image_locations_count_each_image_once(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(tiny.jpeg(0))
    (tmp_path / "link").symlink_to("set")
    complete, linked = (open_folder(str(tmp_path / name)) for name in ("set", "link"))
    images = ImageLocations(complete)
    assert len(images) == 3
    assert images.num_shared(ImageLocations(linked)) == 3
    some = Source(linked.samples.select(np.array([2])))
    assert images.num_shared(ImageLocations(some)) == ImageLocations(some).num_shared(images) == 1
    rows = Source.of(Sample(f"{row}", tmp_path / "set/a/1.jpg") for row in range(4))  # captions of one image
    assert (len(ImageLocations(rows)), images.num_shared(ImageLocations(rows))) == (1, 1)
    other = Source.of([Sample("x", tmp_path / "set/a/x.jpg"), Sample("y", Path("/1.jpg"))])
    assert images.num_shared(ImageLocations(other)) == 0


def test_image_locations_in_tars_differ_by_position(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path / "set", 4, shard=2)
    complete = open_webdataset(str(tmp_path / "set"), ".cls")
    one = open_webdataset(os.path.relpath(tmp_path / "set/1.tar"), ".cls")
    assert ImageLocations(complete).num_shared(ImageLocations(one)) == len(ImageLocations(one)) == 2
    first, second = (Source(complete.samples.select(np.array(rows))) for rows in ([0, 2], [1, 3]))
    assert ImageLocations(first).num_shared(ImageLocations(second)) == 0
