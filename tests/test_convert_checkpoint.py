"""The converter as a command and as a function: the file, the account, and bad input."""

from __future__ import annotations

import json

import pytest
import torch
from forked import assert_refused, run_tool
from timm.models.vision_transformer import VisionTransformer

from flsl_d2.errors import InputError
from flsl_d2.export.__main__ import export_model
from flsl_d2.weights import build_encoder


def vit(**options) -> VisionTransformer:
    return VisionTransformer(
        img_size=64, embed_dim=192, depth=1, num_heads=3, num_classes=0, **options
    ).eval()


def run_of_dino(path) -> VisionTransformer:
    """A DINO checkpoint; returns the student."""
    student, teacher = vit(), vit()
    heads = {"head.mlp.0.weight": torch.zeros(2)}
    content = {
        which: {f"{ddp}backbone.{n}": t for n, t in model.state_dict().items()} | heads
        for which, model, ddp in (("student", student, "module."), ("teacher", teacher, ""))
    }
    torch.save({**content, "dino_loss": {}, "epoch": 1}, path)
    return student


@torch.no_grad()
def test_the_command_converts_a_student_and_accounts_for_every_weight(tmp_path):
    source, target, report = (tmp_path / n for n in ("dino.pth", "out/student.pth", "r/a.json"))
    student = run_of_dino(source)
    done = run_tool("convert_checkpoint", source, target, "--which", "student", "--report", report)
    assert done.returncode == 0, done.stderr
    for said in ("DINO checkpoint", "18 of the encoder's 18", "norm.weight -> final_norm.weight"):
        assert said in done.stdout
    images = torch.randn(1, 3, 64, 64)
    # timm's operations in another order, in float32.
    torch.testing.assert_close(
        build_encoder(str(target)).forward_tokens(images),
        student.forward_features(images)[:, 1:],
        rtol=1e-4,
        atol=1e-4,
    )
    account = json.loads(report.read_text())
    accounted = [n for names in account["matched"].values() for n in names.split(", ")]
    content = torch.load(source, weights_only=True)["student"]
    assert sorted([*accounted, *account["dropped"]]) == sorted(content)
    assert account["encoder"]["num_prefix_tokens"] == 1


def test_the_command_ends_with_one_sentence(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    done = run_tool("convert_checkpoint", tmp_path / "a.pth", tmp_path / "b.pth")
    assert_refused(done.returncode, done.stderr, "weights ")
    assert not (tmp_path / "b.pth").exists()


def test_bad_requests_come_before_any_writing(tmp_path):
    run_of_dino(tmp_path / "a.pth")
    source = str(tmp_path / "a.pth")
    for target, options, says in (
        ("b.pkl", {}, "does not end as d2 files do; use .pth"),
        ("b.pth", {"file_format": "safetensors"}, "use .safetensors"),
        ("a.pth", {}, "is the model"),
        ("b.pth", {"num_heads": 5}, "5 heads do not divide"),
    ):
        with pytest.raises(InputError, match=says):
            export_model(source, **{"file_format": "d2", "output": tmp_path / target, **options})
    with pytest.raises(InputError, match="do not exist"):
        export_model(str(tmp_path / "c.pth"), "d2", tmp_path / "b.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_timm_comes_with_the_call_that_loads_it(tmp_path, capsys):
    run_of_dino(tmp_path / "a.pth")
    export_model(str(tmp_path / "a.pth"), "timm", tmp_path / "b.safetensors")
    said = capsys.readouterr().out
    assert "model = timm.create_model('vit_small_patch16_224', img_size=64" in said
    assert "timm resamples positions" in said
