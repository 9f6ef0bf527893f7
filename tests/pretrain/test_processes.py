"""Two processes that decide together; all checks share one group."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batch_of_processes import SHARED, without_chance, without_group
from batch_of_processes import train as train_method
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import nn

from flsl_d2 import agreement
from flsl_d2.engine.launch import launch
from flsl_d2.engine.run_folder import NeutralKeys, ResumeOptions, check_and_keep_run
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.weights.checkpointer import SafeCheckpointer
from pretrain import step_numbers
from pretrain.batch_norm import synchronise_batch_norm


def own_folder(folder: Path) -> Path:
    """As seen by two machines that do not share their disks."""
    return folder / f"machine{comm.get_rank()}"


def check_bad_numbers_have_one_writer(folder: Path) -> None:
    writers = []

    def count(path, text):
        writers.append(path)
        Path(path).write_text(text)

    step_numbers.write_text = count
    terms = [{"loss": 1.0}, {"loss": float("nan")}]
    error = step_numbers.BadNumbersError(7, terms, [(1, "loss")])
    files = [f"{i}.jpg" for i in range(9)]
    raised = agreement.decided_by_main(
        lambda: step_numbers.write_bad_numbers(error, files, 4, 0, str(folder))
    )
    assert isinstance(raised, TrainingError)
    assert len(set(comm.all_gather(str(raised)))) == 1
    assert sum(comm.all_gather(len(writers))) == 1
    if comm.is_main_process():
        report = json.loads((folder / step_numbers.BAD_NUMBERS_FILE).read_text())
        assert [len(rank["files"]) for rank in report["ranks"]] == [2, 2]


def check_machines_that_see_other_folders_do_not_hang(folder: Path) -> None:
    output = own_folder(folder)
    output.mkdir()
    checkpointer = SafeCheckpointer(nn.Linear(1, 1), str(output), save_to_disk=True)
    if comm.is_main_process():
        checkpointer.save("model_0000004", iteration=4)
    neutral = NeutralKeys((), ())
    # Only the first machine holds a run, of which the second must hear.
    with pytest.raises(InputError, match="holds the checkpoints of a run"):
        check_and_keep_run(OmegaConf.create(), output, "k", ResumeOptions(), neutral)
    check_and_keep_run(OmegaConf.create(), output, "k", ResumeOptions(resume=True), neutral)
    assert checkpointer.has_checkpoint()
    comm.synchronize()
    # The second machine has no such folder when it opens the checkpoint.
    if not comm.is_main_process():
        Path.open = _not_mounted
    checkpointer.save_dir = str(folder / "machine0")
    try:
        with pytest.raises(InputError, match=r"rank 1 on .* cannot read .*all machines share"):
            checkpointer.resume_or_load("", resume=True)
    finally:
        Path.open = OPEN


OPEN = Path.open


def _not_mounted(path: Path, mode: str = "r") -> None:
    raise FileNotFoundError(2, "No such file or directory", str(path))


def check_other_images_are_refused(folder: Path) -> None:
    agreement.check_equal("10, sha256 abc", "the images", "share them")
    with pytest.raises(
        InputError, match=r"the images differ.*: 0 images on rank 0 .*, 1 images on"
    ):
        agreement.check_equal(f"{comm.get_rank()} images", "the images", "share them")


def check_an_error_of_one_is_raised_on_all(folder: Path) -> None:
    def fail_on_the_second() -> str:
        if comm.get_rank() == 1:
            raise InputError("the second sees no images")
        return "seen"

    with pytest.raises(InputError, match="the second sees"):
        agreement.checked_by_all(fail_on_the_second)
    assert agreement.decided_by_main(fail_on_the_second) == "seen"


def check_numbers_of_a_step_are_one_exchange(folder: Path) -> None:
    rank, exchanges = comm.get_rank(), []
    real = dist.all_gather_into_tensor

    def count(*arguments, **options):
        exchanges.append(arguments)
        return real(*arguments, **options)

    dist.all_gather_into_tensor = count
    try:
        scalars = {"loss": torch.tensor(1.5 + rank), "assigned": torch.tensor(3)}
        counts = {"data_time": 0.25 * rank, "failed": 7, "stop": rank == 1}
        terms, counts = step_numbers.StepNumbers(4, None, scalars, counts).read()
    finally:
        dist.all_gather_into_tensor = real
    assert terms == [{"loss": 1.5, "assigned": 3.0}, {"loss": 2.5, "assigned": 3.0}]
    assert counts == {"data_time": [0.0, 0.25], "failed": [7.0, 7.0], "stop": [0.0, 1.0]}
    assert len(exchanges) == 1


def check_methods_see_the_batch_of_both(folder: Path) -> None:
    for name in SHARED:
        with without_chance():
            losses, found = train_method(name, comm.get_rank(), 2)
            with without_group():
                whole_losses, whole = train_method(name, 0, 1)
        assert found.keys() == whole.keys()
        found["losses"], whole["losses"] = torch.tensor(losses), torch.tensor(whole_losses)
        for key, value in found.items():
            dist.all_reduce(value)  # gradients are averaged; buffers are the same on both
            # Sums in another order, in float32; batch norm over four images magnifies them, and
            # leaves nothing but rounding of the gradient of a bias before it.
            error, norm = (value / 2 - whole[key]).norm().item(), whole[key].norm().item()
            assert error < 1e-3 * norm + 5e-5 * value.numel() ** 0.5, (
                f"{name} {key}: {error} {norm}"
            )


def check_batch_norm_of_maps_sees_the_batch_of_both(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = 3 + torch.randn(4, 3, 5, 5, generator=generator)
    weights, own = torch.randn(4, 3, 5, 5, generator=generator), slice(2 * comm.get_rank(), None)
    ours = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    whole = copy.deepcopy(ours)
    synchronise_batch_norm(ours)
    x, y = (maps.clone().requires_grad_() for _ in range(2))
    (ours(x[own][:2]) * weights[own][:2]).sum().backward()
    (whole(y) * weights).sum().backward()
    torch.testing.assert_close(x.grad[own][:2], y.grad[own][:2])
    torch.testing.assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))
    dist.all_reduce(ours[0].weight.grad)
    torch.testing.assert_close(ours[0].weight.grad, whole[0].weight.grad)
    with pytest.raises(InputError, match="which is not synchronised"):
        synchronise_batch_norm(nn.Sequential(nn.BatchNorm3d(3)))


CHECKS = [
    check_batch_norm_of_maps_sees_the_batch_of_both,
    check_methods_see_the_batch_of_both,
    check_numbers_of_a_step_are_one_exchange,
    check_bad_numbers_have_one_writer,
    check_machines_that_see_other_folders_do_not_hang,
    check_other_images_are_refused,
    check_an_error_of_one_is_raised_on_all,
]


def run_checks(folder: str) -> None:
    for check in CHECKS:
        own = Path(folder, check.__name__)
        own.mkdir(exist_ok=True)
        comm.synchronize()
        check(own)
        comm.synchronize()


def test_two_processes(tmp_path, forked_workers):
    launch(run_checks, 2, args=(str(tmp_path),), device="cpu")


def test_one_process_needs_no_group():
    assert agreement.decided_by_main(lambda: 3) == 3
    agreement.check_equal("a", "b", "c")
    with pytest.raises(InputError, match="here"):
        agreement.checked_by_all(lambda: (_ for _ in ()).throw(InputError("here")))
