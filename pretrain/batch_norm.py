"""Batch norm whose statistics are those of all processes.

Shape suffixes: B images, C channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from flsl_d2.errors import InputError


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes, on every device.

    PyTorch's ``SyncBatchNorm`` needs a GPU. Mean and variance are exchanged one after the other, so
    that no difference of large squares is taken.
    """

    def forward(self, x: Tensor) -> Tensor:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and together):
            return super().forward(x)
        over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            count = values.new_full((1,), values.numel() / values.shape[1])
            sums = all_reduce(torch.cat([values.sum(over), count]))
            mean, count = sums[:-1] / sums[-1], sums[-1].detach()
            values = values - mean.view(shape)
            variance = all_reduce(values.square().sum(over)) / count
            values = values * (variance + self.eps).rsqrt().view(shape)
            if self.weight is not None:
                values = values * self.weight.view(shape)
            if self.bias is not None:
                values = values + self.bias.view(shape)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return values.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def synchronise_batch_norm(model: nn.Module) -> None:
    """Turn every batch norm of a model into a :class:`SynchronisedBatchNorm`, in place.

    Raises:
        InputError: the model has a batch norm that does more than normalise.
    """
    for name, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SynchronisedBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{name} is a {type(module).__name__}, which is not synchronised between "
                "processes; set train.sync_bn=False, or use another encoder."
            )
