"""Captioned images: the phantom, generic pictures, readers of image files, and the batches that training reads."""
