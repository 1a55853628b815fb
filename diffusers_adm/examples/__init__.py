"""Research methods that use the default model. Each module draws a picture, such as `python -m diffusers_adm.examples.repaint`."""
