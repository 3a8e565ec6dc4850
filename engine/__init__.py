"""fd-dp: data-parallel serving of Mixture-of-Experts language models.

Importing this package is cheap: the daemon and the router live below it and must not load Paddle.
"""

__version__ = "0.1.0"
