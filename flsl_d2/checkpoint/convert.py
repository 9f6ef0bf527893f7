"""One weight file into another, with the account of every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flsl_d2.checkpoint.build import open_encoder
from flsl_d2.checkpoint.export import timm_call, write_encoder, write_timm
from flsl_d2.checkpoint.report import LoadReport
from flsl_d2.errors import InputError
from flsl_d2.files import write_text

__all__ = ["FORMATS", "convert_checkpoint"]

# What can be written, and the suffixes of the files.
FORMATS = {
    "d2": (".pth",),
    "safetensors": (".safetensors",),
    "timm": (".pth", ".safetensors"),
}


def convert_checkpoint(
    source: str,
    target: str,
    to: str | None = None,
    which: str | None = None,
    report: str | None = None,
    **changes: Any,
) -> LoadReport:
    """Read an encoder in any known layout and write it; print what became of every weight.

    Args:
        source: file or URL.
        target: file to write.
        to: a key of :data:`FORMATS`; None goes by the suffix of ``target``.
        which: ``teacher`` or ``student``, where the file holds both.
        report: JSON file for the account; None for none.
        **changes: arguments of ``FLSLViT`` that differ from what the file says.

    Raises:
        InputError: before anything is written, or where writing fails.
    """
    to = to or ("safetensors" if target.endswith(".safetensors") else "d2")
    if Path(target).suffix not in FORMATS[to]:
        raise InputError(
            f"the output {target!r} does not have the suffix of {to} files; use "
            f"{' or '.join(FORMATS[to])}."
        )
    if Path(target).resolve() == Path(source).resolve():
        raise InputError(f"the output {target!r} is the input; give another name.")
    encoder, account = open_encoder(f"{source}?which={which}" if which else source, **changes)
    if to == "timm":
        write_timm(encoder, target)
    else:
        write_encoder(encoder, target)
    if report is not None:
        _write_report(report, account)
    print(account.table())
    print(f"{'written':<10} {target} ({to})")
    if to == "timm":
        print(f"\nLoad it with:\n{timm_call(encoder, target)}")
        own = encoder.architecture
        if own["position_offset"] or not own["position_antialias"]:
            print("At other image sizes timm resamples positions, but not as this encoder does.")
    return account


def _write_report(path: str, account: LoadReport) -> None:
    try:
        write_text(path, json.dumps(account.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"the report {path!r} cannot be written ({error.strerror}); choose another."
        ) from error
