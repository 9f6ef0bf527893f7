"""Encoders that the package ships, as ``flsl_d2://NAME`` wherever weights are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

PREFIX = "flsl_d2://"
_FOLDER = Path(__file__).with_name("encoders")


def shipped_encoders() -> list[str]:
    """List the names, such as ``flsl_d2://flsl_vit_mini_p8_small_data.safetensors``."""
    return [PREFIX + file.name for file in sorted(_FOLDER.glob("*.safetensors"))]


class ShippedEncoders(PathHandler):
    """Files of the package by the addresses of :func:`shipped_encoders`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        file = _FOLDER / path.removeprefix(PREFIX)
        if not file.is_file():
            raise ValueError(f"the package ships {', '.join(shipped_encoders())}")
        return str(file)

    def _isfile(self, path: str, **_: Any) -> bool:
        return path in shipped_encoders()

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(ShippedEncoders(), allow_override=True)
