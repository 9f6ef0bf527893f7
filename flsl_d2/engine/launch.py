"""Processes of a run, on GPUs or the CPU or started by torchrun, and what a machine offers them."""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from flsl_d2.engine.gpus import check_device, usable_cores
from flsl_d2.engine.launchers import restart_store, slurm_variables, started_by_torchrun
from flsl_d2.engine.liveness import SignsOfLife
from flsl_d2.engine.stopping import STOP_SIGNALS, STOPPED, StopRequest, forwarding, signals_held
from flsl_d2.errors import InputError, TrainingError

# Reports of failed ranks wait in a pipe, whose buffer holds 64 KiB, until the parent reads them.
_REPORT_CHARS = 4000
# A rank ended by these signals leaves no report; the reports of other ranks only say it is gone.
_KILLED = ("SIGKILL", "SIGSEGV", "SIGBUS")
# Time for the other ranks to end by themselves after one has ended, and again after SIGTERM.
_GRACE_SECONDS = 10
# The same after a request to stop, which one of them may be writing a checkpoint for.
_STOP_SECONDS = 60
# Longest folder for temporary files whose sockets have valid addresses: at most 107 characters,
# of which Python takes 32.
_MOST_TMPDIR = 70
# Time that ranks wait for each other, as in Detectron2: the first may evaluate alone meanwhile.
_TIMEOUT = timedelta(minutes=30)
# Start of the address of a store that the parent of the workers holds.
_STORE = "store://"
_STOPS = [number.name for number in STOP_SIGNALS]
# Exceptions of workers that keep their type in the parent.
_PLAIN = {"InputError": InputError, "TrainingError": TrainingError}


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its rank and its traceback."""


def has_native_bf16() -> bool:
    """Whether the GPU computes in bfloat16; cards before Ampere only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def leave(status: int) -> NoReturn:
    """End a process of a group: run the functions registered with ``atexit``, then exit at once.

    The interpreter is not finalised: a thread of gloo that frees a tensor meanwhile would abort the
    process, and a run that had finished would count as failed (PyTorch issue 190489).
    """
    atexit._run_exitfuncs()  # multiprocessing does the same before it ends a forked process
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(
    main_func: Callable[..., None],
    num_processes_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
    device: str = "cuda",
) -> None:
    """Run ``main_func(*args)`` in every process, with Detectron2's ``comm`` set up.

    A single process is not started: the function runs in this one. Several GPU processes
    communicate by NCCL, several CPU processes by gloo. Under torchrun the processes exist already:
    none are started, the counts given here are ignored, and the program ends with :func:`leave`.
    The same holds for several tasks of one ``srun``, where the counts are 1. SIGTERM and SIGUSR1
    are passed on to the processes; see :mod:`flsl_d2.engine.stopping`.

    Args:
        main_func: function at the top level of a module, which the workers import.
        num_processes_per_machine: number of GPUs, or of CPU processes, on each machine.
        num_machines: number of machines; each runs this same command.
        dist_url: address where the processes meet, ``tcp://address:port``; ``auto`` takes a free
            local port.
        args: arguments of ``main_func``, which are pickled for the workers.

    Raises:
        InputError: this machine lacks the device or the count, or a worker raised the error.
        TrainingError: a worker raised the error.
        WorkerError: a worker raised another exception; the other workers have been ended.
        SystemExit: the workers stopped on request; the status is 75.
    """
    use_short_sockets()
    if num_processes_per_machine * num_machines == 1 and not started_by_torchrun():
        os.environ.update(slurm_variables(os.environ))
    if started_by_torchrun():
        _run_under_torchrun(main_func, args, device)
        return
    _check(num_processes_per_machine, num_machines, machine_rank, dist_url, device)
    if num_processes_per_machine * num_machines == 1:
        main_func(*args)
        return
    store = None
    if dist_url == "auto":
        # This process holds the port: one that is only looked up may be taken before it is used.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist_url = f"{_STORE}127.0.0.1:{store.port}"
    # PyTorch's log says only that workers are being ended; the error raised below says why.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    reports = mp.get_context("spawn").SimpleQueue()
    world = (num_processes_per_machine, num_machines, machine_rank, dist_url, device)
    try:
        with signals_held():  # until this process and the workers have their handlers
            workers = start_processes(
                _worker,
                (*world, main_func, reports, args),
                num_processes_per_machine,
                join=False,
                start_method="spawn",
            )
            with forwarding(workers.processes) as stop:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
                _wait(workers, reports, stop)
    finally:
        # An exception would keep it, and a forked process that collects it waits without end for
        # the store's thread, which it does not have.
        del store


