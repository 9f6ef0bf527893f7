"""DenseCL: contrast of images and of their matched tokens (arXiv 2011.09157).

Shape suffixes: B images, N tokens, D width, F width of the outputs, L length of a queue.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    feature_std,
    full_precision,
    global_output,
    mlp,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class _DenseNetworks(Networks):
    def __init__(self, backbone: FLSLViT, hidden_dim: int, output_dim: int) -> None:
        widths = (backbone.embed_dim, hidden_dim, output_dim)
        super().__init__(backbone, mlp(*widths))
        self.dense_head = mlp(*widths)


class Queue(nn.Module):
    """The latest keys of all processes, as negatives; part of a checkpoint.

    Args:
        length: L.
        dim: width F of the keys.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.next: Tensor
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Put keys (B, F) of this process, and those of the others, in place of the oldest."""
        keys = keys.detach().float()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, keys.contiguous())
            keys = torch.cat(gathered)
        rows = (self.next + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys.index_copy_(0, rows, keys)
        self.next.copy_((self.next + len(keys)) % len(self.keys))


class DenseCL(BaseMethod):
    """Views are contrasted with those of other images, and tokens with tokens they do not match.

    q, k are the normalised global outputs of student and teacher, r, s those of their tokens. The
    global term is ``-log softmax`` of ``q.k / tau`` among q's products with a queue of earlier k.
    The dense term is the same for each token's r and the s of the teacher's token with the most
    similar features, among products with a queue of earlier means of the teacher's dense outputs,
    normalised.

    A convolution of 1 x 1 is a linear layer on tokens.

    Args:
        output_dim: F.
        queue_length: L.
        temperature: tau.
        dense_weight: weight of the dense term, 0 to 1.
    """

    min_global = 2

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        queue_length: int = 65536,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
    ) -> None:
        super().__init__(_DenseNetworks(backbone, hidden_dim, output_dim), has_teacher=True)
        self.temperature, self.dense_weight = temperature, dense_weight
        self.queue = Queue(queue_length, output_dim)
        self.dense_queue = Queue(queue_length, output_dim)

    def check_run(self, views: object, images: int) -> None:
        """Check that the queue holds a batch, besides what every method checks."""
        super().check_run(views, images)
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        length = len(self.queue.keys)
        if length < images * world:
            raise InputError(
                f"model.queue_length is {length}, less than the {images * world} images that are "
                "worked off at a time; use at least as many."
            )

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        query_view, key_view = (self.normalised(view) for view in inputs.views[:2])
        tokens = self.student.backbone.forward_tokens(query_view)
        queries = F.normalize(self.student.head(global_output([tokens])).float(), dim=-1)
        dense_queries = F.normalize(self.student.dense_head(tokens).float(), dim=-1)
        with torch.no_grad():
            key_tokens = self.teacher.backbone.forward_tokens(key_view)
            keys = F.normalize(self.teacher.head(global_output([key_tokens])).float(), dim=-1)
            dense_outputs = self.teacher.dense_head(key_tokens).float()
            dense_keys = F.normalize(dense_outputs, dim=-1)
            with full_precision(keys):
                similarity = tokens.float() @ F.normalize(key_tokens.float(), dim=-1).mT
            nearest = similarity.argmax(dim=-1)[..., None].expand_as(dense_keys)
            matched = dense_keys.gather(1, nearest)
        with full_precision(keys):
            contrast = self._contrast(queries, keys, self.queue)
            dense = self._contrast(
                dense_queries.flatten(0, 1), matched.flatten(0, 1), self.dense_queue
            )
        self.queue.push(keys)
        self.dense_queue.push(F.normalize(dense_outputs.mean(dim=1), dim=-1))
        losses = {
            "loss": (1 - self.dense_weight) * contrast + self.dense_weight * dense,
            "loss_global": contrast,
            "loss_dense": dense,
        }
        return losses, {"feature_std": feature_std(key_tokens)}

    def _contrast(self, queries: Tensor, keys: Tensor, queue: Queue) -> Tensor:
        positive = (queries * keys).sum(dim=-1, keepdim=True)
        # A copy, because the queue changes before the backward pass.
        logits = torch.cat([positive, queries @ queue.keys.clone().T], dim=1) / self.temperature
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
