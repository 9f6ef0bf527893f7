"""The prior of an earlier stage: which features, which rows, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.methods.previous_stage import PreviousStage, load_previous_stage


def encoder(patch_size: int = 8, depth: int = 3) -> FLSLViT:
    return FLSLViT(img_size=32, patch_size=patch_size, embed_dim=24, depth=depth, num_heads=2)


def test_features_are_the_last_block_but_one_without_norm():
    backbone = encoder().eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = PreviousStage(backbone).tokens(images)
    assert torch.equal(tokens, backbone.forward_tokens(images, num_blocks=2))
    backbone.blocks[2].mlp.fc1.weight.data.zero_()
    backbone.final_norm.weight.data.zero_()
    assert torch.equal(tokens, PreviousStage(backbone).tokens(images))


def test_prior_is_nearly_binary_and_normalised():
    stage = PreviousStage(encoder(), scale=1.0)
    student, teacher = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 32, 32)
    queries = torch.tensor([[0, 3]] * 2)
    prior = stage.prior(student, queries, stage.tokens(teacher))
    assert prior.shape == (2, 2, 16)
    torch.testing.assert_close(prior.sum(-1), torch.ones(2, 2))
    assert not prior.requires_grad
    # Members of the cluster share it evenly, the others have nothing.
    share = prior / prior.amax(dim=-1, keepdim=True)
    assert ((share < 0.01) | (share > 0.99)).float().mean() > 0.9


def test_it_stays_outside_training():
    stage = PreviousStage(encoder())
    model = FLSL(encoder(), FLSLHead(24, 16, 32, 8), FLSLLoss(16), previous_stage=stage)
    without = FLSL(encoder(), FLSLHead(24, 16, 32, 8), FLSLLoss(16))
    assert model.state_dict().keys() == without.state_dict().keys()
    assert not any(p.requires_grad for p in stage.encoder.parameters())
    model.train()
    assert not stage.encoder.training


def test_other_patches_are_refused():
    with pytest.raises(InputError, match="patches of 16 pixels and this one of 8"):
        FLSL(
            encoder(),
            FLSLHead(24, 16, 32, 8),
            FLSLLoss(16),
            previous_stage=PreviousStage(encoder(16)),
        )


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_depth_out_of_range_is_refused(num_blocks):
    with pytest.raises(InputError, match="num_blocks"):
        PreviousStage(encoder(), num_blocks=num_blocks)


def test_no_file_is_one_stage_and_a_missing_one_an_error(tmp_path):
    assert load_previous_stage() is None
    with pytest.raises(InputError, match="do not exist"):
        load_previous_stage(str(tmp_path / "teacher_backbone.pth"))
