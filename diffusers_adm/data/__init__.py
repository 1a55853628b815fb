"""Images and where they come from, shared by training and evaluation."""
