"""Sharded training, which was taken out: each process has the whole model."""

from __future__ import annotations

from typing import Any

from flsl_d2.errors import InputError


def check_sharding(sharding: str, *_settings: Any) -> bool:
    """Refuse ``train.sharding`` of earlier configs, except ``none``; return False.

    Raises:
        InputError: the setting asks for shards.
    """
    if sharding != "none":
        raise InputError(
            f"train.sharding is '{sharding}', and each process has the whole model; take the key "
            "out of the config."
        )
    return False


def shard(_method: Any) -> None:
    check_sharding("fsdp2")
