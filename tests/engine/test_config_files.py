"""Config files and overrides: what is there is taken, the rest is refused in one sentence."""

import builtins
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from flsl_d2.engine.config_files import apply_lazy_overrides, load_lazy_config, resolve_config_path
from flsl_d2.errors import InputError


@pytest.fixture
def write(tmp_path):
    def _write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def refusal(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lazy_config_with_a_relative_import(write):
    write("base.py", "train = dict(max_iter=1, seed=-1)")
    child = write("child.py", "from .base import train\ntrain.max_iter = 2")
    assert load_lazy_config(child, ["train.seed=4"]).train == {"max_iter": 2, "seed": 4}


def test_missing_empty_and_foreign_files(write, tmp_path):
    assert "does not exist" in refusal(load_lazy_config, str(tmp_path / "no.py"))
    assert "--config-file" in refusal(resolve_config_path, "")
    assert ".json" in refusal(load_lazy_config, write("a.json", "{}"))
    assert "is YAML" in refusal(load_lazy_config, write("a.yaml", "SEED: 1"))
    folder = tmp_path / "folder.py"
    folder.mkdir()
    assert "does not exist" in refusal(load_lazy_config, str(folder))


def test_a_syntax_error_names_file_and_line(write):
    base = write("base.py", "train = dict(\nmax_iter==)")
    child = write("child.py", "from .base import train")
    for path in (base, child):
        text = refusal(load_lazy_config, path)
        assert "line 2" in text
        assert "base.py" in text


def test_an_input_error_inside_a_config_is_kept_and_imports_still_work(write):
    original = builtins.__import__
    text = "from flsl_d2.errors import InputError\nraise InputError('patch 7 is odd.')"
    path = write("a.py", text)
    assert refusal(load_lazy_config, path) == "patch 7 is odd."
    assert builtins.__import__ is original


def test_home_folder_in_every_text_of_a_config(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(
        "a.py",
        "train = dict(weights='~/a.pth', same='${train.weights}', deep=[dict(x='~')], no='a~b')",
    )
    cfg = load_lazy_config(path, ["train.no=~/b", "+train.many=[~/c,d]"])
    assert cfg.train.weights == cfg.train.same == "/home/me/a.pth"
    assert cfg.train.deep[0].x == "/home/me"
    assert (cfg.train.no, cfg.train.many) == ("/home/me/b", ["/home/me/c", "d"])
    assert load_lazy_config(path).train.no == "a~b"


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
