"""A small detection data set that needs no download: textured objects on textured backgrounds."""

from flsl_d2.scenes.files import SCENES_VERSION, make_scenes
from flsl_d2.scenes.render import CLASS_NAMES, Scene, render_scene

__all__ = ["CLASS_NAMES", "SCENES_VERSION", "Scene", "make_scenes", "render_scene"]
