"""Tests of the operations. Paddle is imported here as the engine imports it, also for processes of tests."""

from fastdeploy.common.paddle_import import import_paddle

import_paddle()
