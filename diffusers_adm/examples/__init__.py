"""What research builds on these models, on the default one: each module draws a picture, `python -m diffusers_adm.examples.repaint`."""
