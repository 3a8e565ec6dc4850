"""fd-dp: data-parallel serving of Mixture-of-Experts language models.

Importing this package is cheap: the daemon and the router are subpackages and must not load Paddle.
"""

import warnings

__version__ = "0.1.0"

# On import Paddle recommends installing ccache, but nothing is compiled at run time.
warnings.filterwarnings("ignore", message="No ccache found")
