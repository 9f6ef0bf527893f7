"""Fully sharded training: weights, gradients and optimiser are spread over the processes.

PyTorch's ``fully_shard`` (FSDP2) gathers the weights of a transformer block when the block runs and
drops them behind it. Checkpoints are folders, to which each process writes its share
(``torch.distributed.checkpoint``), and which any number of processes can resume from.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import save as save_shares
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flsl_d2.errors import InputError
from flsl_d2.files import UNFINISHED, replaced_file
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.blocks import Block
from flsl_d2.weights.checkpointer import (
    CHECKSUMS,
    SHARDED,
    FLSLCheckpointer,
    copy_to_cpu,
    delete_checkpoint,
    file_checksum,
)
from flsl_d2.weights.reading import read_weights
from pretrain.methods import Method

T = TypeVar("T")
logger = logging.getLogger("pretrain")

SHARDINGS = ("none", "fsdp2")
# File of a sharded checkpoint that holds everything but tensors of the model and the optimiser.
_REST = "rest.pth"
# What the description of a sharded checkpoint is made of; nothing else is read from its pickle.
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}


def check_sharding(sharding: str, method: Method, precision: str, compile_mode: str) -> bool:
    """Check ``train.sharding``; return whether the run is sharded.

    Args:
        sharding: ``none`` or ``fsdp2``.
        method: the method.
        precision: resolved precision of the steps.
        compile_mode: mode of ``torch.compile``; empty where blocks are not compiled.

    Raises:
        InputError: the setting is unknown, or another one does not go with it.
    """
    if sharding not in SHARDINGS:
        raise InputError(f"train.sharding is '{sharding}'; use one of {', '.join(SHARDINGS)}.")
    if sharding == "none":
        return False
    encoder = method.exported_encoder()
    if not isinstance(encoder, FLSLViT):
        raise InputError(
            f"train.sharding is '{sharding}', which shards the blocks of a FLSLViT, and the "
            f"encoder is a {type(encoder).__name__}; set train.sharding=none."
        )
    if precision == "fp16":
        raise InputError(
            f"train.sharding is '{sharding}' and train.precision fp16, whose overflows each "
            "process would see in its own share alone; set train.precision=bf16 or fp32."
        )
    if compile_mode not in ("", "default", "max-autotune-no-cudagraphs"):
        raise InputError(
            f"train.sharding is '{sharding}' and train.compile_mode '{compile_mode}', whose CUDA "
            "graphs need weights that stay in their place; set train.compile_mode=default."
        )
    return True


def shard(method: Method) -> None:
    """Shard a method in place, block by block; all processes begin with rank 0's weights.

    Student and teacher are sharded alike, so that the moving average needs no communication. What
    is in no block (patches, norms, heads) is gathered once a step, from the method's ``forward``
    to the end of the backward pass. In a run of one process nothing is sharded.
    """
    if comm.get_world_size() == 1:
        return
    module = cast(nn.Module, method)
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(tensors[0].device.type, (comm.get_world_size(),))
    for block in [each for each in module.modules() if isinstance(each, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole_encoder(method: Method) -> FLSLViT | None:
    """Gather the exported encoder on the main process; every process must call this.

    Returns:
        A copy in evaluation mode on the training device; None on all processes but the main one.
    """
    encoder = cast(FLSLViT, method.exported_encoder())
    state: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        if comm.is_main_process():
            state[name] = whole
    if not comm.is_main_process():
        return None
    with torch.device("meta"):
        copy = FLSLViT(**encoder.architecture)
    copy.input_format = encoder.input_format
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        setattr(copy.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    return copy.eval()


class ShardedCheckpointer(FLSLCheckpointer):
    """Writes and resumes ``model_<step>.dcp``, a folder with a file of each process.

    The folder has its name when all of it is on the disk. A file in it has the checksums of the
    others, which resuming compares. Every process must save and load.
    """

    ending = SHARDED

    def __init__(self, model: nn.Module, save_dir: str, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._group: dist.ProcessGroup | None = None
        self._mesh: DeviceMesh | None = None
        if comm.get_world_size() > 1:
            # A group of its own, because checkpoints are written while training goes on.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
            self._mesh = DeviceMesh.from_group(self._group, "cpu")

    @property
    def takes_part(self) -> bool:
        """Every process writes its share."""
        return bool(self.save_dir)

    def content(self, **kwargs: Any) -> dict[str, Any]:
        """Return the tensors of model and optimiser as ``tensors``, and the rest."""
        content = super().content(**kwargs)
        tensors = {f"model.{key}": value for key, value in content.pop("model").items()}
        optimizer = content["trainer"].pop("optimizer")
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        return {"tensors": tensors, **content}

    def snapshot(self, **kwargs: Any) -> dict[str, Any]:
        """Return a copy of this process's share in the CPU's memory."""
        content = self.content(**kwargs)
        tensors = {key: self._on_cpu(value) for key, value in content.pop("tensors").items()}
        return {"tensors": tensors, **copy_to_cpu(content)}

    def _on_cpu(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return copy_to_cpu(tensor)
        local = copy_to_cpu(tensor.to_local())
        return DTensor.from_local(
            local,
            self._mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write ``<name>.dcp``, and make it the last checkpoint; every process must call this.

        Raises:
            OSError: a process cannot write its share; raised on all, and the checkpoints before
                are untouched.
        """
        folder = Path(self.save_dir, f"{name}{self.ending}")
        logger.info("Saving checkpoint to %s", folder)
        token = self._gathered(secrets.token_hex(4))[0]
        part = folder.with_name(f"{folder.name}.{token}{UNFINISHED}")
        rest = {key: value for key, value in content.items() if key != "tensors"}
        try:
            self._by_all(lambda: self._save(content["tensors"], part))
            sums = self._gathered(self._by_all(lambda: _checksums(part)))
            checksums = {file: text for each in sums for file, text in each.items()}
            self._by_all(lambda: self._complete(part, folder, rest, checksums))
        except OSError:
            if comm.is_main_process():
                delete_checkpoint(part)
            raise

    def _save(self, tensors: dict[str, Tensor], folder: Path) -> None:
        alone = self._group is None
        try:
            save_shares(tensors, checkpoint_id=folder, process_group=self._group, no_dist=alone)
        except CheckpointException as error:
            # It holds the errors of all processes; one of the disk is what the caller can name.
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError):
                    raise cause from None
            raise

    def _complete(
        self, part: Path, folder: Path, rest: dict[str, Any], checksums: dict[str, str]
    ) -> None:
        if not comm.is_main_process():
            return
        with replaced_file(part / _REST) as file:
            torch.save(rest, file)
        for name in (".metadata", _REST):
            checksums[name] = file_checksum(part / name)
        with replaced_file(part / CHECKSUMS) as file:
            file.write(json.dumps(checksums, indent=1).encode())
        delete_checkpoint(folder)
        os.replace(part, folder)
        self.tag_last_checkpoint(folder.name)

    def _gathered(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * comm.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _by_all(self, function: Callable[[], T]) -> T:
        """Run a function on every process; an error of the disk on one is raised on all."""
        result, error = None, None
        try:
            result = function()
        except OSError as failure:
            error = failure
        failures = [each for each in self._gathered(error) if each is not None]
        if failures:
            raise failures[0]
        return cast(T, result)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a sharded checkpoint into the model and the trainer.

        Raises:
            InputError: the checkpoint does not fit the model.
        """
        logger.info("Loading the sharded checkpoint %s", path)
        rest = read_weights(str(Path(path, _REST)))
        trainer = self.checkpointables["trainer"]
        reader = _Reader(path)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        groups = trainer.optimizer.param_groups
        weights = [parameter for group in groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key in stored:
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                # AdamW counts the steps of each tensor by a number beside two moments.
                like = weights[int(index)].detach()
                moment = torch.zeros_like(like)
                counter = torch.zeros((), device=like.device)
                tensors[key] = counter if name == "step" else moment
                state.setdefault(int(index), {})[name] = tensors[key]
        try:
            load_shares(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except (CheckpointException, RuntimeError, ValueError) as error:
            raise InputError(
                f"checkpoint '{path}' does not fit the model ({_reason(error)}); resume with the "
                "config of the run."
            ) from error
        groups = trainer.optimizer.state_dict()["param_groups"]
        optimizer = {"state": state, "param_groups": groups}
        trainer.load_state_dict({**rest["trainer"], "optimizer": optimizer})
        return {key: value for key, value in rest.items() if key != "trainer"}


class _Reader(FileSystemReader):
    """PyTorch's reader, except that it runs no code from the description of a checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA.get(module, ()):
            raise InputError(
                f"the description of the checkpoint holds {module}.{name}, which no checkpoint of "
                "a run has; resume from another one."
            )
        return super().find_class(module, name)


def _checksums(folder: Path) -> dict[str, str]:
    """Checksums of the files that this process wrote."""
    files = folder.glob(f"__{comm.get_rank()}_*")
    return {file.name: file_checksum(file) for file in sorted(files)}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
