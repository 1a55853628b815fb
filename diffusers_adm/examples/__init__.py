"""Methods of research on the default model. Each module draws a picture: `python -m diffusers_adm.examples.repaint`."""
