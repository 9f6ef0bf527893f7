"""Runs whose weights, gradients and optimiser are spread over two processes."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import pytest
import soak
import torch
from sharded_runs import CHECKS, config, run_all, trained, whole
from test_trainer import small_model

from flsl_d2.engine.launch import launch
from flsl_d2.errors import InputError
from flsl_d2.modeling.timm_backbone import build_timm_backbone
from flsl_d2.weights.checkpointer import checkpoint_damage, checkpoint_files
from pretrain.sharding import _MetadataUnpickler, check_sharding


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and the runs of two processes, which check themselves."""
    folder = tmp_path_factory.mktemp("sharded")
    soak.make_images(folder / "images")
    launch(run_all, 2, args=(str(folder), str(folder / "images")), device="cpu")
    return folder


def test_two_processes(folder):
    assert len(list(folder.glob("check_*"))) == len(CHECKS)


@pytest.fixture
def stopped(folder, tmp_path) -> Path:
    """A run of two processes that ended after two steps."""
    output = tmp_path / "parts"
    shutil.copytree(folder / "check_a_sharded_run_repeats_itself" / "parts", output)
    shutil.rmtree(output / "model_final.dcp")
    (output / "last_checkpoint").write_text("model_0000001.dcp")
    return output


def test_one_process_goes_on_where_two_stopped(folder, stopped):
    before = torch.load(folder / "check_a_sharded_run_repeats_itself" / "half.pth")
    sharded = "train.sharding=fsdp2"
    resumed = whole(trained(config(folder / "images", stopped, sharded), resume=True, at=2))
    assert resumed.keys() == before.keys()
    assert any(name.startswith("optimizer.") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, resumed[name]), name
    trained(config(folder / "images", stopped, sharded), resume=True)
    assert {file.name for file in stopped.glob("model_*")} == {
        "model_0000001.dcp", "model_final.dcp",
    }  # fmt: skip


def test_another_kind_of_checkpoint_is_refused(folder, stopped):
    with pytest.raises(InputError, match=r"model_0000001\.dcp: it is of a run with"):
        trained(config(folder / "images", stopped), resume=True)


@pytest.mark.parametrize("damaged", ["__1_0.distcp", "rest.pth", ".metadata"])
def test_a_damaged_share_is_found(damaged, stopped):
    newest = stopped / "model_0000001.dcp"
    assert checkpoint_files(stopped) == [newest]
    assert not checkpoint_damage(newest)
    content = bytearray((newest / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / damaged).write_bytes(content)
    assert checkpoint_damage(newest) == f"the checksum of {damaged} in it is wrong"
    (newest / damaged).unlink()
    assert "No such file" in checkpoint_damage(newest)


def test_a_description_runs_no_code(stopped):
    hostile = pickle.dumps(shutil.rmtree)
    with pytest.raises(InputError, match=r"holds shutil\.rmtree"):
        _MetadataUnpickler(io.BytesIO(hostile)).load()


def test_what_does_not_go_with_it_is_refused_before_the_run():
    method = small_model()
    assert not check_sharding("none", method, "fp16", "reduce-overhead")
    assert check_sharding("fsdp2", method, "bf16", "default")
    for arguments, message in {
        ("fsdp", method, "fp32", ""): "train.sharding is 'fsdp'; use one of none, fsdp2",
        ("fsdp2", method, "fp16", ""): "train.precision fp16",
        ("fsdp2", method, "bf16", "reduce-overhead"): "train.compile_mode 'reduce-overhead'",
    }.items():
        with pytest.raises(InputError, match=message):
            check_sharding(*arguments)
    method.exported_encoder = lambda: build_timm_backbone("timm:resnet18?pretrained=false")
    with pytest.raises(InputError, match="the encoder is a TimmBackbone"):
        check_sharding("fsdp2", method, "fp32", "")


@pytest.mark.parametrize(("tf32", "expected"), [(True, "high"), (False, "highest")])
def test_tf32_is_a_switch(tf32, expected, folder, tmp_path):
    try:
        trained(config(folder / "images", tmp_path, f"train.tf32={tf32}"), at=0)
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
