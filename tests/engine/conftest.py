"""Imports Paddle as the engine does, before a module of tests imports it."""

from fastdeploy.common.paddle_import import import_paddle

import_paddle()