def use_short_sockets() -> None:
    """Give the sockets of multiprocessing a short folder where that of TMPDIR is too long."""
    if len(tempfile.gettempdir()) <= _MOST_TMPDIR:
        return
    kept, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # private to this process, and kept until its end
    finally:
        tempfile.tempdir = kept


def _wait(workers: ProcessContext, reports: Any, stop: StopRequest) -> None:
    try:
        while not workers.join(1, _STOP_SECONDS if stop else _GRACE_SECONDS):
            pass
    except (ProcessRaisedException, ProcessExitedException) as failure:
        ended_by = getattr(failure, "signal_name", None)
        if getattr(failure, "exit_code", None) == STOPPED or (stop and ended_by in _STOPS):
            raise SystemExit(STOPPED) from None
        if reports.empty() or ended_by in _KILLED:
            raise WorkerError(f"{failure} (SIGKILL: most often, memory ran out)") from None
        # The first report is the cause; later ones are of ranks that lost a neighbour.
        kind, rank, text = reports.get()
        if kind in _PLAIN:
            raise _PLAIN[kind](text) from None
        raise WorkerError(f"rank {rank} failed:\n{text}") from None
    except KeyboardInterrupt:
        for child in mp.active_children():
            child.terminate()
        raise


def wrap_ddp(model: nn.Module, **ddp_options: Any) -> nn.Module:
    """Wrap a model on its device by Detectron2's ``create_ddp_model``, for CPU processes as well.

    ``ddp_options`` are arguments of ``DistributedDataParallel``, and ``fp16_compression``. The
    model of a single process is returned as it is.
    """
    device = next(model.parameters()).device
    # Not the local rank, which Detectron2 takes: a process may see one GPU only.
    ddp_options["device_ids"] = [device.index] if device.type == "cuda" else None
    if device.type != "cuda":
        ddp_options["fp16_compression"] = False  # a CUDA-only communication hook
    return create_ddp_model(model, **ddp_options)


def _is_cuda(device: str) -> bool:
    return str(device).startswith("cuda")


def _check(
    num_processes: int, num_machines: int, machine_rank: int, dist_url: str, device: str
) -> None:
    if num_processes < 1 or not 0 <= machine_rank < num_machines:
        raise InputError(
            f"{num_processes} processes on machine {machine_rank} of {num_machines} cannot be "
            "started; give --num-gpus of at least 1 and --machine-rank below --num-machines."
        )
    if dist_url == "auto" and num_machines > 1:
        raise InputError(
            f"--dist-url auto finds a port on one machine only, and there are {num_machines}; "
            "give --dist-url tcp://ADDRESS_OF_MACHINE_0:PORT on all of them."
        )
    check_device(device, num_processes)


