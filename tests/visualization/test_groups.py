"""Reading projection heads out of checkpoints, and giving tokens to centroids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.visualization.described import assign_centroids, read_head
from pretrain.hooks import save_teacher_backbone
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss

WIDTH, CENTROIDS = 16, 24


@pytest.fixture
def model():
    backbone = FLSLViT(img_size=32, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=2)
    model = FLSL(backbone, FLSLHead(WIDTH, CENTROIDS, 20, 12), FLSLLoss(CENTROIDS))
    torch.nn.init.normal_(model.teacher.head.last_layer.weight_v)
    torch.nn.init.normal_(model.teacher.head.mlp[2].bias)
    return model


def test_the_teachers_head_is_read(model, tmp_path):
    x = torch.randn(5, WIDTH)
    expected = model.teacher.head(x)
    for prefix in ("", "module."):
        state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
        path = str(tmp_path / "model.pth")
        torch.testing.assert_close(read_head(path)(x), expected)
        torch.testing.assert_close(read_head(f"{path}?which=student")(x), model.student.head(x))


def test_the_published_layout(model, tmp_path):
    head = {f"head.{name}": t for name, t in model.teacher.head.state_dict().items()}
    path = str(tmp_path / "published.pth")
    torch.save({"teacher": head, "flsl_loss": {}}, path)
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(read_head(path)(x), model.teacher.head(x))
    # The same names in a DINO checkpoint are of a head for the class token.
    torch.save({"teacher": head}, path)
    assert read_head(path) is None
    # A head with normalisation layers in between is another one.
    torch.save({"teacher": {**head, "head.mlp.1.running_mean": x}, "flsl_loss": {}}, path)
    assert read_head(path) is None
    save_teacher_backbone(model, tmp_path / "teacher_backbone.pth")
    assert read_head(str(tmp_path / "teacher_backbone.pth")) is None
    with pytest.raises(InputError, match="do not exist"):
        read_head(str(tmp_path / "none.pth"))


def test_each_token_gets_the_nearest_centroid_of_its_mode(model):
    head, scale = model.teacher.head, 0.3
    sets = [torch.randn(n, WIDTH) for n in (10, 15)]
    numbers, cosines = assign_centroids(head, sets, scale)
    centroids = F.normalize(head.last_layer.weight_v, dim=1)
    for tokens, number, cosine in zip(sets, numbers, cosines, strict=True):
        for i, token in enumerate(tokens):
            weights = (scale * tokens @ token).softmax(dim=0)
            projected = F.normalize(head.mlp(weights @ tokens), dim=0)
            expected = centroids @ projected
            assert number[i] == expected.argmax()
            # Rounding of float32.
            assert float(cosine[i]) == pytest.approx(float(expected.max().detach()), abs=1e-5)
