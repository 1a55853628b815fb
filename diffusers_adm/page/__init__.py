"""Page of `diffusers-adm page`, which shows in a browser what guidance does. It requires the extra `page`."""

import os


# gradio reads this variable when it is imported. This package sends no usage data.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