def _worker(
    local_rank: int,
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    device: str,
    main_func: Callable[..., None],
    reports: Any,
    args: tuple[Any, ...],
) -> None:
    # Data workers are forked, as those of a run of one process: spawned ones would import
    # everything again, and would not inherit that they ignore requests to stop.
    mp.set_start_method("fork", force=True)
    # The parent blocked them while this process started; a run sets handlers of its own.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # Workers end with a parent that is killed; otherwise they would go on writing to the folder of
    # a run that is resumed.
    mp._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    parent = mp.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)  # the parent was killed while this process was importing
    if _is_cuda(device):
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise start a thread for each core, and wait for the others.
        torch.set_num_threads(max(usable_cores() // num_processes, 1))
    meeting: dict[str, Any] = {"init_method": dist_url}
    if dist_url.startswith(_STORE):
        host, port = dist_url.removeprefix(_STORE).split(":")
        meeting = {"store": TCPStore(host, int(port), is_master=False, timeout=_TIMEOUT)}
    _join_group(
        "nccl" if _is_cuda(device) else "gloo",
        num_processes,
        **meeting,
        world_size=num_processes * num_machines,
        rank=machine_rank * num_processes + local_rank,
    )
    leave(_reported(main_func, reports, args))


def _join_group(backend: str, num_local: int, **options: Any) -> None:
    dist.init_process_group(backend, timeout=_TIMEOUT, **options)
    comm.create_local_process_group(num_local)
    if not comm.is_main_process():
        warnings.simplefilter("ignore")  # each warning would come once for every process
    comm.synchronize()


def _run_in_group(main_func: Callable[..., None], args: tuple[Any, ...]) -> int:
    """Run the function and leave the process group; return 0, or the status of a stop."""
    status = 0
    store = dist.distributed_c10d._get_default_store()
    signs = SignsOfLife(store, comm.get_rank(), comm.get_world_size())
    try:
        main_func(*args)
    except SystemExit as left:
        if left.code != STOPPED:
            raise
        status = STOPPED
    except BaseException as error:
        signs.fail(f"{type(error).__name__}: {error}"[:_REPORT_CHARS])
        raise
    # All ranks leave together, so that no rank loses the sockets of another.
    comm.synchronize()
    signs.end()
    dist.destroy_process_group()
    return status


def _reported(main_func: Callable[..., None], reports: Any, args: tuple[Any, ...]) -> int:
    """Run the function in a worker; return its status, or report its exception to the parent."""
    try:
        return _run_in_group(main_func, args)
    except (InputError, TrainingError) as error:
        reports.put((type(error).__name__, comm.get_rank(), str(error)))
        return 2
    except Exception:
        reports.put(("", comm.get_rank(), traceback.format_exc()[-_REPORT_CHARS:]))
        raise


def _run_under_torchrun(main_func: Callable[..., None], args: tuple[Any, ...], device: str) -> None:
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world_size == 1 or dist.is_initialized():
        main_func(*args)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    unknown = world_size if "LOCAL_RANK" in os.environ else 1
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", unknown))
    options = {"store": restart_store(os.environ, _TIMEOUT), "world_size": world_size, "rank": rank}
    if _is_cuda(device):
        torch.cuda.set_device(_visible_gpu(local_rank, num_local, device))
    _join_group("nccl" if _is_cuda(device) else "gloo", num_local, **options)
    if _is_cuda(device):
        _check_one_gpu_each(str(torch.cuda.get_device_properties().uuid))
    status = _run_in_group(main_func, args)
    if status:
        raise SystemExit(status)


def _visible_gpu(local_rank: int, num_local: int, device: str) -> int:
    """Return the number of this process's GPU among those it sees."""
    if torch.cuda.is_available() and torch.cuda.device_count() == 1:
        return 0  # the launcher gave each process a GPU: srun --gpus-per-task=1, Kubernetes, Ray
    _check(num_local, 1, 0, "env://", device)
    return local_rank


def _check_one_gpu_each(gpu: str) -> None:
    """Check that no two processes have one GPU, on which NCCL would fail with a code."""
    gpus = comm.all_gather(gpu)
    for rank, other in enumerate(gpus):
        first = gpus.index(other)
        if first != rank:
            raise InputError(
                f"ranks {first} and {rank} have the same GPU ({other}); start one process for each "
                "GPU, and check CUDA_VISIBLE_DEVICES."
            )
