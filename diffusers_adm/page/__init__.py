"""The page of `diffusers-adm page`: what guidance does, in a browser. It requires the extra `page`."""

import os


# gradio reads it when it is imported. Nothing of this package calls home.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
