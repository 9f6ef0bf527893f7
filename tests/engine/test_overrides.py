"""Overrides: what exists is set with its own type, what does not is named, all of it at once."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from flsl_d2.engine.overrides import apply_lazy_overrides
from flsl_d2.errors import InputError


def make_config() -> DictConfig:
    train = {"max_iter": 100, "amp": {"enabled": True}, "init_checkpoint": "", "seed": None}
    config = {
        "train": train,
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999]},
        "stages": [{"lr": 1.0}, {"lr": 2.0}],
        "same": "${train.max_iter}",
    }
    return DictConfig(config, flags={"allow_objects": True})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=5", "train.max_iter", 5),
        ("train.max_iter=1e3", "train.max_iter", 1000),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("train.amp.enabled=false", "train.amp.enabled", False),
        ("train.init_checkpoint=", "train.init_checkpoint", ""),
        ("train.init_checkpoint=/a/b=c (1),d.pth", "train.init_checkpoint", "/a/b=c (1),d.pth"),
        ("train.init_checkpoint=7", "train.init_checkpoint", "7"),
        ("train.init_checkpoint=[a,b]", "train.init_checkpoint", ["a", "b"]),
        ("train.seed=3", "train.seed", 3),
        ("optimizer.betas=[0.8,0.9]", "optimizer.betas", [0.8, 0.9]),
        ("train={max_iter: 3}", "train.max_iter", 3),
        ("stages.1.lr=0.5", "stages.1.lr", 0.5),
        ("same=7", "same", 7),
        ("+train.extra.deep=1", "train.extra.deep", 1),
    ],
)
def test_sets_a_key_with_its_own_type(override, key, value):
    got = OmegaConf.select(apply_lazy_overrides(make_config(), [override]), key)
    assert got == value
    assert not isinstance(value, (int, float)) or type(got) is type(value)


def test_a_group_override_keeps_the_other_keys():
    assert apply_lazy_overrides(make_config(), ["train={max_iter: 3}"]).train.amp.enabled is True


def test_names_all_unknown_keys_with_the_closest_ones():
    given = "train.max_iters=5 train.max_iter=5 optimiser.lr=1 train={amq:1} a.b.c=1".split()
    with pytest.raises(InputError) as error:
        apply_lazy_overrides(make_config(), given)
    for part in (
        *("train.max_iters (did you mean train.max_iter", "train.amq", "a.b.c", "leading +"),
        "optimiser.lr (did you mean optimizer.lr",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


REFUSED = """
    train.max_iter=many train.max_iter=1.5 train.max_iter=true train.max_iter=null
    train.max_iter=1,2 train.amp.enabled=1 train.amp=7 optimizer.lr=fast optimizer.betas=0.9
    train.max_iter =3 ~train.max_iter stages.2.lr=1 train.max_iter.x=1
""".split()


@pytest.mark.parametrize("override", REFUSED)
def test_refuses_in_one_sentence_and_changes_nothing(override):
    config = make_config()
    with pytest.raises(InputError) as error:
        apply_lazy_overrides(config, [override])
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
    assert config == make_config()


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_is_set_or_refused(text):
    config = make_config()
    with contextlib.suppress(InputError):
        apply_lazy_overrides(config, [text])
    if not text.startswith("+"):
        assert config.keys() == make_config().keys()


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="$\\'\"\0"), min_size=1))
def test_a_path_arrives_as_it_was_typed(path):
    if path.strip() != path or path.startswith("[") or path.lower() == "null":
        return
    got = apply_lazy_overrides(make_config(), [f"train.init_checkpoint={path}"])
    assert got.train.init_checkpoint == path
